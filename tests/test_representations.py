"""Representations: each against scipy and back, and their rotations against the definition."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
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

from data_pipelines.episode import Stream
from data_pipelines.representations import (
    ROTATION_WIDTHS,
    gripper_command,
    gripper_opening,
    relative_poses,
    rotation_from_6d,
    rotation_matrices,
    rotation_to_6d,
    rotation_values,
    seams,
    wrapped,
)
from data_pipelines.vectors import mask, parse, read, restore, streams, vector

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


# Angles and rotations that have more than one value.

HALF_TURNS = Rotation.from_rotvec(np.linspace(0.6, 1.4, 41)[:, None] * np.pi * [0.6, 0.0, 0.8])
"""A steady turn through half a turn, where every chart has its seam."""


def _read(stored, part, dim, **window):
    times = np.arange(len(stored), dtype=np.int64) * 10**8
    window = dict(horizon=9, fps=10, shift=0.0) | window
    return read(parse((part,)), {"x": Stream(times, stored)}, times[:30:3], dim, **window)[0]


def _in_every_chart():
    rotvec, quaternion = HALF_TURNS.as_rotvec(), HALF_TURNS.as_quat(canonical=True)
    axis, angle = np.array([0.6, 0.0, 0.8]), np.linspace(0.6, 1.4, 41) * np.pi
    signs = np.where(np.arange(41) % 3, 1.0, -1.0)[:, None]
    return {
        "rotvec": [rotvec, angle[:, None] * axis, (angle - 2 * np.pi)[:, None] * axis],
        "quaternion_xyzw": [quaternion, -quaternion, signs * quaternion],
        "quaternion_wxyz": [(signs * quaternion)[:, [3, 0, 1, 2]]],
        "euler_xyz": [
            HALF_TURNS.as_euler("xyz"),
            np.unwrap(HALF_TURNS.as_euler("xyz"), axis=0),
            np.array([1, -1, 1]) * HALF_TURNS.as_euler("xyz") + [np.pi, np.pi, np.pi],
        ],
        "matrix": [HALF_TURNS.as_matrix()],
    }


@pytest.mark.parametrize("represent", ["rotation", "pose", "relative_pose"])
@pytest.mark.parametrize("interpolation", ["nearest", "between"])
def test_every_value_of_a_rotation_gives_the_same_numbers_without_a_jump(represent, interpolation):
    """q and -q, vectors beyond half a turn, angles round the seam; also between samples."""
    part = dict(stream="x", represent=represent)
    way = "quaternion" if represent == "rotation" else "pose"
    part["interpolation"] = way if interpolation == "between" else "nearest"
    if represent == "relative_pose":
        part["base"] = "x"
    expected = None
    for form, charts in _in_every_chart().items():
        for chart in charts:
            stored = chart.reshape(41, -1)
            if represent != "rotation":
                stored = np.concatenate([np.zeros((41, 3)), stored], 1)
            dim = 6 if represent == "rotation" else 9
            numbers = _read(stored, part | dict(rotation=form), dim, fps=23)
            expected = numbers if expected is None else expected
            np.testing.assert_allclose(numbers, expected, atol=1e-6, err_msg=form)
    assert np.abs(np.diff(expected, axis=1)).max() < 0.1


PI = np.pi
ANGLES = np.linspace(2.0, 4.4, 41)[:, None] * [1, -1]  # past π, and past -π


@pytest.mark.parametrize("unit", [1.0, 180 / PI])
@pytest.mark.parametrize("interpolation", ["nearest", "linear"])
def test_a_delta_of_angles_goes_the_short_way_round(unit, interpolation):
    low, high = -PI * unit, PI * unit
    stored = wrapped(ANGLES * unit, low, high)
    assert np.abs(np.diff(stored, axis=0)).max() > 6 * unit
    part = dict(stream="x", represent="delta", base="x", interpolation=interpolation)
    deltas = _read(stored, part | dict(wrap=(low, high)), 2, fps=20)
    np.testing.assert_allclose(deltas, _read(ANGLES * unit, part, 2, fps=20), atol=1e-5 * unit)
    assert np.abs(deltas).max() < 0.8 * unit
    # A prediction is a command in the dataset's own range again.
    parts = parse((part | dict(wrap=[low, high]),))
    (command,) = restore(parts, deltas[4], {"x": stored[12]}).values()
    assert command.min() >= low and command.max() <= high
    again = vector(parts, {"x": command}, {"x": stored[12]}, 2)
    np.testing.assert_allclose(again, deltas[4], atol=1e-5 * unit)


def test_angles_between_two_samples_are_between_them():
    stored = wrapped(ANGLES, -PI, PI)
    part = dict(stream="x", interpolation="linear", wrap=(-PI, PI))
    between = _read(stored, part, 2, fps=20)
    expected = wrapped(_read(ANGLES, dict(stream="x", interpolation="linear"), 2, fps=20), -PI, PI)
    np.testing.assert_allclose(between, expected, atol=1e-5)
    assert np.abs(between).min() > 1.9  # without `wrap`, zero lies between π and -π
    assert np.abs(_read(stored, dict(stream="x", interpolation="linear"), 2, fps=20)).min() < 1


def test_degrees_do_not_wrap_as_radians():
    """They would be folded to a noise of ±π; turns that were counted on are angles."""
    part = dict(stream="x", wrap=(-PI, PI))
    with pytest.raises(ValueError, match=r"a turn is 6\.283, but .* an angle of 252.1: are these"):
        _read(np.degrees(ANGLES), part, 2, fps=20)
    np.testing.assert_allclose(
        _read(ANGLES + 6 * PI, part, 2, fps=20), _read(ANGLES, part, 2, fps=20), atol=1e-5
    )


def test_jumps_between_two_values_of_one_angle_are_found():
    for values, words in (
        (wrapped(ANGLES, -PI, PI), ["dimension 0 jumps by 2π (1 times)", "dimension 1 jumps"]),
        (wrapped(np.degrees(ANGLES) + 180, 0, 360), ["dimension 1 jumps by 360°"]),
        (
            HALF_TURNS.as_rotvec(),
            ["dimensions 0 to 2 turn to their opposite (1 times), a rotation"],
        ),
        (HALF_TURNS.as_quat(canonical=True), ["dimensions 0 to 3 turn", "a quaternion"]),
        (np.column_stack([STEADY, HALF_TURNS.as_quat(canonical=True)]), ["dimensions 1 to 4 turn"]),
        (STEADY, []),
        (ANGLES, []),
        ((STEADY > 0) * 1.0, []),
        ((STEADY > 0) * 6.0, []),  # a command in steps
        (HALF_TURNS.as_matrix().reshape(41, 9), []),
    ):
        found = " | ".join(seams(values))
        assert all(word in found for word in words) and bool(found) == bool(words), found


STEADY = np.linspace(-1, 1, 41)[:, None]


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (dict(represent="rotation", rotation="euler_xyz"), [[0, 90.0, 0]], "radians.*degrees"),
        (dict(represent="rotation", rotation="rotvec"), [[0, 90.0, 0]], "radians.*degrees"),
        (dict(represent="rotation", rotation="quaternion_wxyz"), [[0.5, 0, 0, 0.2]], "length 1"),
        (dict(represent="rotation", rotation="matrix"), np.diag([1.0, 1, -1]), "not rotations"),
        (dict(represent="rotation", rotation="matrix"), np.diag([2.0, 2, 2]), "not rotations"),
        (dict(represent="pose"), np.eye(4) + np.outer([0, 0, 0, 1], [0.3, 0, 0, 0]), "transposed"),
        (dict(represent="pose"), np.full((4, 4), np.nan), "fourth row"),
    ],
)
def test_what_is_no_rotation_is_not_taken_for_one(part, values, message):
    stored = {"x": np.stack([np.reshape(values, -1)] * 2)}
    dim = 9 if part["represent"] == "pose" else 6
    with pytest.raises(ValueError, match=message):
        vector(parse((part | dict(stream="x"),)), stored, {}, dim)


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
