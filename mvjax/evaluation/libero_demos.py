r"""Play LIBERO's demonstrations again, as mimic-video's release prepares them.

    python -m mvjax.evaluation.libero_demos --source datasets/libero_spatial \
        --out data/libero_spatial_regenerated

Every demonstration of the HDF5 files (`<task>_demo.hdf5`) is replayed in the simulator from its
first state, after ten steps of holding still; actions that do nothing are dropped, and only what
ends in success is kept. Pictures of both cameras are drawn at 480x640 and turned by 180 degrees.
The dataset is LeRobot v3.0, 20 Hz; instructions are worded as the release's. `regenerated.json`
says what became of every demonstration. Needs `bash launch/libero.sh`; a command that was stopped
goes on where it was. About 20 seconds per demonstration and core.
"""

import argparse
import functools
import json
import os
import shutil
import sys
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from data_pipelines.sources.files import UNFINISHED
from data_pipelines.video import write_video
from data_pipelines.writers import RobotEpisode, VideoPart, frame_stats, write_lerobot
from mvjax.evaluation.record import picture_size, state, worker_pool
from mvjax.evaluation.suites.libero import (
    CAMERA,
    SETTLING_STEPS,
    STAY,
    WRIST_CAMERA,
    Libero,
    in_libero_python,
)

FPS = 20
STILL = 1e-4  # norm of the six numbers of a motion below which it is none
CAMERAS = {"observation.images.agentview": CAMERA, "observation.images.wrist": WRIST_CAMERA}
REPORT = "regenerated.json"
STATS_FRAMES = 8  # frames per episode that enter the dataset's statistics


@dataclass(frozen=True)
class Demo:
    """A demonstration of a file."""

    file: Path
    key: str

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"{self.file.stem}-{self.key}"


@dataclass(frozen=True)
class Replay:
    """A demonstration played again: rows before each action, or no rows where it failed."""

    success: bool
    actions: np.ndarray
    states: np.ndarray
    frames: dict[str, list[np.ndarray]]


def moving_actions(actions: np.ndarray) -> np.ndarray:
    """The rows of actions [n, 7] that move the hand or change what the gripper does.

    The first is compared with nothing: it is kept if it moves. As the release does it, a gripper
    command is compared with that of the last action that was kept.
    """
    kept: list[np.ndarray] = []
    for action in actions:
        moves = np.linalg.norm(action[:6]) >= STILL
        if moves or (kept and action[6] != kept[-1][6]):
            kept.append(action)
    return np.array(kept, actions.dtype).reshape(-1, actions.shape[1])


def replay(simulator: Libero, first_state: np.ndarray, actions: np.ndarray) -> Replay:
    """Plays actions [n, 7] from a flattened simulator state, with pictures.

    Returns:
        What was seen before each action; `success` says whether the last one solved the task.
    """
    simulator.restart(first_state)
    for _ in range(SETTLING_STEPS):
        simulator.step(STAY)
    frames: dict[str, list[np.ndarray]] = {feature: [] for feature in CAMERAS}
    states, success = [], False
    for action in actions:
        states.append(state(simulator))
        for feature, camera in CAMERAS.items():
            frames[feature].append(simulator.render(camera))
        success = simulator.step(action)
    return Replay(success, actions.astype(np.float32), np.array(states, np.float32), frames)


def regenerate(source: Path, out: Path, workers: int = 2, size: tuple[int, int] = (480, 640)):
    """Regenerates a file or a folder of files; goes on with what was stopped.

    Args:
        source: an HDF5 file, or a folder that holds some.
        out: the dataset's folder.
        workers: processes; one per core is best.
        size: of the pictures, (height, width) in pixels.

    Returns:
        {"kept", "failed"}: numbers of demonstrations.

    Raises:
        ValueError: there are no demonstrations, none succeeded, or a file is of no known task.
    """
    demos = _demonstrations(Path(source))
    staging = out / UNFINISHED
    staging.mkdir(parents=True, exist_ok=True)
    for leftover in staging.glob(".*"):  # what was being played when it was stopped
        shutil.rmtree(leftover, ignore_errors=True)
    left = [demo for demo in demos if not (staging / demo.name).is_dir()]
    with tqdm(total=len(demos), initial=len(demos) - len(left), unit="episode") as bar:
        if left and not (out / REPORT).exists():
            with worker_pool(min(workers, len(left))) as submit:
                for future in as_completed(submit(_regenerate_one, left, staging, size)):
                    future.result()
                    bar.update()
    if not (out / REPORT).exists():
        _assemble(out, staging, demos, size)
    shutil.rmtree(staging, ignore_errors=True)
    report = json.loads((out / REPORT).read_text())
    kept = sum(row["success"] for row in report)
    return {"kept": kept, "failed": len(report) - kept}


