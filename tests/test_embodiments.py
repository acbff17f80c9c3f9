"""Every embodiment reads the streams it documents, and its predictions go back to them."""

import importlib
import pkgutil

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from data_pipelines import embodiments
from data_pipelines.episode import Stream
from data_pipelines.representations import Mode
from data_pipelines.vectors import bases, mask, modes, parse, read, restore, streams, vector

N = 20
RNG = np.random.default_rng(0)
ROTATION = Rotation.from_rotvec(RNG.normal(size=(N, 3)) * 0.5)


def _poses():
    poses = np.tile(np.eye(4), (N, 1, 1))
    poses[:, :3, :3] = Rotation.from_rotvec(RNG.normal(size=(N, 3)) * 0.5).as_matrix()
    poses[:, :3, 3] = RNG.normal(size=(N, 3))
    return poses


def _numbers(width):
    return RNG.uniform(0, 1, size=(N, width))


EULER = np.concatenate([_numbers(3), ROTATION.as_euler("xyz")], 1)
BRIDGE = {"eef_pose_lowdim": _poses()}
BRIDGE |= {f"gripper_{what}_lowdim": _numbers(1) for what in ("state", "action")}
BRIDGE_RAW = {
    "eef_transform": _poses(),
    "gripper_action": _numbers(1),
    "gripper_state": _numbers(1),
}
LIBERO = {
    "eef_pos_ref_delta_lowdim": _numbers(3),
    "eef_rot_ref_delta_lowdim": ROTATION.as_matrix(),
    "gripper_action_lowdim": _numbers(1),
    "eef_pos_lowdim": _numbers(3),
    "eef_rot_lowdim": ROTATION.as_quat(canonical=True),
    "gripper_lowdim": _numbers(1),
}
LIBERO_HDF5 = {
    "actions": _numbers(7),
    "obs/ee_pos": _numbers(3),
    "obs/ee_ori": ROTATION.as_rotvec(),
    "obs/gripper_states": _numbers(2),
}
LIBERO_LEROBOT = {"action": _numbers(7), "observation.state": _numbers(8)}
REGENERATED = LIBERO_HDF5 | {"obs/ee_ori": ROTATION.as_quat(canonical=True)}
DROID = {
    f"steps/{where}/{what}": values
    for where in ("action_dict", "observation")
    for what, values in (("cartesian_position", EULER), ("gripper_position", _numbers(1)))
}
DROID_JOINTS = {
    f"steps/{where}/{what}": _numbers(width)
    for where in ("action_dict", "observation")
    for what, width in (("joint_position", 7), ("gripper_position", 1))
}
HANDS = {f"{side}_hand_{what}": 16 for side in ("left", "right") for what in ("action", "joints")}
BIMANUAL = {f"{side}_eef_pose": _poses() for side in ("left", "right")}
BIMANUAL |= {name: _numbers(width) for name, width in HANDS.items()}
RIGHT = {name: values for name, values in BIMANUAL.items() if name.startswith("right")}
PLAIN = {4: {name: _numbers(4) for name in ("action", "observation.state")}}
PLAIN[14] = {name: _numbers(14) for name in ("action", "observation.state")}

# module, which of its descriptions, the streams it documents, width of action and proprioception
EMBODIMENTS = [
    ("widowx", "", BRIDGE, 10, 10),
    ("widowx", "RAW_", BRIDGE_RAW, 10, 10),
    ("libero_panda", "", LIBERO, 10, 10),
    ("libero_panda", "HDF5_", LIBERO_HDF5, 10, 10),
    ("libero_panda", "LEROBOT_", LIBERO_LEROBOT, 10, 10),
    ("metaworld_sawyer", "", PLAIN[4], 4, 4),
    ("droid_franka", "", DROID, 10, 10),
    ("droid_franka", "JOINT_", DROID_JOINTS, 8, 8),
    ("aloha", "", PLAIN[14], 14, 14),
    ("aloha", "DELTA_", PLAIN[14], 14, 14),
    ("mimic_bimanual", "", BIMANUAL, 50, 59),
    ("mimic_bimanual", "RIGHT_", RIGHT, 50, 59),
]


