"""BridgeData V2 as it was recorded (`demos_8_17.zip`, `scripted_6_18.zip`).

    <site>/<scene>/<task>/<variant>/<date>/raw/traj_group<i>/traj<j>/
        images<k>/im_<t>.jpg    a folder per camera; depth_images are not read
        obs_dict.pkl            full_state, desired_state, eef_transform, time_stamp, ...
        policy_out.pkl          per step: actions; one fewer than observations
        lang.txt                the instruction, then "confidence: 1"; an eighth have none

The first observation is dropped with its action, as mimic-video does: the robot is idle then.
`eef_transform` (4x4) has its rotation in another frame than the Euler angles of `full_state`; it is
the one that SIMPLER reports as proprioception. `gripper_state` and `gripper_action` [n, 1] are the
last number of `full_state` and of `desired_state`, clipped to [0, 1], as mimic-video takes them.
What is incomplete, or not one row per observation, is in `Episode.left_out`.

Pickles are read without being executed.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.episode import NANOSECONDS, Episode, LazyEpisodes, Stream, reason
from data_pipelines.frames import ImageFrames
from data_pipelines.pickles import read_array_pickle
from data_pipelines.sources.files import (
    UNKNOWN_RATE,
    Visit,
    check_period,
    glance,
    read_text,
    step_times,
    walk,
)

_COUNTED, _TIMES = "full_state", "time_stamp"  # what every trajectory has
GRIPPERS = {"gripper_state": "full_state", "gripper_action": "desired_state"}
_IDLE = 1  # observations dropped at the start
_TRAJECTORY = re.compile(r"traj\d+")
_CAMERA = re.compile(r"images\d+")


def recognises(path: Path) -> bool:
    """Whether this is BridgeData V2 as recorded, or a part of it."""
    return any((trajectory / "obs_dict.pkl").is_file() for trajectory in _found(glance(path)))


def open_bridge_raw(
    path: Path,
    *,
    name: str,
    embodiment: str,
    fps: float | None = None,
    cameras: Sequence[str] | None = None,
    instruction_style: str = "stored",
) -> Sequence[Episode]:
    """Opens a tree of trajectories; a trajectory is read when it is accessed.

    Args:
        path: the whole tree, or any folder in it above the trajectories.
        name, embodiment: see `formats`.
        fps: steps per second, evenly spaced; None takes the recorded times, about 5 per second in
            BridgeData V2.
        cameras: the image folders to read, e.g. ("images0",) as mimic-video; None for all.
        instruction_style: "stored", or "release" for the labels that mimic-video kept and repaired.
            Without a label, or if it was dropped, the instruction is "".

    Raises:
        ValueError: if an option is unknown, or there are no trajectories.
    """
    if instruction_style not in LABELS:
        raise ValueError(
            f"dataset {name!r}: instruction_style is {instruction_style!r}; choose from "
            f"{', '.join(LABELS)}"
        )
    path = Path(path)
    folders = list(_found(walk(path)))
    if not folders:
        raise ValueError(f"{path} has no folders traj_group<i>/traj<j> of BridgeData V2")
    dataset = _Dataset(path, name, embodiment, fps, cameras, LABELS[instruction_style], folders)
    return LazyEpisodes(len(folders), dataset.load)


def _found(visits: Iterator[Visit]) -> Iterator[Path]:
    """The folders of the trajectories."""
    for folder, folders, _ in visits:
        if folder.name.startswith("traj_group"):
            yield from (folder / name for name in folders if _TRAJECTORY.fullmatch(name))
            folders.clear()


@dataclass(frozen=True)
class _Dataset:
    path: Path
    name: str
    embodiment: str
    fps: float | None
    cameras: Sequence[str] | None
    label: Callable[[str], str]
    folders: list[Path]

    def load(self, index: int) -> Episode:
        folder = self.folders[index]
        observed = _unpickle(folder / "obs_dict.pkl")
        if not isinstance(observed, dict):
            raise ValueError(f"{folder / 'obs_dict.pkl'}: expected a dict")
        state = _array(observed.get(_COUNTED, ()), folder, _COUNTED)
        if state.shape[1:] != (7,):
            raise ValueError(f"{folder / 'obs_dict.pkl'} has no array `{_COUNTED}` [t, 7]")
        if (count := len(state)) <= _IDLE + 1:
            raise ValueError(f"{folder} has only {count} states")
        times, unknown_rate = self._times(folder, observed, count)

        # Only the lengths tell whether a part was copied completely.
        values: dict[str, np.ndarray | JpegFolder] = {}
        left_out: dict[str, str] = {}
        for key in sorted(observed.keys() - {_TIMES}, key=str):
            with _left_out(left_out, str(key), folder):
                array = _array(observed[key], folder, key)
                if len(array) != count:
                    raise ValueError(f"{len(array)} values of {count} states; copy it again")
                values[str(key)] = array[_IDLE:]
        for key, source in GRIPPERS.items():
            with _left_out(left_out, key, folder):
                if values.get(source, state[:, :0]).shape[1:] != (7,):
                    raise ValueError(f"obs_dict.pkl has no array `{source}` [t, 7]")
                values[key] = values[source][:, 6:].clip(0, 1)
        with _left_out(left_out, "actions", folder):
            actions = _actions(folder)
            if not count - 1 <= len(actions) <= count:
                raise ValueError(f"{len(actions)} actions of {count} states; copy it again")
            values["actions"] = actions[_IDLE:]
        cameras = []
        for camera in self._cameras(folder):
            with _left_out(left_out, camera, folder):
                values[camera] = frames = JpegFolder(folder / camera)
                if len(frames) != count - _IDLE:
                    del values[camera]
                    raise ValueError(f"{len(frames) + _IDLE} pictures of {count} states")
                cameras.append(camera)
        try:
            streams = {key: Stream(times[: len(value)], value) for key, value in values.items()}
            check_period(times, _TIMES, "seconds")
        except ValueError as error:
            raise ValueError(f"{folder}: {error} The option fps replaces the times.") from error
        label = folder / "lang.txt"
        return Episode(
            id=folder.relative_to(self.path).as_posix(),
            source=self.name,
            embodiment=self.embodiment,
            instructions=(self.label(read_text(label)) if label.is_file() else "",),
            streams=streams,
            cameras=tuple(cameras),
            left_out=left_out,
            unknown_rate=unknown_rate,
        )

    def _cameras(self, folder: Path) -> list[str]:
        names = (p.name for p in folder.iterdir() if _CAMERA.fullmatch(p.name))
        found = sorted(names, key=lambda n: int(n.removeprefix("images")))
        if self.cameras is None:
            return found
        if missing := [camera for camera in self.cameras if camera not in found]:
            raise ValueError(f"{folder} has no {missing[0]}, only {found}")
        return list(self.cameras)

    def _times(self, folder: Path, observed: dict, count: int) -> tuple[np.ndarray, str]:
        """Nanoseconds since the first observation that is kept, and `Episode.unknown_rate`."""
        if self.fps is not None or _TIMES not in observed:
            unknown = "" if self.fps else UNKNOWN_RATE.format(folder / "obs_dict.pkl")
            return step_times(count - _IDLE, self.fps or 1), unknown
        seconds = _array(observed[_TIMES], folder, _TIMES).astype(np.float64)
        if seconds.shape != (count,) or not np.isfinite(seconds).all():
            raise ValueError(f"{folder} has {count} states, but not as many timestamps")
        return np.round((seconds - seconds[_IDLE])[_IDLE:] * NANOSECONDS).astype(np.int64), ""


@contextmanager
def _left_out(reasons: dict[str, str], key: str, folder: Path) -> Iterator[None]:
    """Notes why a part cannot be used; without the folder's name, as others may have the same."""
    try:
        yield
    except ValueError as error:
        reasons[key] = str(error).removeprefix(f"{folder}: ").removeprefix(f"{folder}/")


