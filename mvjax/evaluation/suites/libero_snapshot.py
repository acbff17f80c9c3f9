"""A robosuite episode as it stands, to come back to after a look into the future."""

import copy
from typing import Any

import mujoco
import numpy as np

_KEPT = (bool, int, float, str, tuple, type(None), np.generic, np.ndarray)


class Snapshot:
    """Physics, contacts included, and what the controller and the expert have in mind."""

    def __init__(self, env: Any, expert: Any) -> None:
        """Copies the state of a robosuite environment and of the expert that plays in it."""
        self._env = env
        self._expert, self._mind = expert, copy.copy(vars(expert))
        self._model, self._data = env.sim.model._model, env.sim.data._data
        self._physics = mujoco.MjData(self._model)
        mujoco.mj_copyData(self._physics, self._model, self._data)
        robot = env.robots[0]
        self._python = [(part, _values(part)) for part in (env, robot.controller, robot.gripper)]

    def restore(self) -> Any:
        """Puts everything back, and returns the expert."""
        mujoco.mj_copyData(self._data, self._model, self._physics)
        for part, values in self._python:
            vars(part).update(values)
        vars(self._expert).update(self._mind)
        return self._expert


def _values(part: Any) -> dict[str, Any]:
    return {
        name: copy.deepcopy(value) for name, value in vars(part).items() if isinstance(value, _KEPT)
    }