def _described(module, name):
    return parse(getattr(importlib.import_module(f"data_pipelines.embodiments.{module}"), name))


def test_no_embodiment_is_left_out():
    files = {module.name for module in pkgutil.iter_modules(embodiments.__path__)}
    assert files == {name for name, *_ in EMBODIMENTS}


@pytest.mark.parametrize(("module", "which", "values", "action", "proprio"), EMBODIMENTS)
def test_an_episode_becomes_vectors(module, which, values, action, proprio):
    times = np.arange(N, dtype=np.int64) * 50_000_000
    episode = {name: Stream(times, value) for name, value in values.items()}
    used = set()
    for name, dim, look in (("ACTION", action, "future"), ("PROPRIO", proprio, "past")):
        parts = _described(module, which + name)
        numbers, padded = read(parts, episode, times[3:6], dim, horizon=4, fps=20, look=look)
        assert numbers.shape == (3, 4, dim) and np.isfinite(numbers).all() and not padded.any()
        assert (numbers[..., ~mask(parts, dim)] == 0).all()
        used |= {*streams(parts), *bases(parts)}
    assert used == set(values)


@pytest.mark.parametrize(("module", "which", "values", "action", "proprio"), EMBODIMENTS)
def test_predictions_go_back_to_the_streams(module, which, values, action, proprio):
    parts = _described(module, which + "ACTION")
    chunk = {name: values[name][8:12] for name in streams(parts)}
    now = {name: values[name][7] for name in bases(parts)}
    restored = restore(parts, vector(parts, chunk, now, action), now)
    assert restored.keys() == chunk.keys()
    for name, value in restored.items():
        np.testing.assert_allclose(value, chunk[name], atol=1e-6)


@pytest.mark.parametrize("name", ["widowx", "libero_panda", "droid_franka"])
def test_one_arm_is_position_rotation_gripper(name):
    """The layout of the released statistics; of it only the rotation is not normalised."""
    expected = (Mode.VARIANCE,) * 3 + (Mode.IDENTITY,) * 6 + (Mode.VARIANCE,)
    for which in ("ACTION", "PROPRIO"):
        assert modes(_described(name, which), 10) == expected


def test_liberos_files_and_the_release_agree():
    """The same demonstration, as LIBERO stores it and as the release does."""
    deltas = ROTATION.as_rotvec()
    columns = [LIBERO["eef_pos_ref_delta_lowdim"], deltas, LIBERO["gripper_action_lowdim"]]
    hdf5 = REGENERATED | {"actions": np.concatenate(columns, axis=1)}
    hdf5["obs/ee_pos"] = LIBERO["eef_pos_lowdim"]
    hdf5["obs/gripper_states"][:, :1] = LIBERO["gripper_lowdim"]
    for ours, theirs in (("HDF5_ACTION", "ACTION"), ("REGENERATED_PROPRIO", "PROPRIO")):
        np.testing.assert_allclose(
            vector(_described("libero_panda", ours), hdf5, {}, 10),
            vector(_described("libero_panda", theirs), LIBERO, {}, 10),
            atol=1e-6,
        )


def test_a_missing_arm_is_padded_in_the_layout_of_two():
    whole, right = (
        _described("mimic_bimanual", "ACTION"),
        _described("mimic_bimanual", "RIGHT_ACTION"),
    )
    now = {name: BIMANUAL[name][0] for name in bases(whole)}
    both, one = (vector(parts, BIMANUAL, now, 50) for parts in (whole, right))
    present = mask(right, 50)
    np.testing.assert_array_equal(np.flatnonzero(~present), [*range(9), *range(18, 34)])
    np.testing.assert_array_equal(one[:, present], both[:, present])
