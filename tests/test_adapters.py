"""Existing clients' observations as the policy sees them, and their actions back."""

import json
from contextlib import nullcontext
from itertools import count

import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy.spatial.transform import Rotation

from configs import libero_action
from data_pipelines.embodiments import (
    aloha,
    droid_franka,
    libero_panda,
    metaworld_sawyer,
    widowx,
)
from mvjax.policy.robot import check_gripper, check_suite, check_trained, trained_robot
from mvjax.serving.adapters import make_adapter
from mvjax.serving.messages import RequestError
from mvjax.serving.notices import Notices
from mvjax.serving.session import Session, SessionSpec

PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
LIBERO = libero_panda.PROPRIO, libero_panda.ACTION
GRIPPER = dict(stream="a", columns=(6,), represent="gripper", closed=1.0, open=-1.0)
SENSES = SessionSpec(observed_frames=5, proprio_horizon=1)


def config_of(proprio, action, proprio_dim, action_dim, embodiment="arm", video="front"):
    robot = dict(embodiment=embodiment, action=action, proprio=proprio, video=video)
    io = dict(action=dict(dim=action_dim), proprio=dict(dim=proprio_dim))
    clip = dict(height=480, width=640)
    config = dict(datasets=dict(robot=robot), policy_io=io, embodiment="", clip=clip)
    return ConfigDict(config, type_safe=False)


def session_of(client, *config):
    adapter = make_adapter(client, trained_robot(config_of(*config, embodiment=client)))
    return Session(adapter, SENSES, count(), Notices({}, client))


def shown(seen):
    """The pictures of the only camera."""
    (pictures,) = seen.observation.frames.values()
    return pictures


def libero_message(pos=(0.1, 0.2, 1.0), rotvec=(3.0, 0.2, 0.1), fingers=(0.03, -0.03), **more):
    return {
        "observation/image": PICTURE,
        "observation/wrist_image": PICTURE,
        "observation/state": np.array([*pos, *rotvec, *fingers]),
        "prompt": "pick up the black bowl and place it on the plate",
        **more,
    }


def test_a_state_of_the_policys_own_vector_holds_a_rotation():
    """Not set, a quaternion and zeros, or degrees: as many numbers, and within the data."""
    adapter = make_adapter("plain", trained_robot(config_of(*LIBERO, 10, 10, "libero_panda")))
    state = np.array([[0.1, 0.2, 1.0, 0, 1, 0, -1, 0, 0, 0.03]], np.float32)
    np.testing.assert_array_equal(adapter.proprio(state), state)
    for wrong in ((0, 0, 0, 0, 0, 0), (0.5, 0.5, 0.5, 0.5, 0, 0), (1, 0, 0, 1, 0, 0)):
        state[0, 3:9] = wrong
        with pytest.raises(ValueError, match=r"numbers 3 to 8 must be the first two rows"):
            adapter.proprio(state)


def test_a_robot_of_its_dataset_sends_and_takes_what_was_recorded():
    """Joints that were learned as differences, and a gripper from 0 to 1, are its own again."""
    action = (
        dict(stream="action", columns=(0, 1), represent="delta", base="joints"),
        dict(stream="action", columns=(2,), represent="gripper", closed=0.0, open=100.0),
    )
    adapter = make_adapter("dataset", trained_robot(config_of("force", action, 1, 3)))
    assert adapter.state_size == 3  # a force, and the two joints that actions are relative to
    state = np.array([7.0, 10.0, -20.0], np.float32)
    np.testing.assert_array_equal(adapter.proprio(state[None]), [[7.0]])
    chunk = np.array([[1.0, 2.0, 0.0], [3.0, 4.0, 0.5]], np.float32)
    expected = [[11.0, -18.0, 0.0], [13.0, -16.0, 50.0]]
    np.testing.assert_allclose(adapter.actions(chunk, state), expected)


def test_a_robot_of_its_dataset_needs_all_numbers_of_an_action():
    action = (dict(stream="action", columns=(0, 2)),)
    with pytest.raises(ValueError, match=r"did not learn its columns \[1\]: use --client=plain"):
        make_adapter("dataset", trained_robot(config_of("state", action, 4, 2)))