def _actions(folder: Path) -> np.ndarray:
    steps = _unpickle(folder / "policy_out.pkl")
    try:
        found = [step["actions"] if isinstance(step, dict) else step for step in steps]
    except (TypeError, KeyError) as error:
        raise ValueError(f"{folder / 'policy_out.pkl'}: expected steps with `actions`") from error
    return _array(found, folder, "actions")


def _unpickle(file: Path) -> Any:
    if not file.is_file():
        raise ValueError(f"{file} is missing; copy the trajectory again")
    if placeholder := reason(file, ""):
        raise ValueError(f"{file}: {placeholder}")
    return read_array_pickle(file.read_bytes(), file)


def _array(value: Any, folder: Path, key: str) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError as error:  # rows of several lengths
        raise ValueError(f"{folder}: {key} is not an array ({error})") from error
    if array.dtype.kind not in "biuf" or not array.ndim:
        raise ValueError(f"{folder}: {key} is not an array of numbers")
    return array


class JpegFolder(ImageFrames):
    """A camera: `im_0.jpg`, `im_1.jpg`, ... of a folder, without the idle ones at the start."""

    def __init__(self, folder: Path):
        names = {file.name for file in folder.glob("im_*.jpg")}
        missing = next((i for i in range(len(names)) if f"im_{i}.jpg" not in names), None)
        if missing is not None:
            raise ValueError(f"{folder}: im_{missing}.jpg is missing; copy it again")
        if names and (placeholder := reason(folder / "im_0.jpg", "")):
            raise ValueError(f"{folder}: {placeholder}")
        super().__init__(folder, max(len(names) - _IDLE, 0))

    def encoded(self, number: int) -> Path:
        """The file of an image."""
        return self.where / f"im_{number + _IDLE}.jpg"

    def name(self, number: int) -> str:
        """The file's name."""
        return str(self.encoded(number))


