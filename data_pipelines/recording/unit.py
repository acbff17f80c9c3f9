"""Record a unit: a few successful episodes of one task, saved together or not at all."""

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.recording.plan import Recording, Unit
from data_pipelines.video import write_video
from data_pipelines.writers.lerobot_stats import frame_stats

ABOUT = "about.json"  # of a unit: the instruction, and for HDF5 the scene
AFTER_SUCCESS = 12  # control steps that follow the first success
ATTEMPTS = 20  # per episode; the experts fail 2 % of the time, 30 % on the worst task
STATS_FRAMES = 8  # frames per episode that enter the dataset's statistics


@dataclass(frozen=True)
class Demonstration:
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
    folder: Path, unit: Unit, recording: Recording, demonstrations: Iterator[Demonstration]
) -> int:
    return sum(
        write_video(
            folder / f"{unit.task}-{unit.first + i:05d}.mp4", demonstration.frames, recording.fps
        )
        for i, demonstration in enumerate(demonstrations)
    )


def _write_robot(
    folder: Path, unit: Unit, recording: Recording, demonstrations: Iterator[Demonstration]
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
    folder: Path, unit: Unit, recording: Recording, demonstrations: Iterator[Demonstration]
) -> int:
    count = 0
    for number, demonstration in enumerate(demonstrations):
        np.savez(_episode_file(folder, number), actions=demonstration.actions, **demonstration.rows)
        count += len(demonstration.actions)
    return count


def _episode_file(folder: Path, number: int) -> Path:
    return folder / f"episode-{number:03d}.npz"


def _demonstrations(simulator: Any, unit: Unit, recording: Recording) -> Iterator[Demonstration]:
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


def _attempt(simulator: Any, task: str, attempt: int, recording: Recording) -> Demonstration | None:
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
            return Demonstration(frames, np.stack(actions), kept)
    return None
