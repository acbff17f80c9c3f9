"""Records demonstrations of scripted experts in simulation (`launch.record`).

A recording consists of units: a few episodes of one task. Worker processes record units, each of
which appears in the folder `unfinished` when it is complete; at the end they are assembled into a
dataset of the chosen kind: LeRobot v3.0, captioned videos, or LIBERO's HDF5. A recording that was
stopped at any moment resumes, and ends with the same bytes as one that was not.

This file also runs without jax in the Python of a simulator that needs its own.
"""

import json
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.atomic import replacing, write_json
from data_pipelines.lock import LOCK
from data_pipelines.progress import Bar
from data_pipelines.settings import differences
from data_pipelines.sources.files import MANIFEST, UNFINISHED
from data_pipelines.video import VideoFile, video_writer, write_video
from data_pipelines.writers import (
    Demonstration,
    RobotEpisode,
    Scene,
    Stats,
    VideoPart,
    frame_stats,
    write_hdf5,
    write_lerobot,
    write_video_folder,
)
from mvjax.evaluation.suites.suite import SUITES, Suite, package_versions
from mvjax.evaluation.worker_pool import worker_pool

ABOUT = "about.json"  # the instruction of a unit; for HDF5 its scene, too
AFTER_SUCCESS = 12  # control steps recorded after the first success, so that the end is seen
ATTEMPTS = 20  # per episode; the experts fail 2 % of the time, 30 % on the hardest task
STATS_FRAMES = 8  # frames per episode from which the dataset's statistics are computed
VIDEO_STRIDE = 4  # control steps per frame of kind video: 80 Hz -> 20 fps


@dataclass(frozen=True)
class Unit:
    """Episodes `first` to `first + count - 1` of a task."""

    task: str
    first: int
    count: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.task}-{self.first:05d}"


@dataclass(frozen=True)
class Recording:
    """What to record; two recordings with equal settings are equal byte for byte.

    Attributes:
        kind: of the suite's kinds: "robot", "video" or "hdf5".
        tasks: of the suite, e.g. "drawer-open-v3" or "object-2".
        episodes: successful demonstrations per task.
        noise: standard deviation of the noise on executed actions (labels stay clean).
        seed: together with the task and the attempt's number it determines an episode.
        height, width: of the frames, pixels.
        unit_episodes: episodes recorded between two saves; of kind robot they share a video file.
        suite: a key of `SUITES`.
        cameras: of the suite; () for those that the kind records by default, which is the main one,
            or all for "hdf5". Only "robot" records others.
    """

    kind: str
    tasks: tuple[str, ...]
    episodes: int
    noise: float = 0.1
    seed: int = 0
    height: int = 192
    width: int = 192
    unit_episodes: int = 4
    suite: str = "metaworld"
    cameras: tuple[str, ...] = ()

    def __post_init__(self):
        kinds = self.simulator.kinds
        if self.kind not in kinds:
            raise ValueError(f"kind must be {' or '.join(map(repr, kinds))}, got {self.kind!r}")
        for task in self.tasks:
            self.simulator.check_task(task)
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"tasks must be one or more, each named once; got {self.tasks}")
        known, own = self.simulator.cameras, self._default_cameras
        cameras = tuple(self.cameras) or own
        if unknown := [name for name in cameras if name not in known]:
            raise ValueError(
                f"the suite {self.suite!r} has the cameras {', '.join(map(repr, known))}, but no "
                f"{unknown[0]!r}"
            )
        if len(set(cameras)) < len(cameras):
            raise ValueError(f"cameras must each be named once; got {cameras}")
        if self.kind != "robot" and cameras != own:
            raise ValueError(
                f"recordings of kind {self.kind!r} are of {', '.join(map(repr, own))}: other "
                "cameras need kind 'robot'"
            )
        object.__setattr__(self, "cameras", cameras)

    @property
    def _default_cameras(self) -> tuple[str, ...]:
        known = self.simulator.cameras
        return known if self.kind == "hdf5" else known[:1]

    def settings(self) -> dict[str, Any]:
        """What decides the bytes, as JSON values; without the cameras where they are the default's.

        Earlier versions recorded these cameras only, and did not name them.
        """
        settings = json.loads(json.dumps(asdict(self)))
        if self.cameras == self._default_cameras:
            del settings["cameras"]
        return settings

    def units(self) -> list[Unit]:
        """Returns the units in the order of the finished dataset."""
        return [
            Unit(task, first, min(self.unit_episodes, self.episodes - first))
            for task in self.tasks
            for first in range(0, self.episodes, self.unit_episodes)
        ]

    @property
    def simulator(self) -> Suite:
        """The suite that `suite` names."""
        return SUITES[self.suite]

    @property
    def stride(self) -> int:
        """Control steps per frame."""
        return VIDEO_STRIDE if self.kind == "video" else 1

    @property
    def fps(self) -> int:
        """Frames per second."""
        return self.simulator.control_hz // self.stride


