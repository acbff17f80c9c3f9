"""Write demonstrations in LIBERO's HDF5 layout, which robomimic and LIBERO train from.

data/                        attributes env_args, problem_info, num_demos, total, ...
data/demo_<i>/actions, states, robot_states, rewards, dones
data/demo_<i>/obs/<key>      pictures and proprioception
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

ROBOSUITE = 1  # the number of this kind of environment in robomimic
CONVENTIONS = ("opengl", "opencv")  # bottom row first, as LIBERO's own; top row first


@dataclass(frozen=True)
class Demonstration:
    """One successful attempt, T steps; a row holds an action and what was observed before it.

    Attributes:
        actions: [T, a].
        observations: LIBERO's names ("agentview_rgb", "ee_pos", ...) -> [T, ...]; pictures uint8
            [T, h, w, 3].
        states: flattened simulator states [T, s]; from the first one it can be replayed.
        robot_states: [T, r], where there are any.
        model_file: the simulator's XML, where it is to be replayed.
    """

    actions: np.ndarray
    observations: Mapping[str, np.ndarray]
    states: np.ndarray
    robot_states: np.ndarray | None = None
    model_file: str = ""

    def __post_init__(self):
        rows = {"states": self.states, **self.observations}
        if self.robot_states is not None:
            rows["robot_states"] = self.robot_states
        wrong = {key: len(array) for key, array in rows.items() if len(array) != len(self.actions)}
        if wrong or not len(self.actions):
            raise ValueError(
                f"a demonstration needs one value per action, got {len(self.actions)} actions and "
                f"values {wrong}"
            )


@dataclass(frozen=True)
class Scene:
    """What all demonstrations of a file have in common.

    Attributes:
        instruction: the task in words.
        env_name: the environment's class.
        problem_name: LIBERO's problem, such as "libero_tabletop_manipulation".
        bddl_file: the task's definition, relative to LIBERO's folder of them.
        control_freq: steps per second.
        image_convention: of `CONVENTIONS`.
        env_kwargs: further arguments of the environment, JSON values.
    """

    instruction: str
    env_name: str
    problem_name: str = ""
    bddl_file: str = ""
    control_freq: int = 20
    image_convention: str = "opengl"
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.image_convention not in CONVENTIONS:
            raise ValueError(
                f"image_convention is {self.image_convention!r}; choose from {CONVENTIONS}"
            )


def write_hdf5(path: Path, demonstrations: Iterable[Demonstration], scene: Scene) -> int:
    """Write a file, atomically; one demonstration is held at a time.

    Args:
        path: the file, by LIBERO's custom `<task>_demo.hdf5`; it appears only when complete.
        demonstrations: in order; become demo_0, demo_1, ...
        scene: what they have in common.

    Returns:
        The number of demonstrations.

    Raises:
        ValueError: for no demonstrations.
        OSError: if the folder cannot be written or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with h5py.File(part, "w") as file:
            data = file.create_group("data")
            _describe(data, scene)
            count = total = 0
            for demo in demonstrations:
                _write(data.create_group(f"demo_{count}"), demo)
                count += 1
                total += len(demo.actions)
            if count == 0:
                raise ValueError(f"{path}: no demonstrations were given to write")
            data.attrs["num_demos"], data.attrs["total"] = count, total
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return count


def _describe(data: h5py.Group, scene: Scene) -> None:
    env_args = {
        "type": ROBOSUITE,
        "env_name": scene.env_name,
        "problem_name": scene.problem_name,
        "bddl_file": scene.bddl_file,
        "env_kwargs": {**scene.env_kwargs, "control_freq": scene.control_freq},
    }
    problem_info = {
        "problem_name": scene.problem_name,
        "domain_name": "robosuite",
        "language_instruction": scene.instruction,
    }
    data.attrs["env_name"] = scene.env_name
    data.attrs["env_args"] = json.dumps(env_args)
    data.attrs["problem_info"] = json.dumps(problem_info)
    data.attrs["bddl_file_name"] = scene.bddl_file
    data.attrs["macros_image_convention"] = scene.image_convention


def _write(group: h5py.Group, demo: Demonstration) -> None:
    last = np.zeros(len(demo.actions), np.uint8)
    last[-1] = 1
    arrays = {"actions": demo.actions, "states": demo.states, "rewards": last, "dones": last}
    if demo.robot_states is not None:
        arrays["robot_states"] = demo.robot_states
    arrays |= {f"obs/{key}": array for key, array in demo.observations.items()}
    for key, array in arrays.items():
        group.create_dataset(key, data=array)
    group.attrs["num_samples"] = len(demo.actions)
    group.attrs["init_state"] = demo.states[0]
    group.attrs["model_file"] = demo.model_file
