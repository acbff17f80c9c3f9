"""Adapters between robots' clients and the policy, one for each value of `--client`.

To add one, write a function that returns an `Adapter` for the robot that a policy was trained on,
and add it to `CLIENTS`. It must refuse every policy whose robot, cameras or vectors are not the
client's: arrays of equal widths need not mean the same.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_pipelines.embodiments import libero_panda
from data_pipelines.representations import REPRESENTATIONS, ROTATION_WIDTHS, Mode, Part
from data_pipelines.vectors import bases, dims, parse, restore, streams, vector
from mvjax.policy.robot import (
    Robot,
    check_embodiment,
    check_present,
    check_turned,
    described,
    is_on_the_hand,
    last_word,
    single_camera,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adapter:
    """How one kind of client encodes its observations and actions.

    Attributes:
        name: the value of `--client`.
        image: nested keys of the picture, uint8 [h, w, 3] or [3, h, w].
        state: keys whose values, concatenated, are the robot's state.
        state_size: size of the state.
        proprio: states [h, state_size] -> the policy's proprioception [h, proprio_dim].
        actions: the policy's chunk [horizon, action_dim] and the state [state_size] it starts from
            -> the client's actions [horizon, any].
        prompt: the client's instruction -> the policy's.
        jump: a new episode begins when the first three numbers of the state (metres) move farther
            than this between two messages; None: only when the message says so.
        control_hz: actions that the client executes per second; 0 if unknown.
        execute: actions of a chunk that the client executes as openpi's examples set it; 0 if
            unknown.
        signed_gripper: the number of the policy's action that opens the client's gripper when it is
            negative and closes it when it is positive; None if it is converted.
    """

    name: str
    image: tuple[str, ...]
    state: tuple[str, ...]
    state_size: int
    proprio: Callable[[np.ndarray], np.ndarray] = lambda states: states
    actions: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda chunk, state: chunk
    prompt: Callable[[str], str] = str
    jump: float | None = None
    control_hz: float = 0.0
    execute: int = 0
    signed_gripper: int | None = None


def plain(robot: Robot) -> Adapter:
    """This package's own client: one picture, the policy's own vectors."""
    single_camera(robot, "--client=plain")
    if relative := bases(robot.action):
        log.warning(
            "the policy's actions are relative to %s (%s), and --client=plain returns them so: a "
            "robot that executes them as recorded needs --client=dataset.",
            *(", ".join(relative), described(robot.action)),
        )

    def proprio(states: np.ndarray) -> np.ndarray:
        check_rotations(robot.proprio, states)
        return states

    return Adapter(
        name="plain",
        image=("observation/image",),
        state=("observation/state",),
        state_size=robot.proprio_dim,
        proprio=proprio,
    )


def dataset(robot: Robot) -> Adapter:
    """A robot that sends and takes the numbers of its dataset, whatever the policy makes of them.

    The state is what the dataset's streams hold at this moment, one stream after the other: those
    of the proprioception, then those that actions are relative to. Actions come back as the dataset
    stores them: differences from the present joints, for example, are absolute again.
    """
    who = "--client=dataset"
    single_camera(robot, who)
    widths = _stored_widths(robot)
    learned = _columns_by_stream(robot.action, robot.action_dim)
    if not robot.proprio or not learned:
        raise ValueError(f"{who} needs a policy whose datasets describe its state and actions.")
    for name, columns in learned.items():
        if missing := set(range(max(columns) + 1)) - columns:
            raise ValueError(
                f"{who} returns the stream {name!r} as the dataset stores it, but this policy did "
                f"not learn its columns {sorted(missing)}: use --client=plain, which returns the "
                f"policy's own {robot.action_dim} numbers."
            )
    names = _state_streams(robot)
    ends = np.cumsum([widths[name] for name in names])

    def split(state: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(names, np.split(state, ends[:-1], axis=-1)))

    own = Adapter(
        name="dataset",
        image=("observation/image",),
        state=("observation/state",),
        state_size=int(ends[-1]),
    )
    return converted(own, robot, split)


# openpi's LIBERO client turns its pictures by 180 degrees, as in mimic-video's training data. It
# keeps one connection for a whole suite and does not announce new episodes: at full speed the end
# effector moves 0.125 m in the five steps between two queries, and the next episode begins about
# 0.3 m from the end of a solved one (docs/serving.md).
EPISODE_JUMP_M = 0.2

_SCENE, _WRIST = ("observation/image",), ("observation/wrist_image",)
_LIBERO_CAMERAS = {
    **dict.fromkeys(("workspace_rgb", "agentview", "agentview_rgb", "image"), _SCENE),
    # The wrist is image2 in the LeRobot releases of LIBERO.
    **dict.fromkeys(("wrist_image", "eye_in_hand_rgb", "robot0_eye_in_hand", "image2"), _WRIST),
}


def libero(robot: Robot) -> Adapter:
    """openpi's LIBERO client: third-person camera, end effector, at 20 Hz.

    It sends position 3 (m), axis-angle 3 (rad) and two fingers (m), and takes 7 OSC_POSE numbers.

    A policy with 10 proprioceptive and 10 action dimensions has a layout of
    `data_pipelines/embodiments/libero_panda.py`; a "black bowl" is then a "bowl", as in
    mimic-video's instructions. One with 8 and 7 was trained in the client's own layout.
    """
    check_embodiment(robot, "--client=libero", "libero", "libero_panda")
    check_turned(robot, "--client=libero")
    own = Adapter(
        name="libero",
        image=picture("libero", robot, _LIBERO_CAMERAS),
        state=("observation/state",),
        state_size=8,
        jump=EPISODE_JUMP_M,
        control_hz=20,
        execute=5,
    )
    known = libero_panda
    actions = [_meaning(parse(a)) for a in (known.ACTION, known.HDF5_ACTION)]
    states = (known.PROPRIO, known.HDF5_PROPRIO, known.REGENERATED_PROPRIO)
    if _meaning(robot.action) in actions and _meaning(robot.proprio) in [
        _meaning(parse(state)) for state in states
    ]:
        parts = parse(known.HDF5_ACTION), parse(known.HDF5_PROPRIO)
        names = "obs/ee_pos", "obs/ee_ori", "obs/gripper_states"
        posed = converted(
            own, Robot(*parts, 10, 10), lambda s: dict(zip(names, np.split(s, [3, 6], axis=-1)))
        )
        posed = replace(posed, signed_gripper=9)
    else:
        posed = in_own_layout(own, robot, action_size=7)
        posed = replace(posed, signed_gripper=_number_of(robot, 6))
    if (robot.proprio_dim, robot.action_dim) != (10, 10):
        return posed

    def commands(chunk: np.ndarray, state: np.ndarray) -> np.ndarray:
        motion, gripper = np.split(posed.actions(chunk, state), [6], axis=1)
        # As in the release, the gripper either opens (-1) or closes (1).
        gripper = np.where(gripper > 0, 1, -1)
        return np.concatenate([motion, gripper], axis=1).astype(np.float32)

    prompt = lambda prompt: prompt.replace("black bowl", "bowl")  # noqa: E731
    return replace(posed, actions=commands, prompt=prompt)


_ALOHA_CAMERAS = {
    name: ("images", name) for name in ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")
} | {"top": ("images", "cam_high")}  # the simulator's, as the client sends it


def aloha(robot: Robot) -> Adapter:
    """openpi's ALOHA clients, real and simulated: high camera, two arms, at 50 Hz.

    Per arm they send and take six joints (rad) and a gripper in the robot's units. Actions that
    were learned relative to the present joints are made absolute. The simulated client sends no
    prompt: the server needs `--prompt`.
    """
    check_embodiment(robot, "--client=aloha", "aloha", "aloha")
    own = Adapter(
        name="aloha",
        image=picture("aloha", robot, _ALOHA_CAMERAS),
        state=("state",),
        state_size=14,
        control_hz=50,
        execute=10,
    )
    return in_own_layout(own, robot, action_size=14)


# Sizes of the streams of DROID's RLDS release, "steps/observation/<name>", which the client sends
# as "observation/<name>".
_DROID_STATE = {"joint_position": 7, "cartesian_position": 6, "gripper_position": 1}
_EXTERIOR, _DROID_WRIST = ("observation/exterior_image_1_left",), ("observation/wrist_image_left",)
_DROID_CAMERAS = {
    **dict.fromkeys(("exterior_image_1_left", "exterior_1_left"), _EXTERIOR),
    **dict.fromkeys(("wrist_image_left", "wrist_left"), _DROID_WRIST),
}


def droid(robot: Robot) -> Adapter:
    """openpi's DROID client: left exterior camera, a Franka arm and its gripper, at 15 Hz.

    The unchanged client sends seven joints (rad) and the gripper, and executes joint velocities and
    a gripper command, on which the policy must have been trained. A policy of
    `data_pipelines/embodiments/droid_franka.py` needs a client that sends
    `observation/cartesian_position` [6] in place of the joints, and executes poses: position 3 (m),
    Euler angles 3 (rad) and gripper.
    """
    check_embodiment(robot, "--client=droid", "droid", "droid_franka")
    own = Adapter(
        name="droid",
        image=picture("droid", robot, _DROID_CAMERAS),
        state=("observation/joint_position", "observation/gripper_position"),
        state_size=8,
        control_hz=15,
        execute=8,
    )
    taken = [last_word(name) for name in streams(robot.action)]
    if len(taken) == 1:
        adapter = in_own_layout(own, robot, action_size=8)
        log.warning(
            "--client=droid executes joint velocities and a gripper command; only its name says "
            "that the stream %r, on which the policy was trained, holds these.",
            streams(robot.action)[0],
        )
        return adapter
    needed = {name: last_word(name) for name in _state_streams(robot)}
    fits = set(needed.values()) <= set(_DROID_STATE) and taken in (
        ["joint_velocity", "gripper_position"],
        ["cartesian_position", "gripper_position"],
    )
    if not fits:
        raise not_fitting(
            own, robot, "joint_position and gripper_position", "joint_velocity and gripper_position"
        )
    sent = [name for name in _DROID_STATE if name in needed.values()]
    ends = np.cumsum([_DROID_STATE[name] for name in sent])

    def split(state: np.ndarray) -> dict[str, np.ndarray]:
        values = dict(zip(sent, np.split(state, ends[:-1], axis=-1)))
        return {name: values[word] for name, word in needed.items()}

    keys = tuple(f"observation/{name}" for name in sent)
    return converted(replace(own, state=keys, state_size=int(ends[-1])), robot, split)


CLIENTS = {
    "plain": plain,
    "dataset": dataset,
    "libero": libero,
    "aloha": aloha,
    "droid": droid,
}


def make_adapter(client: str, robot: Robot) -> Adapter:
    """Returns the adapter of a client for a policy that was trained on `robot`.

    Raises:
        ValueError: the client is unknown, or its robot, cameras or numbers are not the policy's.
    """
    if client not in CLIENTS:
        raise ValueError(f"The client must be one of {', '.join(CLIENTS)}, got {client!r}.")
    if client != "plain":  # whose vectors are the client's own affair
        check_present(robot, f"--client={client}")
    adapter = CLIENTS[client](robot)
    if adapter.control_hz and robot.action_fps and adapter.control_hz != robot.action_fps:
        log.warning(
            "--client=%s executes %g actions per second, but those of the policy are %g per second "
            "(policy_io.action.fps): the robot moves at another speed than in training.",
            client,
            adapter.control_hz,
            robot.action_fps,
        )
    return adapter


def picture(client: str, robot: Robot, cameras: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Returns the keys of the client's picture from the camera that a policy was trained on.

    Args:
        client: the value of `--client`.
        robot: of the policy.
        cameras: last word of a camera's name -> the keys; the first is the client's main camera.

    Raises:
        ValueError: the policy was trained on several cameras, or on one that the client lacks.
    """
    camera = single_camera(robot, f"--client={client}")
    main = next(iter(cameras.values()))
    if not camera:
        return main
    if keys := cameras.get(last_word(camera)):
        return keys
    if is_on_the_hand(camera):
        raise ValueError(
            f"This policy was trained on the camera {camera!r}, which --client={client} does not "
            f"have; it knows {', '.join(cameras)}."
        )
    log.warning(
        "the policy was trained on the camera %r, which --client=%s does not know: it is shown the "
        "client's %r, which must be the same view.",
        *(camera, client, "/".join(main)),
    )
    return main


