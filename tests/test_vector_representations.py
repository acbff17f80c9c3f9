"""Every representation of a vector against scipy, and its way back to the dataset."""

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

from data_pipelines.vectors import mask, parse, read, restore, streams


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
