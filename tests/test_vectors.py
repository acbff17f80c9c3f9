"""Vectors: how a config describes them, what is said when it is wrong, and windows in time."""

import json
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
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
from data_pipelines.representations import Mode
from data_pipelines.vectors import StreamMismatch, dims, mask, modes, parse, read, vector

GOLDEN = np.load(Path(__file__).parent / "golden" / "windows.npz")


def test_widths_and_modes():
    parts = parse(
        (
            dict(stream="eef", represent="pose", normalize="SQUASH"),
            dict(stream="joints"),
            dict(pad=2),
            dict(stream="rotation rotvec", represent="rotation", rotation="rotvec"),
            dict(stream="grip", represent="gripper", closed=0, open=1, normalize="IDENTITY"),
        )
    )
    assert dims(parts, 25) == (9, 7, 2, 6, 1)
    expected = [Mode.SQUASH] * 3 + [Mode.IDENTITY] * 6 + [Mode.VARIANCE] * 7 + [Mode.IDENTITY] * 9
    assert modes(parts, 25) == tuple(expected)
    assert mask(parts, 25).tolist() == [True] * 16 + [False] * 2 + [True] * 7
    with pytest.raises(ValueError, match=r"says 18 dimensions, but the parts have eef 9, joints 1"):
        dims(parts, 18)
    with pytest.raises(ValueError, match=r"says 8 dimensions, but the parts have eef 9: change"):
        dims(parts[:1], 8)
    with pytest.raises(ValueError, match=r"parts \['joints', 'action'\] are unknown.*`columns`"):
        dims(parse((dict(stream="joints"), dict(stream="action"))), 14)


def test_a_description_survives_a_config_and_json():
    described = (dict(stream="eef", represent="pose"), dict(stream="action", columns=(0, 1)))
    config = ConfigDict(dict(action=described))
    stored = json.loads(config.to_json())["action"]
    assert parse(config.action) == parse(stored) == parse(described)
    assert parse((ConfigDict(described[0]),)) == parse(described[:1])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (dict(stream="a", frob=1), r"values has no \['frob'\]; it takes"),
        (dict(stream="a", represent="6d"), "represent must be one of values, .* got '6d'"),
        (dict(represent="pose"), r"pose also needs \['stream'\]"),
        (dict(stream="a", represent="delta"), r"delta also needs \['base'\]"),
        (dict(stream="a", represent="gripper", closed=0), r"also needs \['open'\]"),
        (dict(stream="a", represent="gripper", closed=0, open=0), "closed and open must differ"),
        (dict(stream="a", represent="gripper", closed="0", open=1), "closed must be a number"),
        (dict(stream="a", represent="rotation"), r"needs \['rotation'\]"),
        (
            dict(stream="a", represent="rotation", rotation="rpy"),
            "rotation must be one of matrix, .*'rpy'",
        ),
        (dict(stream="a", base="b"), r"values has no \['base'\]"),
        (dict(stream="a", columns=3), "columns must be different whole numbers"),
        (dict(stream="a", columns=(1, 1)), "columns must be different whole numbers"),
        (dict(stream="a", columns=(0.5,)), "columns must be different whole numbers"),
        (dict(stream="a", columns=()), "columns must be different whole numbers"),
        (dict(stream="a", columns=(0.0, 1.0)), "columns must be different whole numbers"),
        (dict(stream="a", columns=(float("nan"),)), "columns must be different whole numbers"),
        (dict(stream="a", columns=(float("inf"),)), "columns must be different whole numbers"),
        (dict(pad=2.0), "pad must be a whole number"),
        (dict(stream="a", represent="gripper", closed=float("nan"), open=1), "closed must be a nu"),
        (dict(stream="a", shift=float("inf")), "shift must be a number"),
        (dict(stream="a", wrap=(-float("inf"), 0)), "wrap must be the smallest"),
        (
            dict(stream="a", represent="rotation", rotation="rotvec", columns=(1, 2)),
            "rotation rotvec is stored in 3 numbers",
        ),
        (dict(stream="a", represent="pose", columns=(1, 2, 3)), "pose .*in 16 numbers"),
        (dict(stream=("a", "b")), "two streams are the position and the rotation of a pose"),
        (dict(stream=("a", "b"), represent="pose"), "they need `rotation`"),
        (dict(stream=("a", "b", "c"), represent="pose", rotation="rotvec"), "stream must be"),
        (dict(stream=""), "stream must be a stream's name"),
        (dict(stream="a", interpolation="pose"), "interpolation of values must be one of nearest"),
        (
            dict(stream="a", represent="pose", interpolation="linear"),
            "interpolation of pose must be one of",
        ),
        (dict(stream="a", normalize="MINMAX"), "normalize must be one of VARIANCE, .* 'MINMAX'"),
        (
            dict(stream="a", represent="rotation", rotation="rotvec", normalize="VARIANCE"),
            r"has no \['normalize'\]",
        ),
        (dict(pad=0), "pad must be a whole number of dimensions, got 0"),
        (dict(pad=3, stream="a"), r"pad has no \['stream'\]"),
        (dict(stream="a", shift="soon"), "shift must be a number"),
    ],
)
def test_wrong_parts_are_explained(part, message):
    with pytest.raises(ValueError, match=rf"^part 1 of action, .*{message}") as error:
        parse((dict(stream="fine"), part), "action")
    assert "\n" not in str(error.value)