def in_own_layout(own: Adapter, robot: Robot, action_size: int) -> Adapter:
    """Returns the adapter of a policy whose streams are the client's own state and actions.

    Raises:
        ValueError: the policy reads several streams, or others than the client's numbers.
    """
    states, taken = _state_streams(robot), streams(robot.action)
    fits = len(states) == len(taken) == 1 and _columns(robot.action, robot.action_dim) == set(
        range(action_size)
    )
    fits = fits and _columns(robot.proprio, robot.proprio_dim) <= set(range(own.state_size))
    whole = [part for part in robot.proprio if part.columns is None]  # the stream as it is
    if not fits or (whole and robot.proprio_dim != own.state_size):
        raise not_fitting(own, robot, f"{own.state_size} numbers", f"{action_size} numbers")
    return converted(own, robot, lambda state: {name: state for name in states})


def not_fitting(own: Adapter, robot: Robot, state: str, actions: str) -> ValueError:
    """The error of a policy whose vectors are not made of what a client sends and takes."""
    return ValueError(
        f"--client={own.name} has a state of {state} and takes actions of {actions}, but this "
        f"policy was trained with a state of {robot.proprio_dim} ({described(robot.proprio)}) and "
        f"actions of {robot.action_dim} ({described(robot.action)}): choose the --client that fits "
        "it, or plain."
    )


