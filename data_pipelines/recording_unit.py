"""Record a unit: a few successful episodes of one task, saved together or not at all."""

import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.recording import Recording, Unit
from data_pipelines.video import write_video
from data_pipelines.writers.lerobot_stats import frame_stats
from mvjax.evaluation.suites.metaworld import MetaWorld

AFTER_SUCCESS = 12  # control steps that follow the first success
ATTEMPTS = 20  # per episode; the experts fail 2 % of the time, 30 % on the worst task
STATS_FRAMES = 8  # frames per episode that enter the dataset's statistics


@dataclass(frozen=True)
class Demonstration:
    """One success: frames uint8 [h, w, 3] each, actions and states float32 [n, 4], at 80 Hz."""

    frames: list[np.ndarray]
    actions: np.ndarray
    states: np.ndarray


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
    demonstrations = _demonstrations(unit, recording)
    if recording.kind == "video":
        return sum(
            write_video(
                folder / f"{unit.task}-{unit.first + i:05d}.mp4",
                demonstration.frames,
                recording.fps,
            )
            for i, demonstration in enumerate(demonstrations)
        )
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
            folder / f"episode-{number:03d}.npz",
            action=demonstration.actions,
            state=demonstration.states,
            **{f"frame_{name}": value for name, value in stats.items()},
        )
    return count


def _demonstrations(unit: Unit, recording: Recording) -> Iterator[Demonstration]:
    jitter = recording.seed if recording.kind == "video" else None
    simulator = MetaWorld(unit.task, recording.height, recording.width, camera_jitter_seed=jitter)
    try:
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
    finally:
        simulator.close()


def _attempt(
    simulator: MetaWorld, task: str, attempt: int, recording: Recording
) -> Demonstration | None:
    # A checksum, not hash(): the latter differs between processes.
    rng = np.random.default_rng([recording.seed, zlib.crc32(task.encode()), attempt])
    simulator.reset(int(rng.integers(2**31)))
    stride = recording.stride
    frames, actions, states = [], [], []
    remaining = None
    for step in range(simulator.max_steps):
        if step % stride == 0:
            frames.append(simulator.render())
        action = simulator.expert_action()
        actions.append(action)
        states.append(simulator.proprio())
        noise = rng.normal(0.0, recording.noise, action.shape)
        success = simulator.step(np.clip(action + noise, -1.0, 1.0))
        if remaining is None and success:
            remaining = AFTER_SUCCESS
        elif remaining is not None:
            remaining -= 1
        if remaining == 0:
            return Demonstration(frames, np.stack(actions), np.stack(states))
    return None