# The crowd-sourced instructions, as stored and as mimic-video trained on them. About 13 % of the
# trajectories have none. The release repairs some of the others, and drops 3,046 that say nothing
# about the task; it keeps other languages, and labels that describe something else.

_COMPLAINTS = (
    *("no image", "did not load", "not loaded", "not downloading", "images loaded"),
    *("pictures aren't working", "not showing"),
)
_MARKS = frozenset('"_^~@#$%*+=|?ëěẽēėęćčċ')  # of mistyped or wrongly decoded labels
_SHOUTED = re.compile(r"(?<![A-Za-z])[A-Z]{2,}(?![A-Za-z])")
# Four consonants, digits or dots in a row are random keystrokes, unless they contain a digraph.
_SPELT = "|".join("gh ng th ch sh ph wh ck qu bb cc dd ff gg ll mm nn pp rr ss tt zz".split())
_MASHED = re.compile(rf"(?:(?!{_SPELT})[bcdfghjklmnpqrstvwxz0-9.]){{4}}", re.IGNORECASE)
_FENCE, _REMARK = " cardboard fence", " (does not mention the locations of the objects)"
_REPAIRS = {
    "4fbox": " cardboard box",
    "1fbox": " cardboard box",
    "clockwise90": "clockwise 90 degrees",
    "bpttle": "bottle",
    "thng": "thing",
    "upawrds": "upwards",
}


def _stored_label(text: str) -> str:
    """The first line of a `lang.txt` that is an instruction; "" if there is none."""
    lines = (line.strip() for line in text.splitlines())
    return next((line for line in lines if line and not line.startswith("confidence:")), "")


def _released_label(text: str) -> str:
    """The first line of a `lang.txt` that the release keeps, repaired; "" if there is none."""
    lines = (line.strip() for line in text.splitlines() if "confidence" not in line)
    return next((label for line in lines if (label := _repaired(line)) is not None), "")


def _repaired(line: str) -> str | None:
    """The label of a line; None if the release drops it."""
    if " " not in line or any(complaint in line for complaint in _COMPLAINTS):
        return None
    line = line.removesuffix(_FENCE).strip().replace(",", ", ").replace(" ,", ",")
    line = re.sub(r"\s+", " ", line)
    if _SHOUTED.search(line):
        line = line.lower()
    line = re.sub("stuffed([a-z]+)", r"stuffed \1", line)
    for wrong, right in _REPAIRS.items():
        line = line.replace(wrong, right)
    if _MASHED.search(line):
        return None
    line = line.removesuffix(_REMARK).removeprefix('"').removesuffix('"')
    return None if _MARKS.intersection(line) else line


LABELS = {"stored": _stored_label, "release": _released_label}