def test_poses_in_two_streams_are_told_apart_by_a_robot_of_its_dataset():
    pose = dict(stream=("position", "rotation"), rotation="quaternion_xyzw")
    action = (dict(pose, represent="relative_pose", base=("position", "rotation")),)
    proprio = (dict(pose, represent="pose"),)
    adapter = make_adapter("dataset", trained_robot(config_of(proprio, action, 9, 9)))
    state = np.array([0.1, 0.2, 0.3, 0, 0, 0, 1], np.float32)
    assert adapter.state_size == 7
    still = np.array([[0, 0, 0, 1, 0, 0, 0, 1, 0]], np.float32)
    np.testing.assert_allclose(adapter.actions(still, state), state[None], atol=1e-6)


def test_libero_as_the_release_sees_it():
    """The published layout: position, two rows of the rotation, first finger."""
    adapter = make_adapter("libero", trained_robot(libero_action.get_config("goal")))
    session = Session(adapter, SENSES, count(), Notices({}, "client"))
    message = libero_message()
    seen = session.observe(message)
    rotation = Rotation.from_rotvec([3.0, 0.2, 0.1]).as_matrix()
    expected = np.concatenate([[0.1, 0.2, 1.0], rotation[:2].ravel(), [0.03]])
    np.testing.assert_allclose(seen.observation.proprio, expected[None], atol=1e-6)
    assert seen.observation.proprio.dtype == np.float32
    assert seen.observation.instruction == "pick up the bowl and place it on the plate"
    np.testing.assert_array_equal(shown(seen), np.stack([PICTURE] * 5))


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


@pytest.mark.parametrize(
    "config, number",
    [
        (("observation.state", "action", 8, 7), 6),
        ((*LIBERO, 10, 10), 9),
        ((libero_panda.HDF5_PROPRIO, libero_panda.HDF5_ACTION, 10, 10), 9),
        ((libero_panda.LEROBOT_PROPRIO, libero_panda.LEROBOT_ACTION, 10, 10), 9),
        (("state", (dict(stream="a", columns=(6,)), dict(stream="a", columns=range(6))), 8, 7), 0),
        (("state", (dict(stream="a", columns=range(6)), GRIPPER), 8, 7), None),  # converted
    ],
)
def test_where_the_gripper_of_a_libero_policy_is(config, number):
    state, action, *widths = config
    if number in (0, None):
        action = tuple(part | dict(columns=tuple(part["columns"])) for part in action)
    adapter = make_adapter("libero", trained_robot(config_of(state, action, *widths, "libero")))
    assert adapter.signed_gripper == number


def test_a_gripper_from_0_to_1_is_not_sent_to_a_client_with_a_signed_one():
    """Every command would close it; one that only closes has no other number than 1."""
    for least in (-1.0, -0.01, 1.0):
        check_gripper(least, "action[6]", "--client=libero")
    for least in (0.0, 0.04):
        with pytest.raises(ValueError, match=r"learned action\[6\] from data .* never below 0"):
            check_gripper(least, "action[6]", "--client=libero")


def test_libero_episodes_begin_where_the_arm_jumps_home():
    """The client asks with the same prompt and connection through all episodes of a task."""
    session = session_of("libero", libero_panda.PROPRIO, libero_panda.ACTION, 10, 10)
    for x in (0.0, 0.1, 0.2):
        seen = session.observe(libero_message(pos=(x, 0, 1), **{"observation/image": PICTURE + 1}))
    assert (shown(seen) == PICTURE + 1).all()
    seen = session.observe(libero_message(pos=(-0.2, 0, 1.2)))
    assert (shown(seen) == PICTURE).all()


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


def test_droid_joints_relative_to_the_present_ones():
    """The policy of configs/droid_action.py, for a client whose robot executes positions."""
    joints = droid_franka.JOINT_PROPRIO, droid_franka.JOINT_ACTION, 8, 8
    adapter = make_adapter("droid_joint_position", trained_robot(config_of(*joints, "droid")))
    session = Session(adapter, SENSES, count(), Notices({}, "droid_joint_position"))
    seen = session.observe(droid_message(joints=np.linspace(-1, 1, 7), gripper=0.25))
    expected = [*np.linspace(-1, 1, 7), 0.75]  # 1 is open to the policy, closed to DROID
    np.testing.assert_allclose(seen.observation.proprio, [expected], atol=1e-6)
    chunk = np.full((15, 8), 0.125, np.float32)
    actions = session.actions(chunk, seen)
    np.testing.assert_allclose(actions[3], [*(np.linspace(-1, 1, 7) + 0.125), 0.875], atol=1e-6)
    for client, config in (
        ("droid", joints),  # which executes velocities
        ("droid_joint_position", (*droid_joints("joint_velocity"), 8, 8)),
    ):
        with pytest.raises(ValueError, match=f"--client={client} has .* takes actions of joint_"):
            make_adapter(client, trained_robot(config_of(*config, "droid")))


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
    np.testing.assert_array_equal(shown(seen), np.stack([PICTURE] * 5))
    np.testing.assert_array_equal(seen.observation.proprio, [range(14)])
    chunk = np.random.default_rng(0).normal(size=(3, 14)).astype(np.float32)
    np.testing.assert_allclose(session.actions(chunk, seen), chunk)
    with pytest.raises(RequestError, match="no 'images/cam_high'; it has 'cam_low'"):
        session.observe(aloha_message(range(14), images={"cam_low": PICTURE}))


