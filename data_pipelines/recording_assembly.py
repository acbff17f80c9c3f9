"""Put the finished units of a recording together as a dataset."""

from pathlib import Path

import numpy as np

from data_pipelines.recording import Recording, Unit
from data_pipelines.video import VideoFile
from data_pipelines.writers.lerobot import RobotEpisode, VideoPart, write_lerobot
from data_pipelines.writers.video_folder import write_video_folder
from mvjax.evaluation.suites.metaworld import TASKS

CAMERA_KEY = "observation.images.corner"
EMBODIMENT = "metaworld_sawyer"


def assemble(out: Path, staging: Path, recording: Recording, units: list[Unit]) -> dict:
    """Write the dataset from its units; safe to stop and to repeat.

    Returns:
        {"episodes", "frames", "fps"}.
    """
    if recording.kind == "robot":
        episodes = [
            episode
            for unit in units
            for episode in _robot_episodes(staging, unit, TASKS[unit.task])
        ]
        size = (recording.height, recording.width)
        write_lerobot(out, episodes, fps=recording.fps, robot_type=EMBODIMENT, frame_size=size)
        frames = sum(len(episode.vectors["action"]) for episode in episodes)
    else:
        videos = {
            path.stem: (path, TASKS[unit.task])
            for unit in units
            for path in sorted((staging / unit.name).glob("*.mp4"))
        }
        write_video_folder(out, videos)
        frames = sum(len(VideoFile(path)) for path, _ in videos.values())
    return {
        "episodes": recording.episodes * len(recording.tasks),
        "frames": frames,
        "fps": recording.fps,
    }


def _robot_episodes(staging: Path, unit: Unit, instruction: str) -> list[RobotEpisode]:
    folder = staging / unit.name
    episodes, first_frame = [], 0
    for path in sorted(folder.glob("episode-*.npz")):
        with np.load(path) as arrays:
            stats = {k.removeprefix("frame_"): arrays[k] for k in arrays if k.startswith("frame_")}
            vectors = {"action": arrays["action"], "observation.state": arrays["state"]}
        video = VideoPart(folder / "frames.mp4", first_frame, stats)
        episodes.append(RobotEpisode(instruction, vectors, {CAMERA_KEY: video}))
        first_frame += len(vectors["action"])
    return episodes
