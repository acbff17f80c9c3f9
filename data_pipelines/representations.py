"""Representations: how stored numbers become numbers of a policy's vector, and back.

A representation loads stored numbers into a form that can be interpolated (anything with a rotation
becomes 4x4 poses, the rest stays as it is), expresses that form as the policy's numbers, and
recovers it from them. Below the table `REPRESENTATIONS` are the maps they use: relative poses, 6-D
and stored rotations, grippers.
"""

import enum
from dataclasses import dataclass

import numpy as np
import scipy  # submodules are imported on first use

# How a dataset stores a rotation -> the number of values.
ROTATION_WIDTHS = {
    "matrix": 9,
    "quaternion_xyzw": 4,
    "quaternion_wxyz": 4,
    "rotvec": 3,
    "euler_xyz": 3,
}


class Mode(enum.StrEnum):
    """How a dimension is normalised (the release's normalization_type)."""

    VARIANCE = "VARIANCE"  # zero mean and unit variance of the clamped data, clamped
    SQUASH = "SQUASH"  # 2 % .. 98 % to [-1, 1], clamped to [-1.5, 1.5]
    SQUASH_HARD = "SQUASH_HARD"  # 1.5 times that range, within min .. max, to [-1, 1], clamped
    IDENTITY = "IDENTITY"  # unchanged, the shape is checked
    NONE = "NONE"  # unchanged and unchecked, needs no statistics


@dataclass(frozen=True)
class Part:
    """A contiguous part of a policy's vector; `vectors.py` explains the keys."""

    streams: tuple[str, ...] = ()  # one, or position and rotation of a pose; none for padding
    represent: str = "values"
    bases: tuple[str, ...] = ()  # what it is relative to, named like `streams`
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


class Representation:
    """Numbers as they are, and the base of the other representations.

    Attributes:
        interpolations: what is possible between two stored values.
        modes: normalisation of the d dimensions if d is fixed; None stands for the part's own mode.
    """

    interpolations: tuple[str, ...] = ("nearest", "previous", "linear")
    modes: tuple[Mode | None, ...] | None = None

    def stored_width(self, part: Part) -> int | None:
        """The number of stored values that make up a part; None if only the data can tell."""
        return None if part.columns is None else len(part.columns)

    def load(self, part: Part, numbers: np.ndarray) -> np.ndarray:
        """Turns stored numbers [..., w] into the form, [..., w] or [..., 4, 4]."""
        return numbers

    def store(self, part: Part, form: np.ndarray) -> np.ndarray:
        """The inverse of `load`."""
        return form

    def express(self, part: Part, form: np.ndarray, base: np.ndarray | None) -> np.ndarray:
        """Turns the form [..., h, *] and the base's form [..., *] into numbers [..., h, d]."""
        return form

    def recover(self, part: Part, numbers: np.ndarray, base: np.ndarray | None) -> np.ndarray:
        """The inverse of `express`."""
        return numbers


class _Delta(Representation):
    """The difference from the base."""

    def express(self, part, form, base):
        return form - base[..., None, :]

    def recover(self, part, numbers, base):
        return numbers + base[..., None, :]


class _Gripper(Representation):
    """0 is closed, 1 is open."""

    def stored_width(self, part):
        return len(part.columns or (0,))

    def express(self, part, form, base):
        return gripper_opening(form, part.closed, part.open, part.binary)

    def recover(self, part, numbers, base):
        return gripper_command(numbers, part.closed, part.open, part.binary)


class _Position(Representation):
    """Positions as poses without rotation: the first of a pose's two streams."""

    def stored_width(self, part):
        return 3

    def load(self, part, numbers):
        return pose_matrices(numbers, np.broadcast_to(np.eye(3), (*numbers.shape[:-1], 3, 3)))

    def store(self, part, form):
        return form[..., :3, 3]


class _Rotation(Representation):
    """Six numbers: the first two rows of the matrix."""

    interpolations = ("nearest", "previous", "quaternion")
    modes = (Mode.IDENTITY,) * 6

    def stored_width(self, part):
        return ROTATION_WIDTHS[part.rotation]

    def load(self, part, numbers):
        return pose_matrices(np.zeros(3), rotation_matrices(numbers, part.rotation))

    def store(self, part, form):
        matrices = form[..., :3, :3]
        return matrices if part.rotation == "matrix" else rotation_values(matrices, part.rotation)

    def express(self, part, form, base):
        return rotation_to_6d(form[..., :3, :3])

    def recover(self, part, numbers, base):
        return pose_matrices(np.zeros(3), rotation_from_6d(numbers))


