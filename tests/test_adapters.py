"""Existing clients' observations as the policy sees them, and their actions back."""

from itertools import count

import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy.spatial.transform import Rotation

from configs import libero_action
from data_pipelines.embodiments import aloha, droid_franka, libero_panda
from mvjax.serving.adapters import make_adapter, policy_vectors
from mvjax.serving.session import RequestError, Session, SessionSpec

PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
SENSES = SessionSpec(observed_frames=5, proprio_horizon=1)


def config_of(proprio, action, proprio_dim, action_dim):
    robot = dict(embodiment="arm", action=action, proprio=proprio)
    io = dict(action=dict(dim=action_dim), proprio=dict(dim=proprio_dim))
    return ConfigDict(dict(datasets=dict(robot=robot), policy_io=io, embodiment=""))


def session_of(client, *config):
    return Session(make_adapter(client, policy_vectors(config_of(*config))), SENSES, count())


def libero_message(pos=(0.1, 0.2, 1.0), rotvec=(3.0, 0.2, 0.1), fingers=(0.03, -0.03), **more):
    return {
        "observation/image": PICTURE,
        "observation/wrist_image": PICTURE,
        "observation/state": np.array([*pos, *rotvec, *fingers]),
        "prompt": "pick up the black bowl and place it on the plate",
        **more,
    }


def test_libero_as_the_release_sees_it():
    """The published layout: position, two rows of the rotation, first finger."""
    adapter = make_adapter("libero", policy_vectors(libero_action.get_config("goal")))
    session = Session(adapter, SENSES, count())
    message = libero_message()
    seen = session.observe(message)
    rotation = Rotation.from_rotvec([3.0, 0.2, 0.1]).as_matrix()
    expected = np.concatenate([[0.1, 0.2, 1.0], rotation[:2].ravel(), [0.03]])
    np.testing.assert_allclose(seen.observation.proprio, expected[None], atol=1e-6)
    assert seen.observation.proprio.dtype == np.float32
    assert seen.observation.instruction == "pick up the bowl and place it on the plate"
    np.testing.assert_array_equal(seen.observation.frames, np.stack([PICTURE] * 5))


def test_libero_actions_are_what_the_simulator_takes():
    session = session_of("libero", libero_panda.PROPRIO, libero_panda.ACTION, 10, 10)
    rotvec = np.array([[0.1, -0.2, 0.3], [0, 0, 0], [-1.0, 0.5, 0.2]])
    rows = Rotation.from_rotvec(rotvec).as_matrix()[:, :2].reshape(3, 6)
    position, grip = np.arange(9.0).reshape(3, 3), np.array([[0.2], [-0.7], [1.1]])
    chunk = np.concatenate([position, 1.7 * rows, grip], axis=1).astype(np.float32)
    seen = session.observe(libero_message())
    expected = np.concatenate([position, rotvec, [[1], [-1], [1]]], axis=1)
    actions = session.actions(chunk, seen)
    assert actions.dtype == np.float32 and actions.shape == (3, 7)
    np.testing.assert_allclose(actions, expected, atol=1e-6)


def test_libero_in_the_clients_own_numbers():
    session = session_of("libero", "observation.state", "action", 8, 7)
    seen = session.observe(libero_message())
    np.testing.assert_allclose(seen.observation.proprio[0], libero_message()["observation/state"])
    assert "black bowl" in seen.observation.instruction
    chunk = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)
    np.testing.assert_array_equal(session.actions(chunk, seen), chunk)


def test_libero_episodes_begin_where_the_arm_jumps_home():
    """The client asks with the same prompt and connection through all episodes of a task."""
    session = session_of("libero", libero_panda.PROPRIO, libero_panda.ACTION, 10, 10)
    for x in (0.0, 0.1, 0.2):
        seen = session.observe(libero_message(pos=(x, 0, 1), **{"observation/image": PICTURE + 1}))
    assert (seen.observation.frames == PICTURE + 1).all()
    seen = session.observe(libero_message(pos=(-0.2, 0, 1.2)))
    assert (seen.observation.frames == PICTURE).all()


def droid_message(joints=(0, 1, 2, 3, 4, 5, 6), gripper=(0.5,), **more):
    return {
        "observation/exterior_image_1_left": PICTURE,
        "observation/wrist_image_left": PICTURE,
        "observation/joint_position": np.array(joints, float),
        "observation/gripper_position": np.array(gripper),
        "prompt": "do something",
        **more,
    }


