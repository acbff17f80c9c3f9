"""Replays LIBERO's demonstrations, as mimic-video's release prepares them.

Every demonstration of the HDF5 files (`<task>_demo.hdf5`) is replayed in the simulator from its
first state, after ten steps of holding still; actions without an effect are dropped, and only
successful episodes are kept. Both cameras are rendered at 480x640 and turned by 180 degrees. The
dataset is LeRobot v3.0 at 20 Hz, with the instructions of the release; `regenerated.json` reports
the result of every demonstration. `launch.record --regenerate` runs this in LIBERO's Python.
"""

import functools
import hashlib
import json
import shutil
from collections.abc import Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data_pipelines.atomic import replacing, write_json
from data_pipelines.progress import Bar
from data_pipelines.settings import differences
from data_pipelines.sources.files import UNFINISHED
from data_pipelines.video import write_video
from data_pipelines.writers import RobotEpisode, VideoPart, write_lerobot
from mvjax.evaluation.record import ABOUT, feature_of, sampled_stats
from mvjax.evaluation.suites.libero import CAMERAS, SETTLING_STEPS, STAY, Libero
from mvjax.evaluation.suites.libero_scene import find_task
from mvjax.evaluation.worker_pool import worker_pool

STILL = 1e-4  # the smallest norm of a motion's six numbers that counts as moving
REPORT = "regenerated.json"
SOURCE = "source.json"  # the demonstrations that are replayed, and the size of their pictures


@dataclass(frozen=True)
class Demo:
    """A demonstration of an HDF5 file."""

    file: Path
    key: str

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.file.stem}-{self.key}"


def regenerate(
    source: Path, out: Path, workers: int = 2, size: tuple[int, int] = (480, 640)
) -> dict[str, int]:
    """Regenerates an HDF5 file or a folder of them, or resumes what was stopped.

    Args:
        source: the file or folder.
        out: the dataset's folder.
        workers: processes; one per core is best.
        size: height and width of the pictures in pixels.

    Returns:
        {"kept", "failed"}: numbers of demonstrations.

    Raises:
        ValueError: the folder holds the replay of other demonstrations, or of another size.
    """
    staging, demos = out / UNFINISHED, _demonstrations(source)
    replayed = _open_folder(out, staging, demos, size)
    if not (out / REPORT).exists():
        left = [demo for demo in demos if not (staging / demo.name).is_dir()]
        with Bar(total=len(demos), initial=len(demos) - len(left), unit="episode") as bar:
            if left:
                with worker_pool(min(workers, len(left))) as submit:
                    for future in as_completed(submit(_regenerate_one, left, staging, size)):
                        future.result()
                        bar.update()
        write_json(out / SOURCE, replayed)
        _assemble(out, staging, demos, size)
    shutil.rmtree(staging, ignore_errors=True)
    report = json.loads((out / REPORT).read_text())
    kept = sum(row["success"] for row in report)
    return {"kept": kept, "failed": len(report) - kept}


def moving_actions(actions: np.ndarray) -> np.ndarray:
    """Returns the rows of actions [n, 7] that move the hand or change the gripper command."""
    kept: list[np.ndarray] = []
    for action in actions:
        moves = np.linalg.norm(action[:6]) >= STILL
        # As in the release: the command is compared with that of the last action that was kept.
        if moves or (kept and action[6] != kept[-1][6]):
            kept.append(action)
    return np.array(kept, actions.dtype).reshape(-1, actions.shape[1])


def _demonstrations(source: Path) -> list[Demo]:
    files = [source] if source.is_file() else sorted(source.rglob("*.hdf5"))
    by_task: dict[str, Path] = {}
    for file in files:
        if (other := by_task.setdefault(file.stem, file)) != file:
            raise ValueError(
                f"{other} and {file} hold the same task: give the folder of one of them"
            )
    demos = []
    for file in files:
        with h5py.File(file) as data:
            keys = sorted(data["data"], key=lambda key: int(key.removeprefix("demo_")))
        demos += [Demo(file, key) for key in keys]
    if not demos:
        raise ValueError(f"{source} holds no LIBERO demonstrations (<task>_demo.hdf5)")
    return demos


