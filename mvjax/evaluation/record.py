r"""Record demonstrations of scripted experts in simulation.

    python -m mvjax.evaluation.record --out data/robot --kind robot \
        --tasks drawer-open-v3,door-open-v3 --episodes 24

`robot` writes LeRobot v3.0 with every control step's frame, action and state (80 Hz); `video`
writes captioned mp4 files at 20 fps from a slightly moved camera, as video without actions. Every
Meta-World task works. Two cores record about 120 frames per second; no accelerator is used.

A recording that was stopped at any moment goes on where it was when the same command is given
again, and ends with the same bytes as one that was never stopped.

    python -m mvjax.evaluation.record --suite libero --out data/libero --kind robot \
        --tasks object-2,object-4 --episodes 20

records LIBERO (`bash launch/libero.sh` first) at 20 Hz, from placements drawn anew: none is among
the 50 in which LIBERO is evaluated. `hdf5` writes LIBERO's own layout, a file per task, from whose
simulator states the episodes can be played again. It takes about 10 seconds per episode and core.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipelines.sources.files import MANIFEST, UNFINISHED
from data_pipelines.video import VideoFile, write_video
from data_pipelines.writers import (
    Demonstration,
    RobotEpisode,
    Scene,
    VideoPart,
    frame_stats,
    write_hdf5,
    write_lerobot,
    write_video_folder,
)
from mvjax.evaluation.suites.libero import CAMERA, WRIST_CAMERA, Libero, in_libero_python
from mvjax.evaluation.suites.libero_scene import split_task
from mvjax.evaluation.suites.metaworld import TASKS, MetaWorld

# What a recording keeps of LIBERO, by the names and conventions that its users know.
#
# LeRobot: "observation.state" is position 3 (m), rotation vector 3 (rad) and two fingers (m), and
# pictures are turned by 180 degrees, as openpi and OpenVLA have them. HDF5: LIBERO's own names,
# with pictures as OpenGL draws them, bottom row first; a row's observation is what preceded its
# action.


def make(task: str, height: int, width: int, jitter: int | None) -> Libero:
    """The simulator of a task; its camera never moves."""
    del jitter
    return Libero(task, height, width)


def state(simulator: Libero) -> np.ndarray:
    """Position, rotation vector and fingers: float32 [8]."""
    parts = (simulator.effector_position(), simulator.effector_rotation(), simulator.fingers())
    return np.concatenate(parts).astype(np.float32)


def row(simulator: Libero) -> dict[str, np.ndarray]:
    """A row of LIBERO's HDF5 files, but for the action: path below the demonstration -> value."""
    position, rotation = simulator.effector_position(), simulator.effector_rotation()
    fingers = simulator.fingers()
    pose = np.concatenate([position, simulator.effector_quaternion()])
    return {
        "states": simulator.state(),
        "robot_states": np.concatenate([fingers, pose]),
        "obs/agentview_rgb": simulator.render(CAMERA)[::-1, ::-1],
        "obs/eye_in_hand_rgb": simulator.render(WRIST_CAMERA)[::-1, ::-1],
        "obs/ee_pos": position,
        "obs/ee_ori": rotation,
        "obs/ee_states": np.concatenate([position, rotation]),
        "obs/gripper_states": fingers,
        "obs/joint_states": simulator.arm(),
    }


def scene(simulator: Libero) -> dict[str, str]:
    """What all demonstrations of a task have in common, for `data_pipelines.writers.Scene`."""
    problem = simulator.scene.problem
    return {
        "name": simulator.scene.name,
        "instruction": simulator.scene.words,
        "env_name": problem,
        "problem_name": problem.lower(),
        "bddl_file": simulator.scene.bddl,
    }


# The simulators in which demonstrations are recorded, and what they give at every control step.