def test_droid_as_its_client_sends_it():
    session = session_of("droid", "state", "action", 8, 8)
    for gripper in ((0.5,), 0.5):
        seen = session.observe(droid_message(gripper=gripper))
        np.testing.assert_array_equal(seen.observation.proprio, [[0, 1, 2, 3, 4, 5, 6, 0.5]])
    chunk = np.random.default_rng(0).normal(size=(15, 8)).astype(np.float32)
    np.testing.assert_array_equal(session.actions(chunk, seen), chunk)
    with pytest.raises(RequestError, match=r"have \[6, 1\] numbers; together they must be 8"):
        session.observe(droid_message(joints=range(6)))


def test_droid_poses_relative_to_the_present_one():
    """A policy of the repository's DROID embodiment, whose client sends and takes poses."""
    session = session_of("droid", droid_franka.PROPRIO, droid_franka.ACTION, 10, 10)
    pose = np.array([0.4, 0.1, 0.3, 3.0, 0.1, -0.4])
    message = droid_message() | {"observation/cartesian_position": pose}
    seen = session.observe(message)
    now = Rotation.from_euler("xyz", pose[3:])
    expected = np.concatenate([pose[:3], now.as_matrix()[:2].ravel(), [0.5]])
    np.testing.assert_allclose(seen.observation.proprio[0], expected, atol=1e-6)
    step, turn = np.array([0.01, 0.02, 0.03]), Rotation.from_rotvec([0.1, 0, 0.2])
    chunk = np.concatenate([step, turn.as_matrix()[:2].ravel(), [0.25]])[None].astype(np.float32)
    actions = session.actions(chunk, seen)[0]
    np.testing.assert_allclose(actions[:3], pose[:3] + now.apply(step), atol=1e-6)
    found = Rotation.from_euler("xyz", actions[3:6])
    np.testing.assert_allclose(found.as_matrix(), (now * turn).as_matrix(), atol=1e-6)
    assert actions[6] == pytest.approx(0.75)  # DROID's gripper is 1 closed


def aloha_message(state, **more):
    cameras = dict.fromkeys(("cam_high", "cam_low"), PICTURE.transpose(2, 0, 1))
    return {"state": np.asarray(state, float), "images": cameras, "prompt": "fold", **more}


def test_aloha_pictures_come_channels_first():
    session = session_of("aloha", aloha.PROPRIO, aloha.ACTION, 14, 14)
    seen = session.observe(aloha_message(range(14)))
    np.testing.assert_array_equal(seen.observation.frames, np.stack([PICTURE] * 5))
    np.testing.assert_array_equal(seen.observation.proprio, [range(14)])
    chunk = np.random.default_rng(0).normal(size=(3, 14)).astype(np.float32)
    np.testing.assert_allclose(session.actions(chunk, seen), chunk)
    with pytest.raises(RequestError, match="no 'images/cam_high'; it has 'cam_low'"):
        session.observe(aloha_message(range(14), images={"cam_low": PICTURE}))


def test_aloha_joints_relative_to_the_present_ones_become_absolute():
    deltas = tuple(dict(p, represent="delta", base="observation.state") for p in aloha.ACTION)
    session = session_of("aloha", aloha.PROPRIO, deltas, 14, 14)
    seen = session.observe(aloha_message(range(14)))
    chunk = np.full((2, 14), 0.5, np.float32)
    np.testing.assert_allclose(session.actions(chunk, seen), [np.arange(14) + 0.5] * 2)


def test_clients_that_do_not_fit_the_policy_are_refused():
    metaworld = policy_vectors(config_of("state", "action", 4, 4))
    for client, numbers in (("libero", 8), ("aloha", 14), ("droid", 8)):
        words = f"--client={client} has {numbers} numbers of state, but .* trained with 4"
        with pytest.raises(ValueError, match=words):
            make_adapter(client, metaworld)
    with pytest.raises(ValueError, match="one of plain, libero, aloha, droid, got 'gr00t'"):
        make_adapter("gr00t", metaworld)


def test_the_body_that_acts_is_the_configurations():
    config = config_of("state", "action", 4, 4)
    config.datasets.video = dict(embodiment="human", action="", proprio="")
    assert policy_vectors(config).action[0].streams == ("action",)
    config.datasets.other = dict(embodiment="hand", action="grasp", proprio="state")
    config.embodiment = "hand"
    assert policy_vectors(config).action[0].streams == ("grasp",)
