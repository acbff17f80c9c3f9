"""Resizing against plain averaging, and rotations against their definition."""

import numpy as np
import pytest

from data_pipelines.representations import (
    ROTATION_WIDTHS,
    gripper_command,
    gripper_opening,
    relative_poses,
    rotation_from_6d,
    rotation_matrices,
    rotation_to_6d,
    rotation_values,
)
from data_pipelines.video import resize_area

RNG = np.random.default_rng(0)


def _rotations(n):
    q, _ = np.linalg.qr(RNG.normal(size=(n, 3, 3)))
    return q * np.sign(np.linalg.det(q))[:, None, None]


@pytest.mark.parametrize("size", [(192, 192, 64, 64), (96, 60, 24, 20), (480, 640, 12, 16)])
def test_whole_factors_are_exact_box_means(size):
    h, w, height, width = size
    frames = RNG.integers(0, 256, (2, h, w, 3), dtype=np.uint8)
    boxes = frames.reshape(2, height, h // height, width, w // width, 3).mean((2, 4))
    assert np.abs(resize_area(frames, height, width) - boxes).max() <= 0.5


@pytest.mark.parametrize("size", [(64, 64), (72, 50), (250, 333)])
def test_constant_frames_stay_constant(size):
    frames = np.full((1, 192, 192, 3), 201, np.uint8)
    resized = resize_area(frames, *size)
    assert resized.shape == (1, *size, 3)
    assert np.all(resized == 201)


def test_fractional_factors_do_not_alias():
    checkers = (np.indices((200, 200)).sum(0) % 2 * 255).astype(np.uint8)
    frames = np.repeat(checkers[None, ..., None], 3, axis=-1)
    inner = resize_area(frames, 64, 72)[0, 2:-2, 2:-2].astype(int)
    assert np.abs(inner - 127.5).max() < 16  # picking every third pixel would give 0 and 255


def test_same_size_is_not_copied():
    frames = np.zeros((1, 8, 8, 3), np.uint8)
    assert resize_area(frames, 8, 8) is frames


def test_float_frames_are_refused():
    with pytest.raises(ValueError, match="float64"):
        resize_area(np.zeros((1, 8, 8, 3)), 4, 4)


def test_6d_rotations_round_trip_and_repair():
    rotations = _rotations(50)
    six = rotation_to_6d(rotations)
    np.testing.assert_array_equal(six[0], rotations[0, :2].ravel())
    np.testing.assert_allclose(rotation_from_6d(six), rotations, atol=1e-12)
    repaired = rotation_from_6d(six * 3 + RNG.normal(size=six.shape) * 0.1)
    np.testing.assert_allclose(
        repaired @ repaired.swapaxes(1, 2), np.tile(np.eye(3), (50, 1, 1)), atol=1e-9
    )
    np.testing.assert_allclose(np.linalg.det(repaired), 1.0)


def test_relative_poses_compose_back():
    poses = np.tile(np.eye(4), (4, 6, 1, 1))
    poses[..., :3, :3] = _rotations(24).reshape(4, 6, 3, 3)
    poses[..., :3, 3] = RNG.normal(size=(4, 6, 3))
    relative = relative_poses(poses, poses[:, 0])
    np.testing.assert_allclose(relative[:, 0], np.tile(np.eye(4), (4, 1, 1)), atol=1e-12)
    np.testing.assert_allclose(poses[:, :1] @ relative, poses, atol=1e-12)


def test_stored_rotations_mean_what_their_names_say():
    """A quarter turn about z, and one about x followed by one about the fixed z."""
    half = np.sqrt(0.5)
    quarter = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    for form, values in {
        "matrix": np.ravel(quarter),
        "quaternion_xyzw": [0, 0, half, half],
        "quaternion_wxyz": [half, 0, 0, half],
        "rotvec": [0, 0, np.pi / 2],
        "euler_xyz": [0, 0, np.pi / 2],
    }.items():
        np.testing.assert_allclose(rotation_matrices(np.array(values), form), quarter, atol=1e-12)
    both = rotation_matrices(np.array([np.pi / 2, 0, np.pi / 2]), "euler_xyz")
    np.testing.assert_allclose(both @ [0, 1, 0], [0, 0, 1], atol=1e-12)
    np.testing.assert_allclose(both @ [1, 0, 0], [0, 1, 0], atol=1e-12)


@pytest.mark.parametrize("form", ROTATION_WIDTHS)
def test_rotations_of_any_shape_round_trip(form):
    rotations = _rotations(12).reshape(3, 4, 3, 3)
    values = rotation_values(rotations, form)
    assert values.shape == (3, 4, ROTATION_WIDTHS[form])
    np.testing.assert_allclose(rotation_matrices(values, form), rotations, atol=1e-12)


def test_gripper_conventions():
    widths = np.array([-0.01, 0.0, 0.02, 0.08, 0.1])
    opening = gripper_opening(widths, closed=0.0, open=0.08)
    np.testing.assert_allclose(opening, [0, 0, 0.25, 1, 1])
    np.testing.assert_allclose(gripper_opening(-widths, 0.0, -0.08), opening)
    np.testing.assert_array_equal(gripper_opening(widths, 0.0, 0.08, binary=True), [0, 0, 0, 1, 1])
    np.testing.assert_allclose(gripper_command(opening, 1.0, -1.0), [1, 1, 0.5, -1, -1])
    np.testing.assert_allclose(gripper_command(np.array([-3, 0.6]), 1.0, -1.0, True), [1, -1])