@dataclass(frozen=True)
class RecordedSuite:
    """How a suite's scripted experts are recorded.

    Attributes:
        make: (task, height, width, seed of camera movements or None) -> simulator.
        check: raises ValueError for a task that the suite does not have.
        kinds: what can be recorded: "robot" (LeRobot), "video" (files), "hdf5" (LIBERO's layout).
        control_hz: control steps per second.
        size: of the pictures, (height, width) in pixels, unless asked for otherwise.
        embodiment: the robot's name.
        camera: the picture's name in a LeRobot dataset.
        state: simulator -> "observation.state" of a LeRobot dataset, float32 [d].
        row: simulator -> a row of an HDF5 file, by name; of kind hdf5 alone.
        scene: simulator -> what an HDF5 file says once, JSON; of kind hdf5 alone.
    """

    make: Callable[[str, int, int, int | None], Any]
    check: Callable[[str], Any]
    kinds: tuple[str, ...]
    control_hz: int
    size: tuple[int, int]
    embodiment: str
    camera: str
    state: Callable[[Any], np.ndarray]
    row: Callable[[Any], dict[str, np.ndarray]] | None = None
    scene: Callable[[Any], dict[str, str]] | None = None


def _check_metaworld(task: str) -> None:
    if task not in TASKS:
        raise ValueError(f"unknown tasks {[task]}; choose from {', '.join(TASKS)}")


SUITES = {
    "metaworld": RecordedSuite(
        make=lambda task, height, width, jitter: MetaWorld(task, height, width, jitter),
        check=_check_metaworld,
        kinds=("robot", "video"),
        control_hz=MetaWorld.control_hz,
        size=(192, 192),
        embodiment="metaworld_sawyer",
        camera="observation.images.corner",
        state=lambda simulator: simulator.proprio(),
    ),
    "libero": RecordedSuite(
        make=make,
        check=split_task,
        kinds=("robot", "hdf5"),
        control_hz=20,
        size=(480, 640),
        embodiment="libero_panda",
        camera="observation.images.agentview",
        state=state,
        row=row,
        scene=scene,
    ),
}


# What a recording of demonstrations is, and the units of work it falls into.


VIDEO_STRIDE = 4  # control steps per frame of kind video: 80 Hz -> 20 fps


@dataclass(frozen=True)
class Unit:
    """Episodes `first` ... `first + count - 1` of a task."""

    task: str
    first: int
    count: int

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.task}-{self.first:05d}"