def test_aloha_pictures_of_several_cameras_and_their_histories():
    names = ("cam_high", "cam_left_wrist")
    config = config_of(aloha.PROPRIO, aloha.ACTION, 14, 14, "aloha", names)
    adapter = make_adapter("aloha", trained_robot(config))
    session = Session(adapter, SENSES, count(), Notices({}, "aloha"))
    images = {name: (PICTURE + n).transpose(2, 0, 1) for n, name in enumerate(names)}
    frames = session.observe(aloha_message(range(14), images=images)).observation.frames
    for number, name in enumerate(names):
        np.testing.assert_array_equal(frames[name], np.stack([PICTURE + number] * 5))
    histories = {f"{name}_history": np.stack([PICTURE] * 5) for name in names}
    seen = session.observe(aloha_message(range(14), images=histories))
    assert (*seen.observation.frames,) == names
    with pytest.raises(RequestError, match=r"'images/cam_left_wrist', where .*'cam_left_wrist'"):
        session.observe(aloha_message(range(14)))


def test_aloha_joints_relative_to_the_present_ones_become_absolute():
    deltas = tuple(dict(p, represent="delta", base="observation.state") for p in aloha.ACTION)
    session = session_of("aloha", aloha.PROPRIO, deltas, 14, 14)
    seen = session.observe(aloha_message(range(14)))
    chunk = np.full((2, 14), 0.5, np.float32)
    np.testing.assert_allclose(session.actions(chunk, seen), [np.arange(14) + 0.5] * 2)


JOINTS = ("steps/observation/joint_position", "steps/observation/gripper_position")


def droid_joints(actions):
    streams = (f"steps/action_dict/{actions}", "steps/action_dict/gripper_position")
    numbers = tuple(range(7)), (0,)
    return tuple(
        tuple(dict(stream=name, columns=columns) for name, columns in zip(names, numbers))
        for names in (JOINTS, streams)
    )


@pytest.mark.parametrize(
    "client, config, words",
    [
        # Metres would go out as OSC units, and open would become close.
        ("libero", (widowx.PROPRIO, widowx.ACTION, 10, 10, "widowx"), "trained on 'widowx'"),
        ("libero", (widowx.PROPRIO, widowx.ACTION, 10, 10, "libero_panda"), "as relative_pose"),
        ("libero", ("observation.state", "action", 8, 7, "widowx"), "'libero_panda', but .*widowx"),
        ("libero", ("observation.state", "action", 8, 7, ""), "a robot without a name"),
        ("libero", ("observation.state", "action", 8, 8, "libero"), "actions of 7 numbers"),
        ("libero", ("observation.state", "action", 7, 7, "libero"), "state of 8 numbers"),
        ("aloha", ("observation.state", "action", 14, 14, "yam"), "--client=aloha is for .*'yam'"),
        ("aloha", ("qpos", "action", 4, 4, "aloha"), "--client=aloha has a state of 14 numbers"),
        ("droid", (*droid_joints("joint_position"), 8, 8, "droid"), "takes .*joint_velocity"),
        ("droid", ("state", "action", 8, 8, "franka"), "'droid_franka', but .* 'franka'"),
        ("libero", ("s", "a", 8, 7, "libero", ("image", "agentview")), "both 'agentview' of --cl"),
        (
            "libero",
            ("s", "a", 8, 7, "libero", ("image", "side")),
            "'side', which .*'agentview', ",
        ),
        ("droid", ("s", "a", 8, 8, "droid", ("a", "b", "c")), "'a', which --client=droid does not"),
        ("aloha", ("qpos", "action", 14, 14, "aloha", "wrist_cam"), "'wrist_cam', which --client"),
    ],
)
def test_a_policy_of_another_robot_or_camera_is_refused_whatever_its_widths(client, config, words):
    with pytest.raises(ValueError, match=words):
        make_adapter(client, trained_robot(config_of(*config)))


