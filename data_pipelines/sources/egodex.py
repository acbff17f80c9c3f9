"""EgoDex (Apple, 2025): egocentric video of two hands at work, with the pose of every joint.

    <path>/<part>/<task>/<n>.mp4     1080p, 30 frames per second
    <path>/<part>/<task>/<n>.hdf5    transforms/<joint> [N, 4, 4], confidences/<joint> [N],
                                     camera/intrinsic [3, 3], descriptions as attributes

A part or a task may be opened by itself. The streams are "video" and the datasets of the HDF5 file
under their own paths ("transforms/leftHand"). Poses are in the frame of the recording's origin, as
"transforms/camera" is. The intrinsics are constant: one value, at time 0.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from data_pipelines.episode import NANOSECONDS, Episode, LazyEpisodes, Stream
from data_pipelines.sources.files import decode_text, walk
from data_pipelines.sources.hdf5 import named_faults
from data_pipelines.video import VideoFile, VideoPool

FPS = 30
CAMERA, INTRINSIC = "video", "camera/intrinsic"
TOLERANCE_FRAMES = FPS // 2  # by which poses and video may differ in length
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
    streams = {CAMERA: video.stream()}
    with named_faults(poses), h5py.File(poses) as file:
        arrays = _read_arrays(file, poses)
        instruction = _description(file.attrs, poses)
    lengths = sorted({len(values) for key, values in arrays.items() if key != INTRINSIC})
    if len(lengths) != 1 or abs(lengths[0] - len(video)) > TOLERANCE_FRAMES:
        raise ValueError(
            f"{poses} has poses of {lengths} frames, but the video has {len(video)}; they do not "
            "belong together"
        )
    for key, values in arrays.items():
        times = (np.arange(len(values), dtype=np.int64) * NANOSECONDS + FPS // 2) // FPS
        streams[key] = Stream(times, values)
    return Episode(
        id=stem.relative_to(path).as_posix(),
        source=name,
        embodiment=embodiment,
        instructions=(instruction,),
        streams=streams,
        cameras=(CAMERA,),
    )


def _read_arrays(file: h5py.File, path: Path) -> dict[str, np.ndarray]:
    arrays = {}
    for group, shape in (("transforms", (4, 4)), ("confidences", ())):
        for joint in file.get(group, ()):
            arrays[f"{group}/{joint}"] = _read_array(file, f"{group}/{joint}", shape, path)
    if not any(map(len, arrays.values())):
        raise ValueError(f"{path} has no transforms; it is truncated, or not an EgoDex file")
    if INTRINSIC in file:
        arrays[INTRINSIC] = _read_array(file, INTRINSIC, (3,), path)[None]
    return arrays


def _read_array(file: h5py.File, key: str, shape: tuple[int, ...], path: Path) -> np.ndarray:
    array = file[key]
    if not isinstance(array, h5py.Dataset) or array.dtype.kind not in "fiu":
        raise ValueError(f"{path}: {key} is not an array of numbers; copy the file again")
    if not array.ndim or array.shape[1:] != shape:
        raise ValueError(f"{path}: {key} has shape {list(array.shape)}, expected {['N', *shape]}")
    return array[()]


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
