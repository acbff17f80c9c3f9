"""Vectors against the release's windows and against scipy, and their way back to the dataset."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy.spatial.transform import Rotation

from data_pipelines.episode import Stream
from data_pipelines.normalization.normalizer import Mode
from data_pipelines.vectors.parts import bases, dims, mask, modes, parse, streams
from data_pipelines.vectors.vector import StreamMismatch, read, restore, vector

GOLDEN = np.load(Path(__file__).parent / "golden" / "windows.npz")
RNG = np.random.default_rng(0)
N, HZ = 40, 10
TIMES = np.arange(N, dtype=np.int64) * (10**9 // HZ)
ROTATION = Rotation.from_rotvec(RNG.normal(size=(N, 3)))
POSITION = RNG.normal(size=(N, 3))
QUATERNION = ROTATION.as_quat()
STORED = {
    "matrix": ROTATION.as_matrix(),
    "quaternion_xyzw": QUATERNION,
    "quaternion_wxyz": QUATERNION[:, [3, 0, 1, 2]],
    "rotvec": ROTATION.as_rotvec(),
    "euler_xyz": ROTATION.as_euler("xyz"),
}


def _poses(position=POSITION, rotation=ROTATION):
    poses = np.tile(np.eye(4), (N, 1, 1))
    poses[:, :3, :3], poses[:, :3, 3] = rotation.as_matrix(), position
    return poses


def _six(rotation):
    return rotation.as_matrix()[..., :2, :].reshape(-1, 6)


VALUES = {
    "eef": _poses(),
    "position": POSITION,
    **{f"rotation {form}": values for form, values in STORED.items()},
    **{
        f"pose {form}": np.concatenate([POSITION, values.reshape(N, -1)], 1)
        for form, values in STORED.items()
    },
    "joints": RNG.normal(size=(N, 7)).astype(np.float32),
    "joint_state": RNG.normal(size=(N, 7)),
    "grip": RNG.uniform(0, 0.08, size=N),
    "action": RNG.normal(size=(N, 7)),
    "other": _poses(RNG.normal(size=(N, 3)), Rotation.random(N, random_state=1)),
    "label": np.array(["reach"] * N),
}
EPISODE = {name: Stream(TIMES, values) for name, values in VALUES.items()}
# With 1 / HZ between instants and anchors at stored times, windows are slices.
WINDOW = dict(horizon=5, fps=HZ, shift=0.1)
ANCHORS = TIMES[[0, 7, 30]]


def _read(*parts, dim, **window):
    parts = parse(parts)
    return read(parts, EPISODE, ANCHORS, dim, **(WINDOW | window))


def _there_and_back(parts, dim, now=3):
    """Vectors of the instants after `now`, and the streams that come of them again."""
    parts = parse(parts)
    values = {name: VALUES[name][now + 1 : now + 6] for name in streams(parts)}
    base = {name: VALUES[name][now] for name in bases(parts)}
    numbers = vector(parts, values, base, dim)
    assert numbers.shape == (5, dim) and numbers.dtype == np.float32
    return values, numbers, restore(parts, numbers, base)


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
    values, _ = _read(part, dim=6)
    np.testing.assert_allclose(values[1], _six(ROTATION[8:13]), atol=1e-6)
    given, _, restored = _there_and_back((part,), 6)
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
    values, _ = _read(part, dim=9)
    poses = _poses()[8:13]
    if represent == "relative_pose":
        poses = np.linalg.inv(_poses()[7]) @ poses
    np.testing.assert_allclose(values[1, :, :3], poses[:, :3, 3], atol=1e-5)
    np.testing.assert_allclose(values[1, :, 3:].reshape(5, 2, 3), poses[:, :2, :3], atol=1e-6)

    given, _, restored = _there_and_back((part,), 9)
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
    values, _ = _read(*parts, dim=8)
    joints, grip = VALUES["joints"][8:13, :3], VALUES["grip"][8:13]
    expected = [joints - VALUES["joint_state"][7, :3], 1 - grip[:, None] / 0.08, np.zeros((5, 2))]
    expected += [np.clip((grip[:, None] - 0.02) / 0.04, 0, 1), grip[:, None] >= 0.04]
    np.testing.assert_allclose(values[1], np.concatenate(expected, 1), atol=1e-6)
    np.testing.assert_array_equal(mask(parse(parts), 8), [1, 1, 1, 1, 0, 0, 1, 1])

    given, _, restored = _there_and_back(parts[:3], 6)
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
    given, numbers, restored = _there_and_back(parts, 10)
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
    values, _ = _read(*parts, dim=25)
    np.testing.assert_array_equal(values[..., :9], _read(parts[0], dim=9)[0])
    np.testing.assert_array_equal(values[..., 9:18], _read(parts[1], dim=9)[0])
    given, _, restored = _there_and_back(parts, 25)
    for name, value in given.items():
        np.testing.assert_allclose(restored[name], value, atol=1e-6)
    # One effector as the other one sees it.
    seen, _ = _read(dict(stream="eef", represent="relative_pose", base="other"), dim=9)
    relative = np.linalg.inv(VALUES["other"][7]) @ VALUES["eef"][8:13]
    np.testing.assert_allclose(seen[1, :, :3], relative[:, :3, 3], atol=1e-5)


def test_shift_and_interpolation_belong_to_a_part():
    previous, _ = _read(dict(stream="joints", shift=-0.1), dim=7)
    np.testing.assert_array_equal(previous[1], VALUES["joints"][7:12])
    ramp = {"ramp": Stream(TIMES, np.arange(N, dtype=float))}
    for how, expected in (("nearest", 1.0), ("previous", 0.0), ("linear", 0.7)):
        parts = parse((dict(stream="ramp", interpolation=how, shift=0.07),))
        values, _ = read(parts, ramp, TIMES[:1], 1, horizon=1, fps=HZ)
        assert values.item() == pytest.approx(expected)


def test_rotations_turn_evenly_between_stored_ones():
    turn = Rotation.from_rotvec(np.arange(N)[:, None] * [0, 0, 0.5])
    line = np.arange(N)[:, None] * [1.0, 2.0, 0.0]
    episode = {"pose": Stream(TIMES, _poses(line, turn)), "q": Stream(TIMES, turn.as_quat())}
    at = dict(horizon=1, fps=HZ, shift=0.03)
    pose, _ = read(
        parse((dict(stream="pose", represent="pose", interpolation="pose"),)),
        episode, TIMES[4:5], 9, **at,
    )  # fmt: skip
    part = dict(stream="q", represent="rotation", rotation="quaternion_xyzw")
    rotation, _ = read(
        parse((part | dict(interpolation="quaternion"),)), episode, TIMES[4:5], 6, **at
    )
    expected = _six(Rotation.from_rotvec([[0, 0, 4.3 * 0.5]]))
    np.testing.assert_allclose(pose[0, 0], [4.3, 8.6, 0, *expected[0]], atol=1e-6)
    np.testing.assert_allclose(rotation[0], expected, atol=1e-6)


def test_position_and_rotation_may_have_clocks_of_their_own():
    slow = TIMES[::2]
    episode = {"p": Stream(slow, POSITION[::2]), "q": Stream(TIMES, QUATERNION)}
    part = dict(stream=("p", "q"), represent="pose", rotation="quaternion_xyzw")
    values, padded = read(parse((part,)), episode, TIMES[[3]], 9, horizon=3, fps=HZ)
    np.testing.assert_allclose(values[0, :, 3:], _six(ROTATION[3:6]), atol=1e-6)
    np.testing.assert_allclose(values[0, :, :3], POSITION[[2, 4, 4]], atol=1e-6)
    assert not padded.any()
    _, padded = read(parse((part,)), episode, TIMES[[37]], 9, horizon=3, fps=HZ)
    np.testing.assert_array_equal(padded[0], [False, False, True])  # 3.8 s is the last position


def test_padding_is_where_any_stream_has_ended():
    values, padded = _read(dict(stream="joints"), dict(pad=1), dim=8, horizon=12)
    np.testing.assert_array_equal(padded.sum(1), [0, 0, 3])
    np.testing.assert_array_equal(values[2, -3:, :7], VALUES["joints"][[39] * 3])
    past, padded = _read(dict(stream="joints"), dim=7, look="past", shift=0.0, horizon=3)
    np.testing.assert_array_equal(past[0], VALUES["joints"][[0, 0, 0]])
    np.testing.assert_array_equal(padded[0], [True, True, False])
    np.testing.assert_array_equal(past[1], VALUES["joints"][5:8])


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
    with pytest.raises(ValueError, match=r"says 8 dimensions, but the parts have eef 9$"):
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
        (dict(pad=0), "pad must be a number of dimensions, got 0"),
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
        _read(part, dim=dim)


def test_what_is_no_rotation_is_an_error_of_the_episode():
    episode = {"q": Stream(TIMES, np.zeros((N, 4)))}
    part = dict(stream="q", represent="rotation", rotation="quaternion_xyzw")
    with pytest.raises(ValueError, match=re.compile("zero norm", re.IGNORECASE)) as error:
        read(parse((part,)), episode, TIMES[:1], 6, horizon=1, fps=HZ)
    assert not isinstance(error.value, StreamMismatch)
