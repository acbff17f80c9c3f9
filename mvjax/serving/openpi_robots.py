"""The robots of openpi's example clients: LIBERO, ALOHA and DROID.

Their cameras are those of `CAMERAS` in data_pipelines/embodiments; the keys below are where the
client's messages have them.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType

import numpy as np

from data_pipelines.embodiments import aloha as aloha_robot
from data_pipelines.embodiments import droid_franka, libero_panda
from data_pipelines.vectors import parse, streams
from mvjax.policy.robot import Robot, check_embodiment, check_turned, last_word, match_cameras
from mvjax.serving.conversions import (
    Adapter,
    converted,
    in_own_layout,
    meaning,
    not_fitting,
    number_of,
    state_streams,
)

log = logging.getLogger(__name__)

# openpi's LIBERO client turns its pictures by 180 degrees, as in mimic-video's training data. It
# keeps one connection for a whole suite and does not announce new episodes: at full speed the end
# effector moves 0.125 m in the five steps between two queries, and the next episode begins about
# 0.3 m from the end of a solved one (docs/serving.md).
EPISODE_JUMP_M = 0.2

_LIBERO_PICTURES = {
    "agentview": ("observation/image",),
    "wrist": ("observation/wrist_image",),
}


def libero(robot: Robot) -> Adapter:
    """openpi's LIBERO client: third-person and wrist cameras, end effector, at 20 Hz.

    It sends position 3 (m), axis-angle 3 (rad) and two fingers (m), and takes 7 OSC_POSE numbers.

    A policy with 10 proprioceptive and 10 action dimensions has a layout of
    `data_pipelines/embodiments/libero_panda.py`; a "black bowl" is then a "bowl", as in
    mimic-video's instructions. One with 8 and 7 was trained in the client's own layout.
    """
    check_embodiment(robot, "--client=libero", "libero", "libero_panda")
    check_turned(robot, "--client=libero")
    own = Adapter(
        name="libero",
        images=pictures("libero", robot, libero_panda, _LIBERO_PICTURES),
        state=("observation/state",),
        state_size=8,
        jump=EPISODE_JUMP_M,
        control_hz=20,
        execute=5,
    )
    known = libero_panda
    actions = [meaning(parse(a)) for a in (known.ACTION, known.HDF5_ACTION)]
    states = (known.PROPRIO, known.HDF5_PROPRIO, known.REGENERATED_PROPRIO)
    if meaning(robot.action) in actions and meaning(robot.proprio) in [
        meaning(parse(state)) for state in states
    ]:
        parts = parse(known.HDF5_ACTION), parse(known.HDF5_PROPRIO)
        names = "obs/ee_pos", "obs/ee_ori", "obs/gripper_states"
        posed = converted(
            own, Robot(*parts, 10, 10), lambda s: dict(zip(names, np.split(s, [3, 6], axis=-1)))
        )
        posed = replace(posed, signed_gripper=9)
    else:
        posed = in_own_layout(own, robot, action_size=7)
        posed = replace(posed, signed_gripper=number_of(robot, 6))
    if (robot.proprio_dim, robot.action_dim) != (10, 10):
        return posed

    def commands(chunk: np.ndarray, state: np.ndarray) -> np.ndarray:
        motion, gripper = np.split(posed.actions(chunk, state), [6], axis=1)
        # As in the release, the gripper either opens (-1) or closes (1).
        gripper = np.where(gripper > 0, 1, -1)
        return np.concatenate([motion, gripper], axis=1).astype(np.float32)

    prompt = lambda prompt: prompt.replace("black bowl", "bowl")  # noqa: E731
    return replace(posed, actions=commands, prompt=prompt)


_ALOHA_PICTURES = {camera: ("images", camera) for camera in aloha_robot.CAMERAS}


def aloha(robot: Robot) -> Adapter:
    """openpi's ALOHA clients, real (four cameras) and simulated (the high one): two arms, 50 Hz.

    Per arm they send and take six joints (rad) and a gripper in the robot's units. Actions that
    were learned relative to the present joints are made absolute. The simulated client sends no
    prompt: the server needs `--prompt`.
    """
    check_embodiment(robot, "--client=aloha", "aloha", "aloha")
    own = Adapter(
        name="aloha",
        images=pictures("aloha", robot, aloha_robot, _ALOHA_PICTURES),
        state=("state",),
        state_size=14,
        control_hz=50,
        execute=10,
    )
    return in_own_layout(own, robot, action_size=14)


# Sizes of the streams of DROID's RLDS release, "steps/observation/<name>", which the client sends
# as "observation/<name>".
_DROID_STATE = {"joint_position": 7, "cartesian_position": 6, "gripper_position": 1}
# The unchanged client sends one exterior camera, the first as a rule, and the wrist.
_DROID_PICTURES = {
    "exterior_1": ("observation/exterior_image_1_left",),
    "exterior_2": ("observation/exterior_image_2_left",),
    "wrist": ("observation/wrist_image_left",),
}


def droid_joint_position(robot: Robot) -> Adapter:
    """As `droid`, for a client whose robot is made with `action_space="joint_position"`.

    It executes positions of the seven joints (rad) and a gripper command. Those that were learned
    relative to the present joints, such as `droid_franka.JOINT_ACTION`, are made absolute.
    """
    return droid(robot, "joint_position")


def droid(robot: Robot, executes: str = "joint_velocity") -> Adapter:
    """openpi's DROID client: exterior and wrist cameras, a Franka arm and its gripper, at 15 Hz.

    The unchanged client sends seven joints (rad) and the gripper, and executes joint velocities and
    a gripper command, on which the policy must have been trained. A policy of
    `data_pipelines/embodiments/droid_franka.py` needs a client that sends
    `observation/cartesian_position` [6] in place of the joints, and executes poses: position 3 (m),
    Euler angles 3 (rad) and gripper.
    """
    name = "droid" if executes == "joint_velocity" else f"droid_{executes}"
    check_embodiment(robot, f"--client={name}", "droid", "droid_franka")
    own = Adapter(
        name=name,
        images=pictures(name, robot, droid_franka, _DROID_PICTURES),
        state=("observation/joint_position", "observation/gripper_position"),
        state_size=8,
        control_hz=15,
        execute=8,
    )
    taken = [last_word(name) for name in streams(robot.action)]
    if len(taken) == 1:
        adapter = in_own_layout(own, robot, action_size=8)
        log.warning(
            "--client=%s executes a %s and a gripper command; only its name says that the stream "
            "%r, on which the policy was trained, holds these.",
            name,
            executes,
            streams(robot.action)[0],
        )
        return adapter
    needed = {name: last_word(name) for name in state_streams(robot)}
    fits = set(needed.values()) <= set(_DROID_STATE) and taken in (
        [executes, "gripper_position"],
        ["cartesian_position", "gripper_position"],
    )
    if not fits:
        raise not_fitting(
            own, robot, "joint_position and gripper_position", f"{executes} and gripper_position"
        )
    sent = [name for name in _DROID_STATE if name in needed.values()]
    ends = np.cumsum([_DROID_STATE[name] for name in sent])

    def split(state: np.ndarray) -> dict[str, np.ndarray]:
        values = dict(zip(sent, np.split(state, ends[:-1], axis=-1)))
        return {name: values[word] for name, word in needed.items()}

    keys = tuple(f"observation/{name}" for name in sent)
    return converted(replace(own, state=keys, state_size=int(ends[-1])), robot, split)


def pictures(
    client: str, robot: Robot, embodiment: ModuleType, keys: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """The keys of the pictures that show what a policy's cameras showed in training.

    Args:
        client: the value of `--client`.
        robot: of the policy.
        embodiment: the client's robot, whose `CAMERAS` name its cameras, the main one first.
        keys: the client's camera -> where its messages have the picture.

    Raises:
        ValueError: the policy sees a camera that the client does not have.
    """
    shown = match_cameras(robot, embodiment.CAMERAS, f"--client={client}")
    return {camera: keys[name] for camera, name in shown.items()}