def _open_folder(
    out: Path, staging: Path, demos: Sequence[Demo], size: tuple[int, int]
) -> dict[str, Any]:
    """Prepares the folder, which must not be that of other demonstrations; what it is of."""
    digests: dict[str, Any] = {}
    for demo in demos:
        digest = digests.setdefault(demo.file.stem, hashlib.sha256())
        with h5py.File(demo.file) as data:
            for name in ("states", "actions"):
                digest.update(
                    f"{demo.key}/{name} ".encode() + data["data"][demo.key][name][()].tobytes()
                )
    replayed = {"size": list(size), "files": {k: d.hexdigest()[:16] for k, d in digests.items()}}
    for path in (out / SOURCE, staging / SOURCE):
        if path.exists() and (changed := differences(json.loads(path.read_text()), replayed)):
            raise ValueError(
                f"{out} holds the replay of other demonstrations ({'; '.join(changed[:3])}): use "
                "the same demonstrations, or choose another folder"
            )
    if not (out / REPORT).exists():
        write_json(staging / SOURCE, replayed)
    return replayed


def _regenerate_one(demo: Demo, staging: Path, size: tuple[int, int]) -> None:
    simulator = _simulator(demo.file.stem.removesuffix("_demo"), size)
    with h5py.File(demo.file) as data:
        group = data["data"][demo.key]
        first_state, actions = group["states"][0], moving_actions(group["actions"][()])
    simulator.restart(first_state)
    for _ in range(SETTLING_STEPS):
        simulator.step(STAY)
    frames: dict[str, list[np.ndarray]] = {feature_of(camera): [] for camera in CAMERAS}
    states, success = [], False
    for action in actions:
        states.append(simulator.lerobot_state())
        for camera in CAMERAS:
            frames[feature_of(camera)].append(simulator.render(camera))
        success = simulator.step(action)  # the last action decides
    about = {
        "demonstration": demo.name,
        "success": success,
        "steps": len(actions),
        "instruction": simulator.instruction + ".",
    }
    with replacing(staging / demo.name) as folder:
        folder.mkdir()
        if success:
            arrays = {"action": actions.astype(np.float32), "state": np.array(states, np.float32)}
            for feature, pictures in frames.items():
                write_video(folder / f"{feature}.mp4", pictures, Libero.control_hz)
                stats = sampled_stats(pictures)
                arrays |= {f"{feature}/{name}": value for name, value in stats.items()}
            np.savez(folder / "episode.npz", **arrays)
        (folder / ABOUT).write_text(json.dumps(about))


@functools.lru_cache(maxsize=1)  # building takes seconds, and demonstrations come by task
def _simulator(name: str, size: tuple[int, int]) -> Libero:
    return Libero(find_task(name), *size)


def _assemble(out: Path, staging: Path, demos: list[Demo], size: tuple[int, int]) -> None:
    report = [json.loads((staging / demo.name / ABOUT).read_text()) for demo in demos]
    episodes = [
        _episode(staging / row["demonstration"], row["instruction"])
        for row in report
        if row["success"]
    ]
    if not episodes:
        raise ValueError(f"none of the {len(demos)} demonstrations ended in success when replayed")
    write_lerobot(out, episodes, fps=Libero.control_hz, robot_type="libero_panda", frame_size=size)
    write_json(out / REPORT, report)


def _episode(folder: Path, instruction: str) -> RobotEpisode:
    with np.load(folder / "episode.npz") as arrays:
        vectors = {"action": arrays["action"], "observation.state": arrays["state"]}
        videos = {}
        for feature in map(feature_of, CAMERAS):
            names = [name for name in arrays if name.startswith(f"{feature}/")]
            stats = {name.rpartition("/")[2]: arrays[name] for name in names}
            videos[feature] = VideoPart(folder / f"{feature}.mp4", 0, stats)
    return RobotEpisode(instruction, vectors, videos)
