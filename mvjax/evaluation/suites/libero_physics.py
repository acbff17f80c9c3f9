"""Points on the objects of a MuJoCo scene, and snapshots of a robosuite episode."""

import copy
from typing import Any

import mujoco
import numpy as np

_COLLISION_SHAPES = 0  # the geom group
_GRID = np.stack(np.meshgrid(*[np.linspace(-1, 1, 5)] * 3), -1).reshape(-1, 3)
_SURFACE = _GRID[np.abs(_GRID).max(1) == 1]  # [98, 3]: a box's corners, edges and faces


def body_points(model: mujoco.MjModel, data: mujoco.MjData, name: str) -> np.ndarray:
    """Returns points on the bounding boxes of a body's collision shapes [n, 3], world, metres."""
    return _points(model, data, _geoms(model, model.body(name).id))


def other_points(model: mujoco.MjModel, data: mujoco.MjData, name: str) -> np.ndarray:
    """Returns such points on everything but this body, the robot and planes, [n, 3]."""
    own = set(_geoms(model, model.body(name).id))
    geoms = [
        geom
        for geom in range(model.ngeom)
        if geom not in own
        and model.geom_group[geom] == _COLLISION_SHAPES
        and model.geom_type[geom] != mujoco.mjtGeom.mjGEOM_PLANE
        and not model.body(model.body_rootid[model.geom_bodyid[geom]]).name.startswith("robot")
    ]
    return _points(model, data, geoms)


def _geoms(model: mujoco.MjModel, body: int) -> list[int]:
    """The collision shapes of a body and its descendants."""
    inside = {body}
    for child in range(body + 1, model.nbody):  # parents come before children
        if model.body_parentid[child] in inside:
            inside.add(child)
    return [
        geom
        for geom in range(model.ngeom)
        if model.geom_bodyid[geom] in inside and model.geom_group[geom] == _COLLISION_SHAPES
    ]


def _points(model: mujoco.MjModel, data: mujoco.MjData, geoms: list[int]) -> np.ndarray:
    if not geoms:
        return np.zeros((0, 3))
    centers, halves = model.geom_aabb[geoms, :3], model.geom_aabb[geoms, 3:]
    local = centers[:, None] + halves[:, None] * _SURFACE  # [geoms, 98, 3]
    rotations = data.geom_xmat[geoms].reshape(-1, 3, 3)
    world = np.einsum("gij,gnj->gni", rotations, local) + data.geom_xpos[geoms][:, None]
    return world.reshape(-1, 3)


_KEPT = (bool, int, float, str, tuple, type(None), np.generic, np.ndarray)


class Snapshot:
    """The physics, contacts included, and the Python state of controller, gripper and expert."""

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
        """Restores everything, and returns the expert."""
        mujoco.mj_copyData(self._data, self._model, self._physics)
        for part, values in self._python:
            vars(part).update(values)
        vars(self._expert).update(self._mind)
        return self._expert


def _values(part: Any) -> dict[str, Any]:
    return {
        name: copy.deepcopy(value) for name, value in vars(part).items() if isinstance(value, _KEPT)
    }