def converted(
    adapter: Adapter, robot: Robot, split: Callable[[np.ndarray], Mapping[str, np.ndarray]]
) -> Adapter:
    """Returns an adapter that converts between the client's streams and the policy's vectors.

    Args:
        adapter: of the client, without conversion.
        robot: the policy's; `split` must return all its streams and bases.
        split: a client's state [..., state_size] -> streams by name, [..., any].
    """

    def proprio(states: np.ndarray) -> np.ndarray:
        check_angles(robot.proprio, split(states))
        return vector(robot.proprio, split(states), split(states[-1]), robot.proprio_dim)

    def actions(chunk: np.ndarray, state: np.ndarray) -> np.ndarray:
        restored = restore(robot.action, chunk, split(state))
        flat = [restored[name].reshape(len(chunk), -1) for name in streams(robot.action)]
        return np.concatenate(flat, axis=1).astype(np.float32)

    return replace(adapter, proprio=proprio, actions=actions)


def check_rotations(parts: Sequence[Part], vectors: np.ndarray) -> None:
    """Raises ValueError where a policy's vectors [..., dim] hold no rotation, but should."""
    widths = dims(parts, vectors.shape[-1]) if parts else ()
    for part, end in zip(parts, np.cumsum(widths)):
        if part.represent not in ("rotation", "pose", "relative_pose"):
            continue
        rows = vectors[..., end - 6 : end].reshape(*vectors.shape[:-1], 2, 3)
        if np.abs(rows @ rows.swapaxes(-1, -2) - np.eye(2)).max() > 0.05:
            raise ValueError(
                f"numbers {end - 6} to {end - 1} must be the first two rows of a rotation matrix "
                f"({'/'.join(part.streams)}), which are of length 1 and at right angles; got "
                f"{np.round(vectors[..., end - 6 : end].reshape(-1, 6)[-1], 3).tolist()}."
            )


