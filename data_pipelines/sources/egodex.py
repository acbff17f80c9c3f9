"""EgoDex (Apple, 2025): egocentric video of two hands at work, with the pose of every joint.

    <path>/<part>/<task>/<n>.mp4     1080p, 30 frames per second
    <path>/<part>/<task>/<n>.hdf5    transforms/<joint> [N, 4, 4], confidences/<joint> [N],
                                     camera/intrinsic [3, 3], descriptions as attributes

A part or a task may be opened by itself. The streams are "video" and the datasets of the HDF5 file
under their own paths ("transforms/leftHand"). Pose i belongs to frame i, so it has the time of that
frame. Poses are in the frame of the recording's origin, as "transforms/camera" is. The intrinsics
are constant: one value, at time 0. A dataset that is broken or of another shape is in
`Episode.left_out`.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from data_pipelines.episode import Episode, LazyEpisodes, Stream
from data_pipelines.sources import hdf5
from data_pipelines.sources.files import decode_text, walk
from data_pipelines.video import VideoFile, VideoPool

CAMERA, INTRINSIC = "video", "camera/intrinsic"
TOLERANCE_FRAMES = 15  # by which poses and video may differ in length
SHAPES = {"transforms": (4, 4), "confidences": ()}  # of one frame
_UNEQUAL = "the video and the poses differ in length; both are taken to begin together"
_DEEPEST = 2  # folders between the dataset's and the files: part and task


def recognises(path: Path) -> bool:
    """Whether there are HDF5 files beside videos of the same names."""
    if not path.is_dir():
        return False
    for pattern in ("*.hdf5", "*/*.hdf5", "*/*/*.hdf5"):
        if (first := next(path.glob(pattern), None)) is not None:
            return first.with_suffix(".mp4").is_file()
    return False


def open_egodex(path: Path, *, name: str, embodiment: str) -> Sequence[Episode]:
    """Opens EgoDex, one part or one task; files are read when an episode is accessed.

    A video without poses, or poses without a video, is an error of that episode only.

    Raises:
        ValueError: if there are no such files.
    """
    path = Path(path)
    stems = set()
    for folder, folders, names in walk(path):
        stems |= {(folder / n).with_suffix("") for n in names if n.endswith((".mp4", ".hdf5"))}
        if len(folder.relative_to(path).parts) == _DEEPEST:
            folders.clear()
    # Sorting by length before name puts "2" before "10".
    stems = sorted(stems, key=lambda s: (s.parent.as_posix(), len(s.name), s.name))
    if not any(stem.with_suffix(".hdf5").is_file() for stem in stems):
        raise ValueError(f"{path} is not an EgoDex folder: it has no pair <n>.hdf5 and <n>.mp4")
    load = partial(_load, path, name, embodiment, VideoPool(), stems)
    return LazyEpisodes(len(stems), load)


def _load(
    path: Path, name: str, embodiment: str, pool: VideoPool, stems: list[Path], index: int
) -> Episode:
    stem = stems[index]
    poses, video = stem.with_suffix(".hdf5"), VideoFile(stem.with_suffix(".mp4"), pool=pool)
    streams, findings = {CAMERA: video.stream()}, list(video.findings)
    with hdf5.named_faults(poses), h5py.File(poses) as file:
        arrays, left_out = _read_arrays(file)
        instruction = _description(file.attrs, poses)
    lengths = Counter(len(values) for key, values in arrays.items() if key != INTRINSIC)
    if not any(lengths):
        raise ValueError(f"{poses} has no transforms; it is truncated, or not an EgoDex file")
    length = lengths.most_common(1)[0][0]
    if len(lengths) > 1 and list(lengths.values()).count(lengths[length]) > 1:
        raise ValueError(f"{poses}: the poses have different lengths, {sorted(lengths)} frames")
    if abs(length - len(video)) > TOLERANCE_FRAMES:
        raise ValueError(
            f"{poses} has poses of {length} frames, but the video has {len(video)}; they do not "
            "belong together"
        )
    if length != len(video):
        findings.append(_UNEQUAL)
    times = _times(streams[CAMERA].timestamps, length)
    for key, values in arrays.items():
        if len(values) == length or key == INTRINSIC:
            streams[key] = Stream(times[: len(values)], values)
        else:
            left_out[key] = f"it has {len(values)} values, the other poses {length}"
    return Episode(
        id=stem.relative_to(path).as_posix(),
        source=name,
        embodiment=embodiment,
        instructions=(instruction,),
        streams=streams,
        cameras=(CAMERA,),
        left_out=left_out,
        findings=tuple(findings),
    )


def _times(frames: np.ndarray, length: int) -> np.ndarray:
    """The times of the poses: those of the frames, continued behind the last one."""
    more = np.arange(1, length - len(frames) + 1)
    period = np.median(np.diff(frames)) if len(frames) > 1 else 0
    return np.append(frames, frames[-1] + np.round(more * period).astype(np.int64))[:length]


def _read_arrays(file: h5py.File) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The datasets of the file, and why others cannot be used."""
    found, left_out = hdf5.arrays(file)
    arrays = {}
    for key, array in found.items():
        try:
            arrays[key] = _read_array(array, key)
        except ValueError as error:
            left_out[key] = str(error)
    return arrays, left_out


def _read_array(array: h5py.Dataset, key: str) -> np.ndarray:
    shape = (3,) if key == INTRINSIC else SHAPES.get(key.partition("/")[0])
    if shape is None:
        raise ValueError("a dataset that EgoDex does not describe")
    if not array.shape or array.shape[1:] != shape or array.dtype.kind not in "fiu":
        given = f"{array.dtype} {list(array.shape or ())}"
        raise ValueError(f"{given}, where numbers of the shape {['N', *shape]} are expected")
    where = Path(array.file.filename), key, hdf5.Hdf5Pool()
    values = hdf5.values(array, where, len(array))
    return values[None] if key == INTRINSIC else values


def _description(attributes: h5py.AttributeManager, path: Path) -> str:
    """The description of the task. A reversible task has two, one per direction."""

    def text(key: str) -> str:
        value = attributes.get(key, "")
        text = decode_text(value, path) if isinstance(value, bytes) else value
        if not isinstance(text, str):
            raise ValueError(f"{path}: the attribute {key!r} is {value!r}, expected text")
        return text.strip()

    key = "llm_description" if "llm_description" in attributes else "description"
    if text("llm_type") == "reversible" and text("which_llm_description") == "2":
        key = "llm_description2"
    if not text(key):
        raise ValueError(f"{path} has no attribute {key!r}, which describes the task")
    return text(key)
