"""Representations: each against scipy and back, and their rotations against the definition."""

import numpy as np
import pytest
from vector_streams import (
    ANCHORS,
    EPISODE,
    ROTATION,
    STORED,
    VALUES,
    WINDOW,
    read_parts,
    six_numbers,
    there_and_back,
)

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
from data_pipelines.vectors import mask, parse, read, restore, streams

RNG = np.random.default_rng(0)


def test_one_name_is_its_values():
    for description in ("joints", (dict(stream="joints"),), [dict(stream="joints")]):
        values, padded = read(parse(description), EPISODE, ANCHORS, 7, **WINDOW)
        np.testing.assert_array_equal(values[1], VALUES["joints"][8:13])
        assert values.dtype == np.float32 and values.shape == (3, 5, 7)
        assert padded.shape == (3, 5) and not padded.any()
    assert parse("") == () and streams(parse("")) == ()


@pytest.mark.parametrize("form", STORED)
def test_rotations_in_every_form_are_the_same_six_numbers(form):
    part = dict(stream=f"rotation {form}", represent="rotation", rotation=form)
    values, _ = read_parts(part, dim=6)
    np.testing.assert_allclose(values[1], six_numbers(ROTATION[8:13]), atol=1e-6)
    given, _, restored = there_and_back((part,), 6)
    (name,) = given
    if form.startswith("quaternion"):  # q and -q are one rotation
        sign = np.sign(np.sum(given[name] * restored[name], axis=1, keepdims=True))
        restored[name] *= sign
    np.testing.assert_allclose(restored[name], given[name], atol=1e-6)


LAYOUTS = [("", "eef")]  # 4x4 matrices; position and rotation in one stream, and in two
LAYOUTS += [(form, f"pose {form}") for form in STORED]
LAYOUTS += [(form, ("position", f"rotation {form}")) for form in STORED]


@pytest.mark.parametrize(("form", "name"), LAYOUTS)
@pytest.mark.parametrize("represent", ["pose", "relative_pose"])
def test_poses_in_every_form_are_the_same_nine_numbers(form, name, represent):
    part = dict(stream=name, represent=represent) | (dict(rotation=form) if form else {})
    if represent == "relative_pose":
        part["base"] = name
    values, _ = read_parts(part, dim=9)
    poses = VALUES["eef"][8:13]
    if represent == "relative_pose":
        poses = np.linalg.inv(VALUES["eef"][7]) @ poses
    np.testing.assert_allclose(values[1, :, :3], poses[:, :3, 3], atol=1e-5)
    np.testing.assert_allclose(values[1, :, 3:].reshape(5, 2, 3), poses[:, :2, :3], atol=1e-6)

    given, _, restored = there_and_back((part,), 9)
    assert given.keys() == restored.keys()
    for key in given:
        value = given[key]
        assert restored[key].shape == value.shape
        if "quaternion" in form and key != "position":
            head = value.shape[1] - 4
            flip = np.sum(value[:, head:] * restored[key][:, head:], axis=1) < 0
            restored[key][flip, head:] *= -1
        np.testing.assert_allclose(restored[key], value, atol=1e-6)


def test_deltas_grippers_and_padding():
    parts = (
        dict(stream="joints", represent="delta", base="joint_state", columns=(0, 1, 2)),
        dict(stream="grip", represent="gripper", closed=0.08, open=0.0),
        dict(pad=2),
        dict(stream="grip", represent="gripper", closed=0.02, open=0.06),
        dict(stream="grip", represent="gripper", closed=0.0, open=0.08, binary=True),
    )
    values, _ = read_parts(*parts, dim=8)
    joints, grip = VALUES["joints"][8:13, :3], VALUES["grip"][8:13]
    expected = [joints - VALUES["joint_state"][7, :3], 1 - grip[:, None] / 0.08, np.zeros((5, 2))]
    expected += [np.clip((grip[:, None] - 0.02) / 0.04, 0, 1), grip[:, None] >= 0.04]
    np.testing.assert_allclose(values[1], np.concatenate(expected, 1), atol=1e-6)
    np.testing.assert_array_equal(mask(parse(parts), 8), [1, 1, 1, 1, 0, 0, 1, 1])

    given, _, restored = there_and_back(parts[:3], 6)
    assert restored.keys() == given.keys()
    np.testing.assert_allclose(restored["joints"], given["joints"][:, :3], atol=1e-6)
    np.testing.assert_allclose(restored["grip"][:, 0], given["grip"], atol=1e-6)
    binary = restore(parse(parts[4:]), np.array([[0.2], [0.7], [-3.0]]), {})
    np.testing.assert_allclose(binary["grip"][:, 0], [0, 0.08, 0])
    beyond = restore(parse(parts[1:2]), np.array([[1.4], [-0.1]]), {})
    np.testing.assert_allclose(beyond["grip"][:, 0], [0, 0.08])


def test_columns_of_one_stream_go_back_to_their_places():
    parts = (
        dict(stream="action", columns=(0, 1, 2)),
        dict(stream="action", columns=(6,)),
        dict(stream="action", columns=(3, 4, 5), represent="rotation", rotation="rotvec"),
    )
    given, numbers, restored = there_and_back(parts, 10)
    np.testing.assert_allclose(numbers[:, 3], given["action"][:, 6], rtol=1e-6)
    np.testing.assert_allclose(restored["action"], given["action"], atol=1e-6)
    some = restore(parse(parts[1:2]), numbers[:, 3:4], {})["action"]
    assert some.shape == (5, 7) and np.isnan(some[:, :6]).all() and not np.isnan(some[:, 6]).any()
    with pytest.raises(ValueError, match="several parts hold the same numbers of stream 'action'"):
        restore(parse((parts[0], dict(stream="action", columns=(2, 3)))), numbers[:, :5], {})


def test_two_arms_side_by_side():
    arm = dict(represent="relative_pose", interpolation="pose")
    parts = (
        arm | dict(stream="eef", base="eef"),
        arm | dict(stream="other", base="other"),
        dict(stream="joints"),
    )
    values, _ = read_parts(*parts, dim=25)
    np.testing.assert_array_equal(values[..., :9], read_parts(parts[0], dim=9)[0])
    np.testing.assert_array_equal(values[..., 9:18], read_parts(parts[1], dim=9)[0])
    given, _, restored = there_and_back(parts, 25)
    for name, value in given.items():
        np.testing.assert_allclose(restored[name], value, atol=1e-6)
    # One effector as the other one sees it.
    seen, _ = read_parts(dict(stream="eef", represent="relative_pose", base="other"), dim=9)
    relative = np.linalg.inv(VALUES["other"][7]) @ VALUES["eef"][8:13]
    np.testing.assert_allclose(seen[1, :, :3], relative[:, :3, 3], atol=1e-5)


# The maps they use.


def _rotations(n):
    q, _ = np.linalg.qr(RNG.normal(size=(n, 3, 3)))
    return q * np.sign(np.linalg.det(q))[:, None, None]


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