def record_dataset(
    out: Path, recording: Recording, workers: int = 2, progress: bool = True
) -> dict[str, Any]:
    """Records a dataset, resumes one that was stopped, or leaves a finished one as it is.

    One worker process per core is fastest.

    Returns:
        {"episodes", "frames", "seconds"}: of the whole dataset, and the duration of this call.

    Raises:
        ValueError: if the folder holds another recording or other files.
        RuntimeError: if no OpenGL is found, or an expert keeps failing.
    """
    began = time.monotonic()
    staging = _open_folder(out, recording)
    if not (out / MANIFEST).exists():
        units = recording.units()
        todo = [unit for unit in units if not (staging / unit.name).is_dir()]
        _record_units(todo, recording, staging, workers, progress)
        assembled = assemble(out, staging, recording, units)
        versions = package_versions(recording.suite)
        made = {"recording": recording.settings(), **assembled, "versions": versions}
        write_json(out / MANIFEST, made)
    shutil.rmtree(staging, ignore_errors=True)
    manifest = json.loads((out / MANIFEST).read_text())
    totals = {name: manifest[name] for name in ("episodes", "frames")}
    return {**totals, "seconds": time.monotonic() - began}


def _open_folder(out: Path, recording: Recording) -> Path:
    """Prepares the dataset's folder and returns that of finished units in it."""
    staging = out / UNFINISHED
    settings, own = recording.settings(), list(recording._default_cameras)
    versions = package_versions(recording.suite)
    for manifest in (out / MANIFEST, staging / MANIFEST):
        if manifest.exists():
            # Older recordings do not name their suite.
            begun = json.loads(manifest.read_text())
            found = {"suite": "metaworld", "cameras": own} | begun["recording"]
            asked = settings | {"cameras": list(recording.cameras)}
            changed = differences({name: found.get(name) for name in asked}, asked)
            if manifest.parent == staging:  # a finished one is not added to
                changed += differences(begun.get("versions", versions), versions)
            if changed:
                raise ValueError(
                    f"{out} holds a recording with other settings or packages "
                    f"({'; '.join(changed)}): resume it with the same, or choose another folder"
                )
            return staging
    if out.exists() and any(path.name not in (UNFINISHED, LOCK) for path in out.iterdir()):
        raise ValueError(f"{out} holds other files: choose a new or an empty folder")
    write_json(staging / MANIFEST, {"recording": settings, "versions": versions})
    return staging


def _record_units(
    units: list[Unit], recording: Recording, staging: Path, workers: int, progress: bool
) -> None:
    if not units:
        return
    total = recording.episodes * len(recording.tasks)
    done = total - sum(unit.count for unit in units)
    title = str(staging.parent)
    bar = Bar(total=total, initial=done, unit="episode", disable=not progress, desc=title)
    frames, began = 0, time.monotonic()
    with bar, worker_pool(min(workers, len(units))) as submit:
        for future in as_completed(submit(record_unit, units, recording, staging)):
            count, new_frames = future.result()
            frames += new_frames
            bar.set_postfix_str(f"{frames / (time.monotonic() - began):.0f} frames/s", False)
            bar.update(count)


# A unit: a few successful episodes of one task, saved together or not at all.