class _Pose(Representation):
    """Position (3), then rotation (6)."""

    interpolations = ("nearest", "previous", "pose")
    modes = (None,) * 3 + (Mode.IDENTITY,) * 6

    def stored_width(self, part):
        return 3 + ROTATION_WIDTHS[part.rotation] if part.rotation else 16

    def load(self, part, numbers):
        if not part.rotation:
            return numbers.reshape(*numbers.shape[:-1], 4, 4)
        return pose_matrices(numbers[..., :3], rotation_matrices(numbers[..., 3:], part.rotation))

    def store(self, part, form):
        if not part.rotation:
            return form
        rotation = rotation_values(form[..., :3, :3], part.rotation)
        return np.concatenate([form[..., :3, 3], rotation], axis=-1)

    def express(self, part, form, base):
        return np.concatenate([form[..., :3, 3], rotation_to_6d(form[..., :3, :3])], axis=-1)

    def recover(self, part, numbers, base):
        return pose_matrices(numbers[..., :3], rotation_from_6d(numbers[..., 3:]))


class _RelativePose(_Pose):
    """A pose in the frame of its base."""

    def express(self, part, form, base):
        return super().express(part, relative_poses(form, base), None)

    def recover(self, part, numbers, base):
        return base[..., None, :, :] @ super().recover(part, numbers, None)


POSITION = _Position()
REPRESENTATIONS: dict[str, Representation] = {
    "values": Representation(),
    "delta": _Delta(),
    "gripper": _Gripper(),
    "rotation": _Rotation(),
    "pose": _Pose(),
    "relative_pose": _RelativePose(),
}


def relative_poses(poses: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Poses [..., t, 4, 4] in the frame of a base pose [..., 4, 4]: `inv(base) @ pose`.

    The result has the dtype of `poses`. In the release, the base is the last observed pose.
    """
    inverse = np.linalg.inv(np.asarray(base, np.float64))[..., None, :, :]
    return (inverse @ poses).astype(poses.dtype)


def pose_matrices(position: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Homogeneous matrices [..., 4, 4] from positions [..., 3] and rotations [..., 3, 3]."""
    poses = np.zeros((*rotation.shape[:-2], 4, 4))
    poses[..., :3, :3] = rotation
    poses[..., :3, 3] = position
    poses[..., 3, 3] = 1.0
    return poses


def rotation_to_6d(rotation: np.ndarray) -> np.ndarray:
    """The first two rows of matrices [..., 3, 3] as six numbers [..., 6] (release layout)."""
    return rotation[..., :2, :].reshape(*rotation.shape[:-2], 6)


def rotation_from_6d(values: np.ndarray) -> np.ndarray:
    """Rotation matrices [..., 3, 3] from six numbers [..., 6] that need not be orthonormal.

    Gram-Schmidt on the two rows, the third is their cross product (Zhou et al. 2019, but with rows
    in place of columns, as in the release).
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
        form: "matrix" (row by row, not orthonormalised), "quaternion_xyzw", "quaternion_wxyz",
            "rotvec" (axis times angle in radians), or "euler_xyz" (roll, pitch, yaw in radians
            about the fixed axes x, y, z).
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

    Of equivalent values it returns the quaternion with a positive real part, the shortest rotation
    vector, and the Euler angles with a pitch within 90 degrees.
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


def gripper_opening(
    values: np.ndarray, closed: float, open: float, binary: bool = False
) -> np.ndarray:
    """A gripper's opening: 0 closed, 1 open, clipped; `binary` rounds to one of them."""
    opening = np.clip((values - closed) / (open - closed), 0.0, 1.0)
    return (opening >= 0.5).astype(opening.dtype) if binary else opening


def gripper_command(
    opening: np.ndarray, closed: float, open: float, binary: bool = False
) -> np.ndarray:
    """The inverse of `gripper_opening`; openings outside 0 .. 1 are clipped."""
    return closed + gripper_opening(opening, 0.0, 1.0, binary) * (open - closed)
