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
    wrap: tuple[float, float] | None = None
    pad: int = 0


class Representation:
    """Numbers as they are, and the base of the other representations.

    Angles that `wrap` are loaded without their jumps, so that what is between two of them is, too.

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
        if part.wrap is None:
            return numbers
        largest = np.abs(numbers).max(initial=0)
        if largest > _MOST_TURNS * _turn(part):  # turns may have been counted on
            raise ValueError(
                f"wrap={part.wrap} says that a turn is {_turn(part):.4g}, but there is an angle of "
                f"{largest:.4g}: are these degrees?"
            )
        return np.unwrap(numbers, period=_turn(part), axis=-2)

    def store(self, part: Part, form: np.ndarray) -> np.ndarray:
        """The inverse of `load`."""
        return form if part.wrap is None else wrapped(form, *part.wrap)

    def express(self, part: Part, form: np.ndarray, base: np.ndarray | None) -> np.ndarray:
        """Turns the form [..., h, *] and the base's form [..., *] into numbers [..., h, d]."""
        return self.store(part, form)

    def recover(self, part: Part, numbers: np.ndarray, base: np.ndarray | None) -> np.ndarray:
        """The inverse of `express`."""
        return numbers


class _Delta(Representation):
    """The difference from the base; of angles that wrap, the short way round."""

    def express(self, part, form, base):
        difference = form - base[..., None, :]
        if part.wrap is None:
            return difference
        # One number of turns for the whole window, so that it is as continuous as the motion.
        turns = np.round(difference[..., :1, :] / _turn(part))
        return difference - turns * _turn(part)

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
            poses = numbers.reshape(*numbers.shape[:-1], 4, 4)
            if not np.abs(poses[..., 3, :] - [0, 0, 0, 1]).max(initial=0) < _CRUDE:
                raise ValueError(
                    "a pose's fourth row must be 0, 0, 0, 1; is the position in another row or "
                    "column (a transposed matrix)?"
                )
            _check_matrices(poses[..., :3, :3])
            return poses
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


_MOST_TURNS = 10  # of an angle that wraps


def _turn(part: Part) -> float:
    low, high = part.wrap
    return high - low


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
    if not np.isfinite(flat).all():
        raise ValueError("the stored rotations hold NaN or infinity")
    if form == "matrix":
        matrices = flat.reshape(*lead, 3, 3)
        _check_matrices(matrices)
        return matrices
    kind = scipy.spatial.transform.Rotation
    if form.startswith("quaternion"):
        lengths = np.linalg.norm(flat, axis=-1)
        if not np.abs(lengths - 1.0).max(initial=0) < _CRUDE:
            raise ValueError(
                f"quaternions must have length 1, these have {lengths.min():.3g} to "
                f"{lengths.max():.3g}; name the four columns that are one"
            )
    elif not (most := np.abs(flat).max(initial=0)) < 4 * np.pi:
        raise ValueError(f"{form} takes radians, but there is an angle of {most:.4g}: in degrees?")
    if form == "rotvec":
        rotation = kind.from_rotvec(flat)
    elif form == "euler_xyz":
        rotation = kind.from_euler("xyz", flat)
    else:
        rotation = kind.from_quat(flat, scalar_first=form == "quaternion_wxyz")
    return rotation.as_matrix().reshape(*lead, 3, 3)


_CRUDE = 0.05  # how far stored rotations may be from exact ones


def _check_matrices(matrices: np.ndarray) -> None:
    """Raises ValueError unless matrices [..., 3, 3] are rotations."""
    if not np.isfinite(matrices).all():
        raise ValueError("the stored matrices hold NaN or infinity")
    error = np.abs(matrices @ matrices.swapaxes(-1, -2) - np.eye(3)).max(initial=0)
    if not error < _CRUDE or not np.linalg.det(matrices).min(initial=1.0) > 0:
        raise ValueError(
            "the stored matrices are not rotations: their rows must be of length 1 and at right "
            "angles, and not mirrored"
        )


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


def wrapped(angles: np.ndarray, low: float, high: float) -> np.ndarray:
    """Angles of any number of turns as those from `low` to `high`, which are one turn apart."""
    return low + np.mod(angles - low, high - low)


def seams(values: np.ndarray) -> list[str]:
    """Where numbers [n, d] of a motion jump although it goes on: which ones, how often, the remedy.

    Angles wrap, the sign of a quaternion changes, and a rotation vector of half a turn becomes its
    opposite. As numbers, these are the largest motions of a dataset.
    """
    found, steps = [], np.abs(np.diff(values, axis=0))
    if len(steps) < 2 or values.shape[1] > _MOST_DIMENSIONS:
        return found
    usual = np.median(steps, axis=0)
    for turn, name in ((2 * np.pi, "2π"), (360.0, "360°")):
        # Without the turn, a step of an angle is about as small as its neighbours.
        small = np.clip(10 * usual, 0.02 * turn, 0.1 * turn)
        jumps = (np.abs(steps - turn) < small) & (usual < 0.1 * turn)
        jumps &= np.abs(values).max(axis=0) <= 1.01 * turn
        for i in np.flatnonzero(jumps.any(axis=0)):
            found.append(
                f"dimension {i} jumps by {name} ({jumps[:, i].sum()} times): an angle that wraps; "
                "say wrap=(low, high), or take the rotation by its representation"
            )
    for width, what in ((4, "quaternion"), (3, "rotation vector")):
        for i in range(values.shape[1] - width + 1):
            some = values[:, i : i + width]
            length = np.linalg.norm(some, axis=1)
            turned = np.linalg.norm(some[1:] + some[:-1], axis=1) < 0.2
            if width == 4:
                turned &= np.abs(length - 1).max() < 0.02
            else:
                turned &= np.abs(np.minimum(length[1:], length[:-1]) - np.pi) < 0.2
            if turned.any():
                found.append(
                    f"dimensions {i} to {i + width - 1} turn to their opposite ({turned.sum()} "
                    f"times), a {what} of the same rotation; represent='rotation' does not jump"
                )
    return found


_MOST_DIMENSIONS = 64  # of a stream in which seams are looked for


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
