"""Vectors in time: the release's windows, interpolation, clocks of their own, padding."""

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from vector_streams import (
    HZ,
    POSITION,
    QUATERNION,
    ROTATION,
    TIMES,
    VALUES,
    N,
    poses,
    read_parts,
    six_numbers,
)

from data_pipelines.episode import Stream
from data_pipelines.vectors import parse, read

GOLDEN = np.load(Path(__file__).parent / "golden" / "windows.npz")


def test_the_published_bridge_windows_are_reproduced():
    """Poses interpolated, relative to the last observed one, as position and 6-D rotation."""
    pose = dict(stream="pose", represent="relative_pose", base="pose", interpolation="pose")
    grip = dict(stream="gripper", columns=(0,), interpolation="linear")
    episode = {
        name: Stream(GOLDEN[f"root.{name}_timestamps"], GOLDEN[f"root.{name}"])
        for name in ("pose", "gripper")
    }
    anchors = GOLDEN["root.rgb_timestamps"][GOLDEN["anchor_indices"]]
    window = dict(horizon=15, fps=5, shift=0.2)
    values, _ = read(parse((pose,)), episode, anchors, 9, **window)
    expected = GOLDEN["relative.action/pose"]
    np.testing.assert_allclose(values[..., :3], expected[..., :3, 3], atol=1e-6)
    np.testing.assert_allclose(values[..., 3:], GOLDEN["rot6d.action/pose"], atol=1e-6)
    gripper, _ = read(parse((grip,)), episode, anchors, 1, horizon=9, fps=20)
    error = gripper - GOLDEN["chunk.action/gripper"]  # the release rounds instants to 256 ns
    assert np.sqrt(np.mean(error**2) / np.mean(gripper**2)) < 1e-6


def test_shift_and_interpolation_belong_to_a_part():
    previous, _ = read_parts(dict(stream="joints", shift=-0.1), dim=7)
    np.testing.assert_array_equal(previous[1], VALUES["joints"][7:12])
    ramp = {"ramp": Stream(TIMES, np.arange(N, dtype=float))}
    for how, expected in (("nearest", 1.0), ("previous", 0.0), ("linear", 0.7)):
        parts = parse((dict(stream="ramp", interpolation=how, shift=0.07),))
        values, _ = read(parts, ramp, TIMES[:1], 1, horizon=1, fps=HZ)
        assert values.item() == pytest.approx(expected)


def test_rotations_turn_evenly_between_stored_ones():
    turn = Rotation.from_rotvec(np.arange(N)[:, None] * [0, 0, 0.5])
    line = np.arange(N)[:, None] * [1.0, 2.0, 0.0]
    episode = {"pose": Stream(TIMES, poses(line, turn)), "q": Stream(TIMES, turn.as_quat())}
    at = dict(horizon=1, fps=HZ, shift=0.03)
    pose, _ = read(
        parse((dict(stream="pose", represent="pose", interpolation="pose"),)),
        episode, TIMES[4:5], 9, **at,
    )  # fmt: skip
    part = dict(stream="q", represent="rotation", rotation="quaternion_xyzw")
    rotation, _ = read(
        parse((part | dict(interpolation="quaternion"),)), episode, TIMES[4:5], 6, **at
    )
    expected = six_numbers(Rotation.from_rotvec([[0, 0, 4.3 * 0.5]]))
    np.testing.assert_allclose(pose[0, 0], [4.3, 8.6, 0, *expected[0]], atol=1e-6)
    np.testing.assert_allclose(rotation[0], expected, atol=1e-6)


def test_position_and_rotation_may_have_clocks_of_their_own():
    slow = TIMES[::2]
    episode = {"p": Stream(slow, POSITION[::2]), "q": Stream(TIMES, QUATERNION)}
    part = dict(stream=("p", "q"), represent="pose", rotation="quaternion_xyzw")
    values, padded = read(parse((part,)), episode, TIMES[[3]], 9, horizon=3, fps=HZ)
    np.testing.assert_allclose(values[0, :, 3:], six_numbers(ROTATION[3:6]), atol=1e-6)
    np.testing.assert_allclose(values[0, :, :3], POSITION[[2, 4, 4]], atol=1e-6)
    assert not padded.any()
    _, padded = read(parse((part,)), episode, TIMES[[37]], 9, horizon=3, fps=HZ)
    np.testing.assert_array_equal(padded[0], [False, False, True])  # 3.8 s is the last position


def test_padding_is_where_any_stream_has_ended():
    values, padded = read_parts(dict(stream="joints"), dict(pad=1), dim=8, horizon=12)
    np.testing.assert_array_equal(padded.sum(1), [0, 0, 3])
    np.testing.assert_array_equal(values[2, -3:, :7], VALUES["joints"][[39] * 3])
    past, padded = read_parts(dict(stream="joints"), dim=7, look="past", shift=0.0, horizon=3)
    np.testing.assert_array_equal(past[0], VALUES["joints"][[0, 0, 0]])
    np.testing.assert_array_equal(padded[0], [True, True, False])
    np.testing.assert_array_equal(past[1], VALUES["joints"][5:8])
