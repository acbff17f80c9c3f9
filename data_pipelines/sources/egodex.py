"""EgoDex (Apple, 2025): egocentric video of two hands at work, with the pose of every joint.

    <path>/<part>/<task>/<n>.mp4     1080p, 30 frames per second
    <path>/<part>/<task>/<n>.hdf5    transforms/<joint> [N, 4, 4], confidences/<joint> [N],
                                     camera/intrinsic [3, 3], descriptions as attributes

A part or a task may be opened by itself. Streams are "video" and the datasets of the HDF5 file
under their own paths ("transforms/leftHand"); poses are in the frame of the recording's origin, as
"transforms/camera" is. The intrinsics do not change: one value, at time 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from data_pipelines.episode import NANOSECONDS, Episode, LazyEpisodes, Stream
from data_pipelines.sources.files import decode_text, named_faults, walk
from data_pipelines.video import VideoFile, VideoPool

FPS = 30
CAMERA, INTRINSIC = "video", "camera/intrinsic"
TOLERANCE_FRAMES = FPS // 2  # by which poses and video may differ in length
_DEEPEST = 2  # folders between the dataset's and the files: part and task


def recognises(path: Path) -> bool:
    """Whether HDF5 files lie beside videos of the same names."""
    if not path.is_dir():
        return False
    for pattern in ("*.hdf5", "*/*.hdf5", "*/*/*.hdf5"):
        if (first := next(path.glob(pattern), None)) is not None:
            return first.with_suffix(".mp4").is_file()
    return False


def open_egodex(path: Path, *, name: str, embodiment: str) -> Sequence[Episode]:
    """Opens EgoDex, or a part of it; files are read when an episode is asked for.

    A video without poses, or poses without a video, is an error of that episode only.

    Args:
        path: the folder of the parts, of one part, or of one task.
        name: of the dataset, becomes `Episode.source`.
        embodiment: becomes `Episode.embodiment`, e.g. "human".

    Raises:
        ValueError: if there are no such files.
    """
    path = Path(path)
    stems = set()
    for folder, folders, names in walk(path):
        stems |= {(folder / n).with_suffix("") for n in names if n.endswith((".mp4", ".hdf5"))}
        if len(folder.relative_to(path).parts) == _DEEPEST:
            folders.clear()
    stems = sorted(stems, key=lambda s: (s.parent.as_posix(), len(s.name), s.name))
    if not any(stem.with_suffix(".hdf5").is_file() for stem in stems):
        raise ValueError(
            f"{path} is no EgoDex folder: no <task>/<n>.hdf5 with <n>.mp4 beside it was found"
        )
    dataset = _Dataset(path, name, embodiment, stems)
    return LazyEpisodes(len(stems), dataset.load)


@dataclass(frozen=True)
class _Dataset:
    path: Path
    name: str
    embodiment: str
    stems: list[Path]  # of the files, without a suffix
    pool: VideoPool = field(default_factory=VideoPool)

    def load(self, index: int) -> Episode:
        stem = self.stems[index]
        poses = stem.with_suffix(".hdf5")
        if not poses.is_file():
            raise ValueError(f"{poses}: the poses are missing; copy the file again")
        video = VideoFile(stem.with_suffix(".mp4"), pool=self.pool)
        streams = {CAMERA: video.stream()}
        with named_faults(poses), h5py.File(poses) as file:
            numbers = _read_numbers(file, poses)
            instruction = _description(file.attrs, poses)
        lengths = {len(values) for key, values in numbers.items() if key != INTRINSIC}
        if len(lengths) != 1 or abs(lengths.pop() - len(video)) > TOLERANCE_FRAMES:
            found = sorted({len(values) for values in numbers.values()} - {1})
            raise ValueError(
                f"{poses} has poses of {found} frames and the video {len(video)}; they do not "
                "belong together"
            )
        for key, values in numbers.items():
            times = (np.arange(len(values), dtype=np.int64) * NANOSECONDS + FPS // 2) // FPS
            streams[key] = Stream(times, values)
        return Episode(
            id=stem.relative_to(self.path).as_posix(),
            source=self.name,
            embodiment=self.embodiment,
            instructions=(instruction,),
            streams=streams,
            cameras=(CAMERA,),
        )


def _read_numbers(file: h5py.File, path: Path) -> dict[str, np.ndarray]:
    numbers = {}
    for group, shape in (("transforms", (4, 4)), ("confidences", ())):
        for joint in file.get(group, ()):
            numbers[f"{group}/{joint}"] = _read_array(file, f"{group}/{joint}", shape, path)
    if not any(map(len, numbers.values())):
        raise ValueError(f"{path} holds no transforms; it is no EgoDex file, or cut off")
    if INTRINSIC in file:
        numbers[INTRINSIC] = _read_array(file, INTRINSIC, (3,), path)[None]
    return numbers


def _read_array(file: h5py.File, key: str, shape: tuple[int, ...], path: Path) -> np.ndarray:
    array = file[key]
    if not isinstance(array, h5py.Dataset) or array.dtype.kind not in "fiu":
        raise ValueError(f"{path}: {key} is no array of numbers; copy the file again")
    if not array.ndim or array.shape[1:] != shape:
        raise ValueError(
            f"{path} has {key} of shape {list(array.shape)}; {['N', *shape]} is expected"
        )
    return array[()]


def _description(attributes: h5py.AttributeManager, path: Path) -> str:
    """The sentence about what is done, in the direction in which it is done here."""

    def text(key: str) -> str:
        value = attributes.get(key, "")
        text = decode_text(value, path) if isinstance(value, bytes) else value
        if not isinstance(text, str):
            raise ValueError(f"{path}: the attribute {key!r} is {value!r}, which is no text")
        return text.strip()

    if text("llm_type") == "reversible" and text("which_llm_description") == "2":
        key = "llm_description2"
    else:
        key = "llm_description" if "llm_description" in attributes else "description"
    if not text(key):
        raise ValueError(f"{path} has no attribute {key!r}, which says what is done")
    return text(key)
