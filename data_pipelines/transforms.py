"""Small pure functions between a stream's values and what a network is given."""

import numpy as np
import scipy  # its parts are loaded when they are first used
from PIL import Image

# How datasets store a rotation -> how many numbers that takes.
ROTATION_WIDTHS = {
    "matrix": 9,
    "quaternion_xyzw": 4,
    "quaternion_wxyz": 4,
    "rotvec": 3,
    "euler_xyz": 3,
}


def resize_area(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes frames without aliasing.

    Where both sides shrink by whole factors every output pixel is the rounded mean of its box;
    otherwise Pillow's antialiased bilinear filter is used, which is the release's resize.

    Args:
        frames: uint8 [t, h, w, 3].
        height: output height, pixels.
        width: output width, pixels.

    Returns:
        uint8 [t, height, width, 3]; the input itself when it already has that size.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(
            f"Frames are {frames.dtype} {frames.shape}; resize_area expects uint8 [t, h, w, 3]."
        )
    _, h, w, _ = frames.shape
    if (h, w) == (height, width):
        return frames
    if h % height or w % width:
        images = [
            Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR)
            for frame in frames
        ]
        return np.stack([np.asarray(image) for image in images])
    rows, columns = h // height, w // width
    area = rows * columns
    # Adding whole strided planes is several times faster than reducing over tiny axes.
    total = np.full(
        (len(frames), height, width, 3), area // 2, np.uint32 if area > 256 else np.uint16
    )
    for row in range(rows):
        for column in range(columns):
            total += frames[:, row::rows, column::columns]
    return (total // area).astype(np.uint8)


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