@dataclass(frozen=True)
class Recording:
    """What to record; two recordings with equal settings are equal byte for byte.

    Attributes:
        kind: of the suite's kinds: "robot", "video" or "hdf5".
        tasks: of the suite, e.g. "drawer-open-v3" or "object-2".
        episodes: successful demonstrations per task.
        noise: standard deviation of the noise on executed actions (labels stay clean).
        seed: with the task and the attempt's number, it decides an episode completely.
        height: of the frames, pixels.
        width: of the frames, pixels.
        unit_episodes: episodes recorded between two saves; of kind robot they share a video file.
        suite: the simulator, of `recording.suites.SUITES`.
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

    def __post_init__(self):
        if self.suite not in SUITES:
            raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {self.suite!r}")
        kinds = self.simulator.kinds
        if self.kind not in kinds:
            raise ValueError(f"kind must be {' or '.join(map(repr, kinds))}, got {self.kind!r}")
        if not self.tasks:
            raise ValueError("no tasks were given to record")
        for task in self.tasks:
            self.simulator.check(task)
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"every task may be named once, got {', '.join(self.tasks)}")
        if self.episodes < 1 or self.unit_episodes < 1:
            raise ValueError(f"episodes and unit_episodes must be at least 1, got {self}")

    def units(self) -> list[Unit]:
        """The work, in the order of the finished dataset."""
        return [
            Unit(task, first, min(self.unit_episodes, self.episodes - first))
            for task in self.tasks
            for first in range(0, self.episodes, self.unit_episodes)
        ]

    @property
    def simulator(self) -> RecordedSuite:
        """What is recorded of the suite."""
        return SUITES[self.suite]

    @property
    def stride(self) -> int:
        """Control steps per frame."""
        return VIDEO_STRIDE if self.kind == "video" else 1

    @property
    def fps(self) -> int:
        """Frames per second."""
        return self.simulator.control_hz // self.stride


def picture_size(text: str | None) -> tuple[int, int] | None:
    """(height, width) in pixels of a flag such as "480x640"; None of none.

    Raises:
        ValueError: if it is no size that video can have.
    """
    if text is None:
        return None
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()) or int(height) % 2 or int(width) % 2:
        raise ValueError(
            f"--size must be height x width in pixels, both even, such as 480x640; got {text!r}"
        )
    return int(height), int(width)


# Record a unit: a few successful episodes of one task, saved together or not at all.


ABOUT = "about.json"  # of a unit: the instruction, and for HDF5 the scene
AFTER_SUCCESS = 12  # control steps that follow the first success
ATTEMPTS = 20  # per episode; the experts fail 2 % of the time, 30 % on the worst task
STATS_FRAMES = 8  # frames per episode that enter the dataset's statistics


@dataclass(frozen=True)
class Performance:
    """One success of n control steps.

    Attributes:
        frames: uint8 [h, w, 3] each; none of kind hdf5.
        actions: float32 [n, d].
        rows: what else is kept of every step, name -> [n, ...].
    """

    frames: list[np.ndarray]
    actions: np.ndarray
    rows: dict[str, np.ndarray]


def record_unit(unit: Unit, recording: Recording, staging: Path) -> tuple[int, int]:
    """Record a unit into `staging / unit.name`, which appears only when complete.

    Args:
        unit: which episodes.
        recording: its settings.
        staging: the folder of finished units.

    Returns:
        The numbers of episodes and frames.
    """
    part = staging / f".unit-{unit.name}-{os.getpid()}"
    try:
        part.mkdir()
        frames = _write_unit(part, unit, recording)
        os.replace(part, staging / unit.name)
    except OSError as error:
        raise OSError(
            f"{error}; what was finished is kept: solve this, then give the same command again"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return unit.count, frames


def _write_unit(folder: Path, unit: Unit, recording: Recording) -> int:
    """Writes the unit's files and returns the number of frames."""
    suite = recording.simulator
    jitter = recording.seed if recording.kind == "video" else None
    simulator = suite.make(unit.task, recording.height, recording.width, jitter)
    try:
        about = {"instruction": simulator.instruction}
        if recording.kind == "hdf5":
            about = suite.scene(simulator)
        (folder / ABOUT).write_text(json.dumps(about))
        demonstrations = _demonstrations(simulator, unit, recording)
        write = {"video": _write_videos, "robot": _write_robot, "hdf5": _write_rows}
        return write[recording.kind](folder, unit, recording, demonstrations)
    finally:
        simulator.close()


def _write_videos(
    folder: Path, unit: Unit, recording: Recording, demonstrations: Iterator[Performance]
) -> int:
    return sum(
        write_video(
            folder / f"{unit.task}-{unit.first + i:05d}.mp4", demonstration.frames, recording.fps
        )
        for i, demonstration in enumerate(demonstrations)
    )


def _write_robot(
    folder: Path, unit: Unit, recording: Recording, demonstrations: Iterator[Performance]
) -> int:
    rows = []

    def all_frames() -> Iterator[np.ndarray]:
        for demonstration in demonstrations:  # one at a time: a long unit must not fill the memory
            frames = demonstration.frames
            sample = np.linspace(0, len(frames) - 1, STATS_FRAMES).round().astype(int)
            rows.append((demonstration, frame_stats([frames[i] for i in sample])))
            yield from frames
            frames.clear()

    count = write_video(folder / "frames.mp4", all_frames(), recording.fps)
    for number, (demonstration, stats) in enumerate(rows):
        np.savez(
            _episode_file(folder, number),
            action=demonstration.actions,
            **demonstration.rows,
            **{f"frame_{name}": value for name, value in stats.items()},
        )
    return count


