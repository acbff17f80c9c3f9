"""A small LeRobot v3.0 dataset of an arm that one can see, and a few videos of a hand.

    python tests/my_robot_dataset.py data/my_robot data/videos

The arm has five joints in degrees and a gripper (0 closed, 100 open), as an SO-101 has. Its picture
shows every joint, and the block that it reaches for, so a policy can learn from it. An action is
the next state: the absolute position of each joint that the leader arm commands.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_pipelines.video import write_video
from data_pipelines.writers import (
    RobotEpisode,
    VideoPart,
    frame_stats,
    write_lerobot,
    write_video_folder,
)

CAMERA = "observation.images.front"
FPS = 30
BLOCKS = {"red": (200, 40, 40), "blue": (40, 60, 200)}
HOME = np.array([0.0, 40.0, -60.0, 20.0, 0.0, 90.0])  # degrees; the gripper from 0 to 100


def write(
    path: Path, episodes: int = 12, seed: int = 0, seconds: float = 4.0, scale: int = 4
) -> None:
    """Writes the dataset; frames are 120x160 times `scale`."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        made = []
        for number in range(episodes):
            colour = ("red", "blue")[number % 2]
            states, block = motion(rng, colour, round(seconds * FPS))
            frames = [draw(state, block, scale) for state in states]
            video = Path(folder) / f"{number}.mp4"
            write_video(video, frames, FPS)
            part = VideoPart(video, 0, frame_stats(frames[:: len(frames) // 4]))
            vectors = {"observation.state": states, "action": np.roll(states, -1, 0)}
            vectors["action"][-1] = states[-1]
            made.append(RobotEpisode(f"pick up the {colour} block", vectors, {CAMERA: part}))
        size = (120 * scale, 160 * scale)
        write_lerobot(path, made, fps=FPS, robot_type="my_robot", frame_size=size)


def write_videos(path: Path, videos: int = 4, seed: int = 0, seconds: float = 4.0) -> None:
    """Writes captioned videos of a hand that moves a block, at 20 frames per second."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        made = {}
        for number in range(videos):
            colour = ("red", "blue")[number % 2]
            file = Path(folder) / f"{number}.mp4"
            write_video(file, hand(rng, BLOCKS[colour], round(seconds * 20)), 20)
            made[f"hand_{number}"] = (file, f"a hand moves the {colour} block")
        write_video_folder(path, made)


def motion(
    rng: np.random.Generator, colour: str, length: int
) -> tuple[np.ndarray, dict[str, float]]:
    """The states [length, 6] of one episode, and where each block lies, as a pan angle.

    The arm turns to the block, bends down, closes the gripper and lifts.
    """
    block = dict(red=rng.uniform(-60, -10), blue=rng.uniform(10, 60))
    start = HOME + rng.normal(0, 3, 6)
    above = HOME + np.array([block[colour], 0, 0, 0, 0, 0])
    down = above + np.array([0, -30, 25, 10, rng.uniform(-20, 20), 0])
    grasped, lifted = down.copy(), above.copy()
    grasped[4:], lifted[4:] = (down[4], 10), (down[4], 10)
    knots = np.array([start, above, down, grasped, lifted])
    at = np.linspace(0, len(knots) - 1, length)
    part = np.minimum(at.astype(int), len(knots) - 2)
    smooth = (1 - np.cos(np.pi * (at - part))) / 2  # the arm rests at every knot
    states = knots[part] + smooth[:, None] * (knots[part + 1] - knots[part])
    return (states + rng.normal(0, 0.1, states.shape)).astype(np.float32), block


def draw(state: np.ndarray, block: dict[str, float], scale: int = 4) -> np.ndarray:
    """uint8 [120 scale, 160 scale, 3]: the arm from the side on a base that slides with the pan."""
    y, x = np.mgrid[:120, :160]
    frame = np.full((120, 160, 3), 230, np.uint8)
    frame[100:] = (150, 120, 90)  # the table
    for colour, pan in block.items():
        frame[92:100, round(80 + pan) - 5 : round(80 + pan) + 5] = BLOCKS[colour]
    joint, angle = np.array([80.0 + state[0], 25.0]), 0.0
    for bend, length, grey in zip(state[1:4], (26, 24, 14), (40, 80, 120)):
        angle += np.deg2rad(bend)
        bone = length * np.array([np.sin(angle), np.cos(angle)])
        along = ((x - joint[0]) * bone[0] + (y - joint[1]) * bone[1]) / length**2
        along = np.clip(along, 0, 1)
        near = np.hypot(x - joint[0] - along * bone[0], y - joint[1] - along * bone[1])
        frame[near < 3] = grey
        joint = joint + bone
    for side in (-1, 1):  # the fingers, as far apart as the gripper is open; the wrist's roll tilts
        middle = joint[0] + side * (2 + state[5] / 12), joint[1] + 4 + side * state[4] / 8
        frame[(abs(x - middle[0]) < 2) & (abs(y - middle[1]) < 5)] = 0
    return np.repeat(np.repeat(frame, scale, 0), scale, 1)


def hand(rng: np.random.Generator, colour: tuple, length: int) -> Iterator[np.ndarray]:
    """Frames [120, 160, 3] of a round hand that pushes a block from one place to another."""
    y, x = np.mgrid[:120, :160]
    start, end = rng.uniform(30, 70), rng.uniform(90, 130)
    for place in np.linspace(start, end, length):
        frame = np.full((120, 160, 3), 215, np.uint8)
        frame[100:] = (120, 130, 110)
        frame[92:100, round(place) : round(place) + 10] = colour
        frame[np.hypot(x - place + 8, y - 90) < 10] = (220, 170, 140)
        yield frame


if __name__ == "__main__":
    robot, *videos = map(Path, sys.argv[1:])
    write(robot)
    for folder in videos:
        write_videos(folder)