def _demonstrations(source: Path) -> list[Demo]:
    files = [source] if source.is_file() else sorted(source.rglob("*.hdf5"))
    demos = []
    for file in files:
        with h5py.File(file) as data:
            keys = sorted(data["data"], key=lambda key: int(key.removeprefix("demo_")))
        demos += [Demo(file, key) for key in keys]
    if not demos:
        raise ValueError(f"{source} holds no LIBERO demonstrations (<task>_demo.hdf5)")
    return demos


def _regenerate_one(demo: Demo, staging: Path, size: tuple[int, int]) -> None:
    simulator = _simulator(demo.file.stem.removesuffix("_demo"), size)
    with h5py.File(demo.file) as data:
        group = data["data"][demo.key]
        first_state, actions = group["states"][0], moving_actions(group["actions"][()])
    played = replay(simulator, first_state, actions)
    part = staging / f".{demo.name}-{os.getpid()}"
    part.mkdir()
    about = {"demonstration": demo.name, "success": played.success, "steps": len(actions)}
    if played.success:
        arrays = {"action": played.actions, "state": played.states}
        for feature, frames in played.frames.items():
            write_video(part / f"{feature}.mp4", frames, FPS)
            sample = np.linspace(0, len(frames) - 1, STATS_FRAMES).round().astype(int)
            stats = frame_stats([frames[i] for i in sample])
            arrays |= {f"{feature}/{name}": value for name, value in stats.items()}
        np.savez(part / "episode.npz", **arrays)
    (part / "about.json").write_text(
        json.dumps(about | {"instruction": simulator.instruction + "."})
    )
    os.replace(part, staging / demo.name)


@functools.lru_cache(maxsize=1)  # a process stays on a task where it can: building takes seconds
def _simulator(name: str, size: tuple[int, int]) -> Libero:
    from mvjax.evaluation.suites.libero_scene import find_task

    return Libero(find_task(name), *size)


def _assemble(out: Path, staging: Path, demos: list[Demo], size: tuple[int, int]) -> None:
    report = [json.loads((staging / demo.name / "about.json").read_text()) for demo in demos]
    episodes = [
        _episode(staging / row["demonstration"], row["instruction"])
        for row in report
        if row["success"]
    ]
    if not episodes:
        raise ValueError(f"none of the {len(demos)} demonstrations ended in success when replayed")
    write_lerobot(out, episodes, fps=FPS, robot_type="libero_panda", frame_size=size)
    part = out / f".{REPORT}.part"
    part.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(part, out / REPORT)


def _episode(folder: Path, instruction: str) -> RobotEpisode:
    with np.load(folder / "episode.npz") as arrays:
        vectors = {"action": arrays["action"], "observation.state": arrays["state"]}
        videos = {}
        for feature in CAMERAS:
            names = [name for name in arrays if name.startswith(f"{feature}/")]
            stats = {name.rpartition("/")[2]: arrays[name] for name in names}
            videos[feature] = VideoPart(folder / f"{feature}.mp4", 0, stats)
    return RobotEpisode(instruction, vectors, videos)


def main() -> None:
    """Entry point of `python -m mvjax.evaluation.libero_demos`."""
    parser = argparse.ArgumentParser(
        prog="mvjax.evaluation.libero_demos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--source", type=Path, required=True, help="folder of LIBERO's .hdf5")
    parser.add_argument("--out", type=Path, required=True, help="the dataset's folder")
    parser.add_argument("--workers", type=int, default=2, help="simulator processes (2)")
    parser.add_argument("--size", default="480x640", help="of the pictures: height x width, pixels")
    args = parser.parse_args()
    try:
        in_libero_python("mvjax.evaluation.libero_demos")
        result = regenerate(args.source, args.out, args.workers, picture_size(args.size))
    except KeyboardInterrupt:
        print(f"\nstopped; give the same command again to go on with {args.out}", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, RuntimeError, ModuleNotFoundError) as error:
        print(f"regeneration failed: {error}", file=sys.stderr)
        sys.exit(2)
    print("{kept} demonstrations kept, {failed} failed when replayed".format(**result))


if __name__ == "__main__":
    main()
