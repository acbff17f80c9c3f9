"""The simulators in which demonstrations are recorded, and what they give at every control step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipelines.recording import libero
from mvjax.evaluation.suites.libero_tasks import split_task
from mvjax.evaluation.suites.metaworld import TASKS, MetaWorld


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
        make=libero.make,
        check=split_task,
        kinds=("robot", "hdf5"),
        control_hz=20,
        size=(480, 640),
        embodiment="libero_panda",
        camera="observation.images.agentview",
        state=libero.state,
        row=libero.row,
        scene=libero.scene,
    ),
}