def test_an_unknown_client_is_named():
    with pytest.raises(
        ValueError, match=r"one of plain, .*, droid, droid_joint_position, got 'gr00t'"
    ):
        make_adapter("gr00t", trained_robot(config_of("state", "action", 4, 4)))


@pytest.mark.parametrize(
    "client, video, keys",
    [
        ("aloha", "observation.images.cam_left_wrist", ["images/cam_left_wrist"]),
        ("aloha", "observation.images.top", ["images/cam_high"]),
        (
            "aloha",
            (("cam_high", ""), ("cam_right_wrist", "cam_left_wrist")),
            ["images/cam_high", "images/cam_right_wrist", "images/cam_left_wrist"],
        ),
        ("libero", "obs/eye_in_hand_rgb", ["observation/wrist_image"]),
        ("libero", "observation.images.agentview", ["observation/image"]),
        ("libero", "observation.images.image2", ["observation/wrist_image"]),
        ("libero", ("image2", "my_camera"), ["observation/wrist_image", "observation/image"]),
        ("droid", "steps/observation/wrist_image_left", ["observation/wrist_image_left"]),
        (
            "droid",
            ("exterior_image_1_left", "exterior_2_left", "wrist_left"),
            [
                f"observation/{n}_left"
                for n in ("exterior_image_1", "exterior_image_2", "wrist_image")
            ],
        ),
        ("plain", "front", ["observation/image"]),
        ("plain", ("front", "front"), ["observation/image"]),  # one camera in two cells
        ("dataset", ("a.front", "a.hand"), [f"observation/images/{n}" for n in ("front", "hand")]),
        ("dataset", ("a.top", "b.top"), [f"observation/images/{n}" for n in ("a.top", "b.top")]),
    ],
)
def test_the_pictures_are_those_of_the_trained_cameras(client, video, keys):
    sizes = {"aloha": (14, 14), "libero": (8, 7), "droid": (8, 8)}.get(client, (4, 4))
    robot = trained_robot(config_of("state", "action", *sizes, client, video))
    images = make_adapter(client, robot).images
    assert (*images,) == robot.cameras and ["/".join(k) for k in images.values()] == keys


def test_the_history_of_a_camera_is_no_picture_of_another():
    robot = trained_robot(config_of("state", "action", 4, 4, video=("a.top", "a.top_history")))
    with pytest.raises(ValueError, match="'observation/images/top_history' is the history of"):
        make_adapter("plain", robot)


def test_a_camera_or_a_rate_that_the_client_does_not_know_is_said(caplog):
    config = config_of("state", "action", 8, 7, "libero", "my_camera")
    config.policy_io.action.fps = 10.0
    images = make_adapter("libero", trained_robot(config)).images
    assert images == {"my_camera": ("observation/image",)}
    assert "'my_camera', a name that --client=libero does not know" in caplog.text
    assert "executes 20 actions per second, but those of the policy are 10" in caplog.text


def test_droid_joint_velocities_by_their_streams():
    """The client's own layout, in whatever order the policy reads its streams."""
    config = (*droid_joints("joint_velocity"), 8, 8)
    session = session_of("droid", *config)
    seen = session.observe(droid_message(gripper=0.5))
    np.testing.assert_array_equal(seen.observation.proprio, [[0, 1, 2, 3, 4, 5, 6, 0.5]])
    chunk = np.random.default_rng(0).normal(size=(15, 8)).astype(np.float32)
    np.testing.assert_array_equal(session.actions(chunk, seen), chunk)
    turned = session_of("droid", config[0][::-1], *config[1:])
    np.testing.assert_array_equal(
        turned.observe(droid_message()).observation.proprio, [[0.5, 0, 1, 2, 3, 4, 5, 6]]
    )


