"""Put the finished units of a recording together as a dataset."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_pipelines.recording.plan import Recording, Unit
from data_pipelines.recording.unit import ABOUT
from data_pipelines.video import VideoFile
from data_pipelines.writers.hdf5 import Demonstration, Scene, write_hdf5
from data_pipelines.writers.lerobot import RobotEpisode, VideoPart, write_lerobot
from data_pipelines.writers.video_folder import write_video_folder


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
        write_hdf5(out / f"{name}_demo.hdf5", _demonstrations(folders), scene)
        for path in (path for folder in folders for path in folder.glob("episode-*.npz")):
            with np.load(path) as arrays:
                frames += len(arrays["actions"])
    return frames


def _demonstrations(folders: list[Path]) -> Iterator[Demonstration]:
    for path in (path for folder in folders for path in sorted(folder.glob("episode-*.npz"))):
        with np.load(path) as arrays:
            seen = {k.removeprefix("obs/"): arrays[k] for k in arrays if k.startswith("obs/")}
            named = {k: arrays[k] for k in ("actions", "states", "robot_states")}
            yield Demonstration(observations=seen, **named)


def _about(folder: Path) -> dict[str, str]:
    return json.loads((folder / ABOUT).read_text())


_ASSEMBLE = {"robot": _assemble_robot, "video": _assemble_videos, "hdf5": _assemble_hdf5}