def _write_rows(
    folder: Path, unit: Unit, recording: Recording, demonstrations: Iterator[Performance]
) -> int:
    count = 0
    for number, demonstration in enumerate(demonstrations):
        np.savez(_episode_file(folder, number), actions=demonstration.actions, **demonstration.rows)
        count += len(demonstration.actions)
    return count


def _episode_file(folder: Path, number: int) -> Path:
    return folder / f"episode-{number:03d}.npz"


def _demonstrations(simulator: Any, unit: Unit, recording: Recording) -> Iterator[Performance]:
    for episode in range(unit.first, unit.first + unit.count):
        for attempt in range(episode * ATTEMPTS, (episode + 1) * ATTEMPTS):
            demonstration = _attempt(simulator, unit.task, attempt, recording)
            if demonstration is not None:
                yield demonstration
                break
        else:
            raise RuntimeError(
                f"the expert failed {ATTEMPTS} times in a row at {unit.task} with noise "
                f"{recording.noise}; use less noise"
            )


def _attempt(simulator: Any, task: str, attempt: int, recording: Recording) -> Performance | None:
    # A checksum, not hash(): the latter differs between processes.
    rng = np.random.default_rng([recording.seed, zlib.crc32(task.encode()), attempt])
    simulator.reset(int(rng.integers(2**31)))
    suite, stride = recording.simulator, recording.stride
    frames, actions, rows = [], [], []
    remaining = None
    for step in range(simulator.max_steps):
        if recording.kind == "hdf5":
            rows.append(suite.row(simulator))
        else:
            rows.append({"state": suite.state(simulator)})
            if step % stride == 0:
                frames.append(simulator.render())
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


# Worker processes for recording: they end with their parent, and at Ctrl-C without a sound.