def test_a_layout_of_the_clients_streams_is_converted_exactly():
    """LIBERO as LeRobot stores it, with the second finger and the gripper as an opening."""
    gripper = dict(stream="action", columns=(6,), represent="gripper", closed=1.0, open=-1.0)
    action = (*libero_panda.LEROBOT_ACTION[:2], gripper)
    finger = dict(stream="observation.state", columns=(7,))
    session = session_of("libero", (*libero_panda.LEROBOT_PROPRIO[:2], finger), action, 10, 10)
    seen = session.observe(libero_message(fingers=(0.03, -0.02)))
    assert seen.observation.proprio[0, 9] == np.float32(-0.02)
    chunk = np.array([[0, 0, 0, 1, 0, 0, 0, 1, 0, opening] for opening in (0.9, 0.1)], np.float32)
    assert session.actions(chunk, seen)[:, 6].tolist() == [-1, 1]  # -1 opens


@pytest.mark.parametrize("rotvec", [(175, 3, 2), (0, 0, 7)])
def test_degrees_are_no_radians(rotvec):
    session = session_of("libero", libero_panda.PROPRIO, libero_panda.ACTION, 10, 10)
    with pytest.raises(RequestError, match="degrees"):
        session.observe(libero_message(rotvec=rotvec))


def test_the_robot_that_acts_is_the_configurations():
    config = config_of("state", "action", 4, 4)
    config.datasets.video = dict(embodiment="human", action="", proprio="")
    assert trained_robot(config).action[0].streams == ("action",)
    config.datasets.other = dict(embodiment="hand", action="grasp", proprio="state")
    with pytest.raises(ValueError, match="'hand', 'arm': choose"):
        trained_robot(config)
    config.embodiment = "hand"
    assert trained_robot(config).action[0].streams == ("grasp",)
    config.embodiment = "human"
    with pytest.raises(ValueError, match=r"'human', but the datasets .* are of 'hand', 'arm'"):
        trained_robot(config)


def test_datasets_of_one_robot_must_mean_the_same():
    """Views of their own are no difference; another representation is."""
    config = config_of("state", "action", 4, 4, video=("a", "b"))
    config.datasets.view = dict(config.datasets.robot.to_dict(), video="a")
    assert trained_robot(config).cameras == ("a",)
    config.datasets.robot.video, config.datasets.view.video = ("a", ""), ("a", "b")
    assert trained_robot(config).cameras == ("a", "b")  # what only one dataset lacks is not black
    config.datasets.robot.video, config.datasets.view.video = ("a", "b"), "a"
    config.embodiment = None  # as "": it is the only one, and its cameras are known
    assert trained_robot(config).cameras == ("a",)
    delta = dict(stream="action", represent="delta", base="state")
    config.datasets.view.action = (delta,)
    with pytest.raises(ValueError, match=r"'robot' and 'view' .* differently .*as delta"):
        trained_robot(config)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(), None),
        (dict(embodiment="libero_panda", weight=2.0), None),
        (dict(action="joints"), "datasets.robot.action.0.streams"),
        (dict(action=(dict(stream="action", represent="delta", base="state"),)), "represent"),
        (dict(action=(dict(stream="action", normalize="SQUASH"),)), None),
        (dict(proprio="qpos"), "datasets.robot.proprio"),
        (dict(video="side"), "datasets.robot.video"),
        (dict(video=(("front",),)), None),  # another way to write the same
    ],
)
def test_a_policy_is_not_read_with_other_words_than_it_learned(change, words):
    trained, now = (config_of("state", "action", 4, 4) for _ in range(2))
    trained.clip = now.clip = dict(height=4, width=6)
    now.datasets.robot.update(change)
    trained.datasets.robot.records = "nowhere"
    meta = {"config": json.loads(trained.to_json())}
    with pytest.raises(ValueError, match=words) if words else nullcontext():
        check_trained(now, meta, "run/action")
    check_trained(now, {"stage": "action"}, "converted")