def check_angles(parts: Sequence[Part], values: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError for angles that are larger than those of any rotation in radians."""
    # axis-angle is at most a full turn; Euler angles may have been counted on.
    turns = {"rotvec": 1, "euler_xyz": 2}
    for part in parts:
        if part.rotation in turns:
            stored = values[part.streams[-1]]
            stored = stored[..., part.columns or slice(-3, None)]
            largest = float(np.abs(stored).max())
            if largest > turns[part.rotation] * 2 * np.pi + 0.01:
                raise ValueError(
                    f"{part.streams[-1]!r} holds a rotation ({part.rotation}) in radians, at most "
                    f"{turns[part.rotation] * 2 * np.pi:.2f}, but got {largest:.4g}: are these "
                    "degrees?"
                )


def _state_streams(robot: Robot) -> tuple[str, ...]:
    """The streams of a state that a policy reads or is relative to."""
    names = (*streams(robot.proprio), *bases(robot.proprio), *bases(robot.action))
    return tuple(dict.fromkeys(names))


def _columns(parts: Sequence[Part], dim: int) -> set[int]:
    """The columns that parts take of their only stream."""
    return set().union(*_columns_by_stream(parts, dim).values())


def _columns_by_stream(parts: Sequence[Part], dim: int) -> dict[str, set[int]]:
    """The columns that parts take of each stream."""
    taken: dict[str, set[int]] = {}
    for part, width in zip(parts, dims(parts, dim)):
        for name, columns in _columns_of(part, part.streams, part.columns, width):
            taken.setdefault(name, set()).update(columns)
    return taken


def _stored_widths(robot: Robot) -> dict[str, int]:
    """How many numbers a policy reads of each stream of a state, up to the last one it takes."""
    widths: dict[str, int] = {}
    for parts, dim in ((robot.proprio, robot.proprio_dim), (robot.action, robot.action_dim)):
        for part, width in zip(parts, dims(parts, dim)):
            found = _columns_of(part, part.bases, part.base_columns, width)
            if parts is robot.proprio:
                found += _columns_of(part, part.streams, part.columns, width)
            for name, columns in found:
                widths[name] = max(widths.get(name, 0), max(columns) + 1)
    return widths


def _columns_of(
    part: Part, names: Sequence[str], columns: Sequence[int] | None, width: int
) -> list[tuple[str, Sequence[int]]]:
    """The columns that a part takes of its streams or bases, which are one name or two."""
    if len(names) == 2:  # position and rotation
        sizes = (3, ROTATION_WIDTHS[part.rotation])
    else:
        sizes = (REPRESENTATIONS[part.represent].stored_width(part) or width,)
    return [(name, columns or range(size)) for name, size in zip(names, sizes)]


def _number_of(robot: Robot, column: int) -> int | None:
    """The number of a policy's action that is a column of its only stream, as it is."""
    widths = dims(robot.action, robot.action_dim)
    for part, width, end in zip(robot.action, widths, np.cumsum(widths)):
        columns = list(part.columns or range(width))
        if part.represent == "values" and column in columns:
            return int(end) - width + columns.index(column)
    return None


def _meaning(parts: Sequence[Part]) -> list[Part]:
    """Parts without what does not change the layout of a vector."""
    same = dict(normalize=Mode.VARIANCE, shift=0.0, interpolation="nearest")
    return [replace(part, **same) for part in parts]