@contextmanager
def worker_pool(workers: int) -> Iterator[Callable[..., set[Future]]]:
    """Yield `submit(function, items, *rest)` -> one future per item, run by spawned processes.

    Leaving the block early, by any error or Ctrl-C, ends the workers at once.
    """
    executor = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare_worker
    )

    def submit(function: Callable, items: list, *rest: object) -> set[Future]:
        with _children_ignore_interrupts():
            return {executor.submit(function, item, *rest) for item in items}

    try:
        yield submit
        executor.shutdown()
    except BaseException as error:
        for process in multiprocessing.active_children():
            process.terminate()
        executor.shutdown(wait=False, cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise RuntimeError(
                "a recording process was killed from outside (out of memory?); give the same "
                "command again to go on, with fewer workers if memory is short"
            ) from error
        raise


@contextmanager
def _children_ignore_interrupts() -> Iterator[None]:
    # A terminal sends Ctrl-C to all processes; the parent alone should answer. What is ignored when
    # a process starts stays ignored in it, so this holds even while the child is still importing.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _prepare_worker() -> None:
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ["LP_NUM_THREADS"] = "1"  # software OpenGL: one thread per process is fastest
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # returns when the parent is gone, however it ended
    os._exit(1)


# Put the finished units of a recording together as a dataset.


def assemble(out: Path, staging: Path, recording: Recording, units: list[Unit]) -> dict:
    """Write the dataset from its units; safe to stop and to repeat.

    Returns:
        {"episodes", "frames", "fps"}.
    """
    frames = _ASSEMBLE[recording.kind](out, staging, recording, units)
    return {
        "episodes": recording.episodes * len(recording.tasks),
        "frames": frames,
        "fps": recording.fps,
    }


def _assemble_robot(out: Path, staging: Path, recording: Recording, units: list[Unit]) -> int:
    suite = recording.simulator
    episodes = [
        episode for unit in units for episode in _robot_episodes(staging / unit.name, suite.camera)
    ]
    write_lerobot(
        out,
        episodes,
        fps=recording.fps,
        robot_type=suite.embodiment,
        frame_size=(recording.height, recording.width),
    )
    return sum(len(episode.vectors["action"]) for episode in episodes)


def _robot_episodes(folder: Path, camera: str) -> list[RobotEpisode]:
    instruction = _about(folder)["instruction"]
    episodes, first_frame = [], 0
    for path in sorted(folder.glob("episode-*.npz")):
        with np.load(path) as arrays:
            stats = {k.removeprefix("frame_"): arrays[k] for k in arrays if k.startswith("frame_")}
            vectors = {"action": arrays["action"], "observation.state": arrays["state"]}
        video = VideoPart(folder / "frames.mp4", first_frame, stats)
        episodes.append(RobotEpisode(instruction, vectors, {camera: video}))
        first_frame += len(vectors["action"])
    return episodes


def _assemble_videos(out: Path, staging: Path, recording: Recording, units: list[Unit]) -> int:
    videos = {
        path.stem: (path, _about(staging / unit.name)["instruction"])
        for unit in units
        for path in sorted((staging / unit.name).glob("*.mp4"))
    }
    write_video_folder(out, videos)
    return sum(len(VideoFile(path)) for path, _ in videos.values())


def _assemble_hdf5(out: Path, staging: Path, recording: Recording, units: list[Unit]) -> int:
    """One file per task, as LIBERO has them."""
    frames = 0
    for task in recording.tasks:
        folders = [staging / unit.name for unit in units if unit.task == task]
        about = _about(folders[0])
        name = about.pop("name")
        scene = Scene(**about, control_freq=recording.fps)
        write_hdf5(out / f"{name}_demo.hdf5", _assembled(folders), scene)
        for path in (path for folder in folders for path in folder.glob("episode-*.npz")):
            with np.load(path) as arrays:
                frames += len(arrays["actions"])
    return frames


def _assembled(folders: list[Path]) -> Iterator[Demonstration]:
    for path in (path for folder in folders for path in sorted(folder.glob("episode-*.npz"))):
        with np.load(path) as arrays:
            seen = {k.removeprefix("obs/"): arrays[k] for k in arrays if k.startswith("obs/")}
            named = {k: arrays[k] for k in ("actions", "states", "robot_states")}
            yield Demonstration(observations=seen, **named)


def _about(folder: Path) -> dict[str, str]:
    return json.loads((folder / ABOUT).read_text())


_ASSEMBLE = {"robot": _assemble_robot, "video": _assemble_videos, "hdf5": _assemble_hdf5}


def record_dataset(
    out: Path, recording: Recording, workers: int = 2, progress: bool = True
) -> dict:
    """Record a dataset, or go on with one that was stopped, or leave a finished one alone.

    Args:
        out: the dataset's folder.
        recording: what to record.
        workers: processes; one per core is best.
        progress: show a bar with the time left on stderr.

    Returns:
        {"episodes", "frames", "seconds"}: of the whole dataset, and spent by this call.

    Raises:
        ValueError: if the folder holds another recording or other files.
        OSError: if the folder cannot be written or the disk is full.
        RuntimeError: if no OpenGL is found, or an expert keeps failing.
    """
    out = Path(out)
    began = time.monotonic()
    staging = _open_folder(out, recording)
    if not (out / MANIFEST).exists():
        units = recording.units()
        todo = [unit for unit in units if not (staging / unit.name).is_dir()]
        _record_units(todo, recording, staging, workers, progress)
        totals = assemble(out, staging, recording, units)
        _write_json(out / MANIFEST, {"recording": asdict(recording), **totals})
    shutil.rmtree(staging, ignore_errors=True)
    manifest = json.loads((out / MANIFEST).read_text())
    return {
        "episodes": manifest["episodes"],
        "frames": manifest["frames"],
        "seconds": time.monotonic() - began,
    }


def _open_folder(out: Path, recording: Recording) -> Path:
    """The folder for finished units; refuses one that holds something else."""
    staging = out / UNFINISHED
    settings = json.loads(json.dumps(asdict(recording)))
    for manifest in (out / MANIFEST, staging / MANIFEST):
        if manifest.exists():
            found = json.loads(manifest.read_text())["recording"]
            found.setdefault("suite", "metaworld")  # older recordings knew no other
            differ = [f"{k}={found.get(k)!r} (now {settings[k]!r})" for k in settings]
            differ = [d for k, d in zip(settings, differ) if found.get(k) != settings[k]]
            if differ:
                raise ValueError(
                    f"{out} holds a recording with {', '.join(differ)}; give the same settings to "
                    "go on with it, or another folder"
                )
            break
    else:
        if out.exists() and any(p.name != UNFINISHED for p in out.iterdir()):
            raise ValueError(f"{out} holds other files; record into a new or an empty folder")
        try:
            staging.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot make the folder {out}: {error.strerror}") from error
        _write_json(staging / MANIFEST, {"recording": settings})
    if staging.exists():
        for leftover in staging.glob(".unit-*"):  # units that were being recorded when it stopped
            shutil.rmtree(leftover, ignore_errors=True)
    return staging


def _record_units(
    units: list[Unit], recording: Recording, staging: Path, workers: int, progress: bool
) -> None:
    if not units:
        return
    expected = sum(unit.count for unit in recording.units())
    done = expected - sum(unit.count for unit in units)
    bar = tqdm(
        total=expected, initial=done, unit="episode", disable=not progress, desc=str(staging.parent)
    )
    frames, began = 0, time.monotonic()
    with bar, worker_pool(min(workers, len(units))) as submit:
        waiting: set[Future] = submit(record_unit, units, recording, staging)
        while waiting:
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in finished:
                count, new_frames = future.result()
                frames += new_frames
                bar.set_postfix_str(f"{frames / (time.monotonic() - began):.0f} frames/s", False)
                bar.update(count)


def _write_json(path: Path, content: dict) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(part, path)


def main() -> None:
    """Entry point of `python -m mvjax.evaluation.record`."""
    parser = argparse.ArgumentParser(
        prog="mvjax.evaluation.record",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="the dataset's folder")
    parser.add_argument("--suite", choices=tuple(SUITES), default="metaworld", help="simulator")
    parser.add_argument("--kind", choices=("robot", "video", "hdf5"), required=True, help="format")
    parser.add_argument("--tasks", required=True, help="comma-separated, e.g. drawer-open-v3")
    parser.add_argument("--episodes", type=int, required=True, help="per task")
    parser.add_argument("--workers", type=int, default=2, help="simulator processes (2)")
    parser.add_argument("--noise", type=float, default=0.1, help="on executed actions, std (0.1)")
    parser.add_argument("--seed", type=int, default=0, help="decides every episode (0)")
    parser.add_argument("--size", help="of the pictures, e.g. 128x128: height x width, pixels")
    args = parser.parse_args()
    try:
        if args.suite == "libero":
            in_libero_python("mvjax.evaluation.record")
        tasks = tuple(args.tasks.split(","))
        height, width = picture_size(args.size) or SUITES[args.suite].size
        recording = Recording(
            args.kind,
            tasks,
            args.episodes,
            args.noise,
            args.seed,
            height=height,
            width=width,
            suite=args.suite,
        )
        result = record_dataset(args.out, recording, args.workers)
    except KeyboardInterrupt:
        print(f"\nstopped; give the same command again to go on with {args.out}", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"recording failed: {error}", file=sys.stderr)
        sys.exit(2)
    print("{episodes} episodes, {frames} frames, {seconds:.0f} s".format(**result))


if __name__ == "__main__":
    main()
