"""A simulator that starts at once: a block on a rail, to be pushed to its right end."""

import os
import time
from collections.abc import Sequence

import numpy as np

GOAL = 1.0


class Rail:
    """Follows `mvjax.evaluation.suites.suite.Simulator`; needs numpy alone.

    Args:
        task: becomes the instruction.
        pause: seconds that a control step takes.
    """

    control_hz, max_steps, action_dim = 80, 100, 4

    def __init__(self, task: str, pause: float = 0.0) -> None:
        self.instruction, self._pause, self._at = task, pause, 0.0

    def reset(self, seed: int) -> None:
        self._at = np.random.default_rng(seed).uniform(0, 0.5)

    def step(self, action: np.ndarray) -> bool:
        time.sleep(self._pause)
        self._at += 0.02 * float(np.clip(action[0], -1, 1))
        return self._at >= GOAL

    def render(self, camera: str) -> np.ndarray:
        """White in the pictures of "corner", red in the smaller ones of "gripper"."""
        picture = np.zeros((32, 32, 3), np.uint8)
        picture[12:20, int(np.clip(self._at, 0, 1) * 28) :][:, :4] = 255
        return {"corner": picture, "gripper": picture[8:24] * np.array([1, 0, 0], np.uint8)}[camera]

    def proprio(self) -> np.ndarray:
        return np.array([self._at, 0, 0, 0], np.float32)

    def expert_action(self) -> np.ndarray:
        return np.array([1, 0, 0, 0], np.float32)

    def lookahead(self, steps: int, stride: int, cameras: Sequence[str]) -> dict[str, np.ndarray]:
        return {camera: np.stack([self.render(camera)] * (steps // stride)) for camera in cameras}

    def close(self) -> None:
        pass


class Fragile(Rail):
    """Its process dies at seed 7; at seed 8 it raises."""

    def reset(self, seed: int) -> None:
        if seed == 7:
            os._exit(3)
        if seed == 8:
            raise RuntimeError("the block fell off")
        super().reset(seed)
