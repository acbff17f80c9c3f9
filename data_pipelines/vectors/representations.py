"""How the numbers of a stream become numbers of a policy's vector, one small function each way.

A representation loads stored numbers into a form that can be interpolated (numbers stay numbers,
everything with a rotation becomes 4x4 poses), expresses that form as the policy's numbers, and
recovers it from them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data_pipelines.normalization.normalizer import Mode
from data_pipelines.transforms import (
    ROTATION_WIDTHS,
    gripper_command,
    gripper_opening,
    pose_matrices,
    relative_poses,
    rotation_from_6d,
    rotation_matrices,
    rotation_to_6d,
    rotation_values,
)


@dataclass(frozen=True)
class Part:
    """A stretch of a policy's vector; the keys are explained in `vectors.parts`.

    Attributes:
        streams: one name; for a pose also two, position and rotation; none for padding.
        bases: names like `streams`, of what it is relative to.
    """

    streams: tuple[str, ...] = ()
    represent: str = "values"
    bases: tuple[str, ...] = ()
    columns: tuple[int, ...] | None = None
    base_columns: tuple[int, ...] | None = None
    rotation: str = ""
    closed: float = 0.0
    open: float = 1.0
    binary: bool = False
    interpolation: str = "nearest"
    shift: float = 0.0
    normalize: Mode = Mode.VARIANCE
    pad: int = 0


@dataclass(frozen=True)
class Representation:
    """One entry of `REPRESENTATIONS`.

    Attributes:
        interpolations: what is possible between two stored values.
        load: (part, numbers [..., w]) -> the form, [..., w] or [..., 4, 4].
        store: the inverse of `load`.
        express: (part, form [..., h, *], base form [..., *] or None) -> [..., h, d].
        recover: the inverse of `express`.
        modes: of its d dimensions, where d is fixed; None stands for the part's own.
    """

    interpolations: tuple[str, ...]
    load: Callable[[Part, np.ndarray], np.ndarray]
    store: Callable[[Part, np.ndarray], np.ndarray]
    express: Callable[[Part, np.ndarray, np.ndarray | None], np.ndarray]
    recover: Callable[[Part, np.ndarray, np.ndarray | None], np.ndarray]
    modes: tuple[Mode | None, ...] | None = None


def stored_width(part: Part) -> int | None:
    """How many numbers of its streams a part is made of; None where only data tells."""
    if part.represent in ("values", "delta"):
        return None if part.columns is None else len(part.columns)
    if part.represent == "gripper":
        return len(part.columns or (0,))
    if part.represent == "rotation":
        return ROTATION_WIDTHS[part.rotation]
    return 3 + ROTATION_WIDTHS[part.rotation] if part.rotation else 16


def load_position(part: Part, numbers: np.ndarray) -> np.ndarray:
    """Positions [..., 3] as poses without rotation, for the first stream of two."""
    return pose_matrices(numbers, np.broadcast_to(np.eye(3), (*numbers.shape[:-1], 3, 3)))


def load_rotation(part: Part, numbers: np.ndarray) -> np.ndarray:
    """Rotations [..., w] as poses at the origin."""
    return pose_matrices(np.zeros(3), rotation_matrices(numbers, part.rotation))


def store_position(part: Part, poses: np.ndarray) -> np.ndarray:
    """The inverse of `load_position`."""
    return poses[..., :3, 3]


def store_rotation(part: Part, poses: np.ndarray) -> np.ndarray:
    """The inverse of `load_rotation`."""
    matrices = poses[..., :3, :3]
    return matrices if part.rotation == "matrix" else rotation_values(matrices, part.rotation)


def _load_pose(part, numbers):
    if not part.rotation:
        return numbers.reshape(*numbers.shape[:-1], 4, 4)
    return pose_matrices(numbers[..., :3], rotation_matrices(numbers[..., 3:], part.rotation))


def _store_pose(part, poses):
    if not part.rotation:
        return poses
    rotation = rotation_values(poses[..., :3, :3], part.rotation)
    return np.concatenate([poses[..., :3, 3], rotation], axis=-1)


def _load_numbers(part, numbers):
    return numbers


def _store_numbers(part, numbers):
    return numbers


def _express_values(part, numbers, base):
    return numbers


def _recover_values(part, numbers, base):
    return numbers


def _express_delta(part, numbers, base):
    return numbers - base[..., None, :]


def _recover_delta(part, numbers, base):
    return numbers + base[..., None, :]


def _express_gripper(part, numbers, base):
    return gripper_opening(numbers, part.closed, part.open, part.binary)


def _recover_gripper(part, numbers, base):
    return gripper_command(numbers, part.closed, part.open, part.binary)


def _express_rotation(part, poses, base):
    return rotation_to_6d(poses[..., :3, :3])


def _recover_rotation(part, numbers, base):
    return pose_matrices(np.zeros(3), rotation_from_6d(numbers))


def _express_pose(part, poses, base):
    return np.concatenate([poses[..., :3, 3], rotation_to_6d(poses[..., :3, :3])], axis=-1)


def _recover_pose(part, numbers, base):
    return pose_matrices(numbers[..., :3], rotation_from_6d(numbers[..., 3:]))


def _express_relative_pose(part, poses, base):
    return _express_pose(part, relative_poses(poses, base), None)


def _recover_relative_pose(part, numbers, base):
    return base[..., None, :, :] @ _recover_pose(part, numbers, None)


_HELD = ("nearest", "previous")
_POSE_MODES = (None,) * 3 + (Mode.IDENTITY,) * 6

REPRESENTATIONS = {
    "values": Representation(
        (*_HELD, "linear"), _load_numbers, _store_numbers, _express_values, _recover_values
    ),
    "delta": Representation(
        (*_HELD, "linear"), _load_numbers, _store_numbers, _express_delta, _recover_delta
    ),
    "gripper": Representation(
        (*_HELD, "linear"), _load_numbers, _store_numbers, _express_gripper, _recover_gripper
    ),
    "rotation": Representation(
        (*_HELD, "quaternion"),
        load_rotation,
        store_rotation,
        _express_rotation,
        _recover_rotation,
        (Mode.IDENTITY,) * 6,
    ),
    "pose": Representation(
        (*_HELD, "pose"), _load_pose, _store_pose, _express_pose, _recover_pose, _POSE_MODES
    ),
    "relative_pose": Representation(
        (*_HELD, "pose"),
        _load_pose,
        _store_pose,
        _express_relative_pose,
        _recover_relative_pose,
        _POSE_MODES,
    ),
}