def test_wrong_descriptions_are_explained():
    for given in (dict(stream="a"), ("a", "b"), 3):
        with pytest.raises(ValueError, match="action must be a stream's name or"):
            parse(given, "action")


@pytest.mark.parametrize(
    ("part", "dim", "message"),
    [
        (dict(stream="nose"), 3, "'nose'"),
        (dict(stream="joints"), 6, "stream 'joints' has 7 dimensions, but policy_io says 6"),
        (dict(stream="joints", columns=(0, 7)), 2, "has 7 dimensions, so no column 7"),
        (dict(stream="joints", represent="pose"), 9, "'joints' has 7 dimensions, .* says 16"),
        (dict(stream="joints", represent="delta", base="position"), 7, "'position' has 3 dim"),
        (dict(stream="label"), 1, "'label' is a camera or text"),
        (dict(stream=("joints", "rotation rotvec"), represent="pose", rotation="rotvec"), 9, "7"),
    ],
)
def test_streams_that_do_not_fit_are_named(part, dim, message):
    with pytest.raises(StreamMismatch, match=message):
        read_parts(part, dim=dim)


def test_what_is_no_rotation_is_an_error_of_the_episode():
    episode = {"q": Stream(TIMES, np.zeros((N, 4)))}
    part = dict(stream="q", represent="rotation", rotation="quaternion_xyzw")
    with pytest.raises(ValueError, match="quaternions must have length 1") as error:
        read(parse((part,)), episode, TIMES[:1], 6, horizon=1, fps=HZ)
    assert not isinstance(error.value, StreamMismatch)


# In time: the release's windows, interpolation, clocks of their own, padding.


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


@pytest.mark.parametrize(
    ("part", "unturned", "good", "bad"),
    [
        (dict(represent="pose"), np.eye(4), [(16,), (4, 4), (1, 16)], [(2, 8), (8, 2)]),
        (dict(represent="rotation", rotation="matrix"), np.eye(3), [(9,), (3, 3)], [(9, 9)]),
        (
            dict(represent="rotation", rotation="quaternion_xyzw"),
            [0.0, 0, 0, 1],
            [(4,), (1, 4)],
            [(2, 2)],
        ),
        (
            dict(represent="pose", rotation="matrix"),
            [0.0, 0, 0, *np.eye(3).ravel()],
            [(12,)],
            [(3, 4), (4, 3)],
        ),
    ],
)
def test_a_shape_is_not_its_total_size(part, unturned, good, bad):
    """A 3x4 pose has as many numbers as a position and a matrix, in another order."""
    parts = parse((dict(stream="x", **part),))
    dim = 6 if part["represent"] == "rotation" else 9
    for shape in good + bad:
        numbers = {"x": np.stack([np.resize(unturned, shape)] * 5)}
        if shape in good:
            assert vector(parts, numbers, {}, dim).shape == (5, dim)
        else:
            with pytest.raises(StreamMismatch, match="'x' has"):
                vector(parts, numbers, {}, dim)