def test_a_policy_of_records_that_said_otherwise_is_refused(tmp_path):
    """Older versions trained on records that hold joints while the configuration says delta."""
    config = config_of("state", "action", 4, 4)
    config.clip = dict(height=4, width=6)
    settings = {
        "dataset": json.loads(config.datasets.robot.to_json()),
        "clip": json.loads(config.clip.to_json()),
    }
    config.datasets.robot.update(
        action=(dict(stream="action", represent="delta", base="state"),), records=str(tmp_path)
    )
    manifest = {"settings": settings, "fingerprint": "f00d"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    meta = {"config": json.loads(config.to_json()), "data_fingerprint": ["f00d"]}
    with pytest.raises(ValueError, match=r"trained on records .*'values' there, 'delta' here"):
        check_trained(config, meta, tmp_path)
    check_trained(config, meta | {"data_fingerprint": ["beef"]}, tmp_path)  # encoded again since


def test_a_suite_takes_its_own_numbers_in_their_order(caplog):
    """Of equal widths and representations."""
    suite = ("metaworld", "metaworld_sawyer", (480, 640))
    sawyer = metaworld_sawyer

    def check(action, proprio):
        robot = trained_robot(config_of(proprio, action, 4, 4, "metaworld_sawyer", "corner"))
        check_suite(robot, *suite)

    check(sawyer.ACTION, sawyer.PROPRIO)
    check("action", "observation.state")
    in_two = tuple(dict(stream="action", columns=columns) for columns in ((0, 1, 2), (3,)))
    check(in_two, sawyer.PROPRIO)
    assert not caplog.text
    for action, proprio in (
        ((dict(stream="action", columns=(3, 0, 1, 2)),), sawyer.PROPRIO),
        (sawyer.ACTION, (dict(stream="observation.state", columns=(4, 5, 6, 7)),)),
    ):
        with pytest.raises(ValueError, match=r"is .*\[0\], .* trained with .*\[[34]\], "):
            check(action, proprio)
    check(sawyer.ACTION, "observation.environment")
    assert "learned from observation.environment as values, a name that the suite" in caplog.text


def test_a_policy_of_earlier_states_is_not_shown_the_present_one():
    earlier = tuple(part | dict(shift=-0.1) for part in metaworld_sawyer.PROPRIO)
    config = config_of(earlier, metaworld_sawyer.ACTION, 4, 4, "metaworld_sawyer", "corner")
    suite = ("metaworld", "metaworld_sawyer", (64, 64))
    with pytest.raises(ValueError, match=r"observation.state of -0.1 s from the present"):
        check_suite(trained_robot(config), *suite)
    config = config_of("state", "action", 8, 7, "libero")
    config.policy_io.proprio.shift = -0.05
    with pytest.raises(ValueError, match=r"state of -0.05 s .* but --client=libero shows"):
        make_adapter("libero", trained_robot(config))


@pytest.mark.parametrize("flip", ["rotate", "vertical", None])
def test_pictures_that_were_not_turned_for_training_are_said(caplog, flip):
    """LIBERO's files lie upside down; its suite and openpi's client turn them by 180 degrees."""
    hdf5 = libero_panda.HDF5_PROPRIO, libero_panda.HDF5_ACTION
    config = config_of(*hdf5, 10, 10, "libero_panda", "obs/agentview_rgb")
    config.datasets.robot.format = "robomimic_hdf5"
    if flip:
        config.datasets.robot.options = dict(flip=flip)
    robot, suite = trained_robot(config), ("libero", "libero_panda", (480, 640))
    for check in (lambda: check_suite(robot, *suite), lambda: make_adapter("libero", robot)):
        caplog.clear()
        check()
        assert ("upside down or mirrored" in caplog.text) == (flip != "rotate")


def test_a_suite_shows_its_own_robot(caplog):
    suite = ("libero", "libero_panda", (480, 640))
    check_suite(trained_robot(libero_action.get_config("goal")), *suite)
    for config, words in (
        ((widowx.PROPRIO, widowx.ACTION, 10, 10, "widowx"), "'libero_panda', but .* 'widowx'"),
        ((widowx.PROPRIO, widowx.ACTION, 10, 10, "libero_panda"), "as relative_pose"),
        (("state", "action", 8, 7, "libero"), "describe them as in"),
        (
            (*LIBERO, 10, 10, "libero", "hand_camera"),
            "'hand_camera', which the suite 'libero' does",
        ),
        ((*LIBERO, 10, 10, "libero", ("front", "side")), "'front', which the suite 'libero' does"),
        ((*LIBERO, 10, 10, "libero", ("image", "agentview")), "both 'agentview' of the suite"),
    ):
        with pytest.raises(ValueError, match=words):
            check_suite(trained_robot(config_of(*config)), *suite)
    assert not caplog.text
    config = config_of(*LIBERO, 10, 10, "libero")
    config.datasets.robot.views, wrist = dict(hand="wrist", none=""), dict(height=64, width=64)
    config.clip.views = dict(hand=wrist, none=wrist)
    check_suite(trained_robot(config), *suite)
    assert "480x640, but the policy's view 'hand' is 64x64: they are stretched" in caplog.text
    assert caplog.text.count("stretched") == 1  # neither 'front' of 480x640 nor black pictures
    assert "'front', a name that the suite 'libero' does not know" in caplog.text