@dataclass(frozen=True)
class Performance:
    """A successful episode of n control steps."""

    frames: dict[str, list[np.ndarray]]  # camera -> uint8 [h, w, 3] each; empty for kind hdf5
    actions: np.ndarray  # float32 [n, d]
    rows: dict[str, np.ndarray]  # the other recorded values, name -> [n, ...]


def record_unit(unit: Unit, recording: Recording, staging: Path) -> tuple[int, int]:
    """Records `staging / unit.name`, and returns the numbers of episodes and frames."""
    # In recordings of kind video, every episode has a slightly different camera.
    moved = {"camera_jitter_seed": recording.seed} if recording.kind == "video" else {}
    size = dict(height=recording.height, width=recording.width)
    simulator = recording.simulator.make_simulator(unit.task, **size, **moved)
    try:
        with replacing(staging / unit.name) as folder:
            folder.mkdir()
            about = {"instruction": simulator.instruction}
            if recording.kind == "hdf5":
                about = simulator.hdf5_scene()
            (folder / ABOUT).write_text(json.dumps(about))
            write, _ = _KINDS[recording.kind]
            frames = write(folder, unit, recording, _performances(simulator, unit, recording))
    finally:
        simulator.close()
    return unit.count, frames


def _performances(simulator: Any, unit: Unit, recording: Recording) -> Iterator[Performance]:
    """The unit's episodes, one at a time: together they would fill the memory."""
    for episode in range(unit.first, unit.first + unit.count):
        for attempt in range(episode * ATTEMPTS, (episode + 1) * ATTEMPTS):
            performance = _attempt(simulator, unit.task, attempt, recording)
            if performance is not None:
                yield performance
                break
        else:
            raise RuntimeError(
                f"the expert of {unit.task} failed {ATTEMPTS} times in a row with noise "
                f"{recording.noise}: use less noise"
            )


def _attempt(simulator: Any, task: str, attempt: int, recording: Recording) -> Performance | None:
    # A checksum, since hash() differs between processes.
    rng = np.random.default_rng([recording.seed, zlib.crc32(task.encode()), attempt])
    simulator.reset(int(rng.integers(2**31)))
    actions, rows = [], []
    frames: dict[str, list[np.ndarray]] = {}
    remaining = None
    for step in range(simulator.max_steps):
        if recording.kind == "hdf5":
            rows.append(simulator.hdf5_row())
        else:
            rows.append({"state": simulator.lerobot_state()})
            if step % recording.stride == 0:
                for camera in recording.cameras:
                    frames.setdefault(camera, []).append(simulator.render(camera))
        action = simulator.expert_action()
        actions.append(action)
        noise = rng.normal(0.0, recording.noise, action.shape)
        success = simulator.step(np.clip(action + noise, -1.0, 1.0))
        if remaining is None and success:
            remaining = AFTER_SUCCESS
        elif remaining is not None:
            remaining -= 1
        if remaining == 0:
            kept = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            return Performance(frames, np.stack(actions), kept)
    return None


def sampled_stats(frames: Sequence[np.ndarray]) -> Stats:
    """Computes the statistics of a few frames of an episode."""
    sample = np.linspace(0, len(frames) - 1, STATS_FRAMES).round().astype(int)
    return frame_stats([frames[i] for i in sample])


def assemble(out: Path, staging: Path, recording: Recording, units: list[Unit]) -> dict[str, int]:
    """Writes the dataset from its units, and returns {"episodes", "frames", "fps"}; repeatable."""
    _, write = _KINDS[recording.kind]
    frames = write(out, staging, recording, units)
    episodes = recording.episodes * len(recording.tasks)
    return {"episodes": episodes, "frames": frames, "fps": recording.fps}


# The three kinds. Each has a function that writes the files of a unit and returns the number of
# its frames, and one that assembles the units and returns the number of all frames.

Performances = Iterator[Performance]


def _write_robot(folder: Path, unit: Unit, recording: Recording, made: Performances) -> int:
    words, count = _words(recording), 0
    with ExitStack() as videos:
        add = {
            camera: videos.enter_context(video_writer(folder / f"{word}s.mp4", recording.fps))
            for camera, word in words.items()
        }
        for number, performance in enumerate(made):
            arrays = {"action": performance.actions, **performance.rows}
            for camera, word in words.items():
                stats = sampled_stats(performance.frames[camera])
                arrays |= {f"{word}_{name}": value for name, value in stats.items()}
                for frame in performance.frames.pop(camera):  # before the next fill the memory
                    add[camera](frame)
            np.savez(_episode_file(folder, number), **arrays)
            count += len(performance.actions)
    return count


