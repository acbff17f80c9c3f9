"""How the numbers of a stream become numbers of a policy's vector, one small function each way.

A representation loads stored numbers into a form that can be interpolated (numbers stay numbers,
everything with a rotation becomes 4x4 poses), expresses that form as the policy's numbers, and
recovers it from them.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy

# Small pure functions between a stream's values and what a network is given.


# its parts are loaded when they are first used

# How datasets store a rotation -> how many numbers that takes.
ROTATION_WIDTHS = {
    "matrix": 9,
    "quaternion_xyzw": 4,
    "quaternion_wxyz": 4,
    "rotvec": 3,
    "euler_xyz": 3,
}


def relative_poses(poses: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Expresses poses in the frame of a base pose: `inv(base) @ pose`.

    Args:
        poses: homogeneous matrices [..., t, 4, 4].
        base: homogeneous matrix [..., 4, 4] (the last observed pose, in the release).

    Returns:
        [..., t, 4, 4] in the dtype of `poses`.
    """
    inverse = np.linalg.inv(np.asarray(base, np.float64))[..., None, :, :]
    return (inverse @ poses).astype(poses.dtype)


def rotation_to_6d(rotation: np.ndarray) -> np.ndarray:
    """First two rows of rotation matrices [..., 3, 3] as six numbers [..., 6] (release layout)."""
    return rotation[..., :2, :].reshape(*rotation.shape[:-2], 6)


def rotation_from_6d(values: np.ndarray) -> np.ndarray:
    """Rotation matrices [..., 3, 3] from six numbers [..., 6], which need not be orthonormal.

    Gram-Schmidt on the two rows; the third row is their cross product (Zhou et al. 2019, with rows
    for columns as the release does).
    """
    first, second = values[..., :3], values[..., 3:]
    first = first / np.linalg.norm(first, axis=-1, keepdims=True)
    second = second - np.sum(first * second, axis=-1, keepdims=True) * first
    second = second / np.linalg.norm(second, axis=-1, keepdims=True)
    return np.stack([first, second, np.cross(first, second)], axis=-2)


def rotation_matrices(values: np.ndarray, form: str) -> np.ndarray:
    """Rotation matrices float64 [..., 3, 3] from stored rotations.

    Args:
        values: [..., w] numbers, w = `ROTATION_WIDTHS[form]`.
        form: "matrix" (row by row, taken as it is), "quaternion_xyzw", "quaternion_wxyz", "rotvec"
            (axis times angle in radians), or "euler_xyz" (roll, pitch, yaw in radians about the
            fixed axes x, y, z).
    """
    lead = values.shape[:-1]
    flat = np.asarray(values, np.float64).reshape(-1, ROTATION_WIDTHS[form])
    if form == "matrix":
        return flat.reshape(*lead, 3, 3)
    kind = scipy.spatial.transform.Rotation
    if form == "rotvec":
        rotation = kind.from_rotvec(flat)
    elif form == "euler_xyz":
        rotation = kind.from_euler("xyz", flat)
    else:
        rotation = kind.from_quat(flat, scalar_first=form == "quaternion_wxyz")
    return rotation.as_matrix().reshape(*lead, 3, 3)


def rotation_values(matrices: np.ndarray, form: str) -> np.ndarray:
    """The inverse of `rotation_matrices`: [..., 3, 3] to [..., w].

    Of the two quaternions of a rotation it gives the one with a positive real part, of the rotation
    vectors the shortest, of the Euler angles those with a pitch within 90 degrees.
    """
    lead = matrices.shape[:-2]
    if form == "matrix":
        return matrices.reshape(*lead, 9)
    rotation = scipy.spatial.transform.Rotation.from_matrix(matrices.reshape(-1, 3, 3))
    if form == "rotvec":
        values = rotation.as_rotvec()
    elif form == "euler_xyz":
        values = rotation.as_euler("xyz")
    else:
        values = rotation.as_quat(canonical=True, scalar_first=form == "quaternion_wxyz")
    return values.reshape(*lead, ROTATION_WIDTHS[form])


def pose_matrices(position: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Homogeneous matrices [..., 4, 4] from positions [..., 3] and rotations [..., 3, 3]."""
    poses = np.zeros((*rotation.shape[:-2], 4, 4))
    poses[..., :3, :3] = rotation
    poses[..., :3, 3] = position
    poses[..., 3, 3] = 1.0
    return poses


def gripper_opening(
    values: np.ndarray, closed: float, open: float, binary: bool = False
) -> np.ndarray:
    """How open a gripper is: 0 closed, 1 open, clipped; `binary` has nothing between."""
    opening = np.clip((values - closed) / (open - closed), 0.0, 1.0)
    return (opening >= 0.5).astype(opening.dtype) if binary else opening


def gripper_command(
    opening: np.ndarray, closed: float, open: float, binary: bool = False
) -> np.ndarray:
    """The inverse of `gripper_opening`; what lies outside 0 .. 1 is clipped."""
    return closed + gripper_opening(opening, 0.0, 1.0, binary) * (open - closed)


# Modes.


class Mode(enum.StrEnum):
    """How a dimension is normalised (the release's normalization_type)."""

    VARIANCE = "VARIANCE"  # zero mean and unit spread of the clamped data, clamped
    SQUASH = "SQUASH"  # 2 % .. 98 % to [-1, 1], clamped to [-1.5, 1.5]
    SQUASH_HARD = "SQUASH_HARD"  # 1.5 times that range, within min .. max, to [-1, 1], clamped
    IDENTITY = "IDENTITY"  # unchanged, but the shape is checked
    NONE = "NONE"


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