def _words(recording: Recording) -> dict[str, str]:
    """Each camera's word in the names of a unit's files and arrays."""
    main = recording.simulator.cameras[0]  # by the name of earlier versions, whose units go on
    return {c: "frame" if c == main else f"{c}_frame" for c in recording.cameras}


def feature_of(camera: str) -> str:
    """The name of a camera in a LeRobot dataset."""
    return f"observation.images.{camera}"


def _assemble_robot(out: Path, staging: Path, recording: Recording, units: list[Unit]) -> int:
    suite, episodes, words = recording.simulator, [], _words(recording)
    for folder in (staging / unit.name for unit in units):
        first_frame = 0
        for path in _episode_files(folder):
            with np.load(path) as arrays:
                vectors = {"action": arrays["action"], "observation.state": arrays["state"]}
                videos = {}
                for camera, word in words.items():
                    names = [name for name in arrays if name.startswith(f"{word}_")]
                    stats = {name.removeprefix(f"{word}_"): arrays[name] for name in names}
                    video = VideoPart(folder / f"{word}s.mp4", first_frame, stats)
                    videos[feature_of(camera)] = video
            episodes.append(RobotEpisode(_about(folder)["instruction"], vectors, videos))
            first_frame += len(vectors["action"])
    write_lerobot(
        out,
        episodes,
        fps=recording.fps,
        robot_type=suite.embodiment,
        frame_size=(recording.height, recording.width),
    )
    return sum(len(episode.vectors["action"]) for episode in episodes)


def _write_videos(folder: Path, unit: Unit, recording: Recording, made: Performances) -> int:
    return sum(
        write_video(folder / f"{unit.task}-{number:05d}.mp4", frames, recording.fps)
        for number, performance in enumerate(made, start=unit.first)
        for frames in performance.frames.values()
    )


def _assemble_videos(out: Path, staging: Path, recording: Recording, units: list[Unit]) -> int:
    videos = {
        path.stem: (path, _about(staging / unit.name)["instruction"])
        for unit in units
        for path in sorted((staging / unit.name).glob("*.mp4"))
    }
    write_video_folder(out, videos)
    return sum(len(VideoFile(path)) for path, _ in videos.values())


def _write_rows(folder: Path, unit: Unit, recording: Recording, made: Performances) -> int:
    count = 0
    for number, performance in enumerate(made):
        np.savez(_episode_file(folder, number), actions=performance.actions, **performance.rows)
        count += len(performance.actions)
    return count


def _assemble_rows(out: Path, staging: Path, recording: Recording, units: list[Unit]) -> int:
    """One file per task, as in LIBERO."""
    frames = 0

    def demonstrations(folders: list[Path]) -> Iterator[Demonstration]:
        nonlocal frames
        for path in (path for folder in folders for path in _episode_files(folder)):
            with np.load(path) as arrays:
                frames += len(arrays["actions"])
                seen = {k.removeprefix("obs/"): arrays[k] for k in arrays if k.startswith("obs/")}
                named = {k: arrays[k] for k in ("actions", "states", "robot_states")}
                yield Demonstration(observations=seen, **named)

    for task in recording.tasks:
        folders = [staging / unit.name for unit in units if unit.task == task]
        about = _about(folders[0])
        file = out / f"{about.pop('name')}_demo.hdf5"
        write_hdf5(file, demonstrations(folders), Scene(**about, control_freq=recording.fps))
    return frames


_KINDS = {
    "robot": (_write_robot, _assemble_robot),
    "video": (_write_videos, _assemble_videos),
    "hdf5": (_write_rows, _assemble_rows),
}


def _episode_file(folder: Path, number: int) -> Path:
    return folder / f"episode-{number:03d}.npz"


def _episode_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("episode-*.npz"))


def _about(folder: Path) -> dict[str, str]:
    return json.loads((folder / ABOUT).read_text())
