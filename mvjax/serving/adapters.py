"""Adapters between robots' clients and the policy, one for each value of `--client`.

To add one, write a function that returns an `Adapter` for a policy's vectors, and add it to
`CLIENTS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data_pipelines.embodiments.libero_panda import HDF5_ACTION, HDF5_PROPRIO
from data_pipelines.representations import Part
from data_pipelines.vectors import bases, parse, restore, streams, vector


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
    """

    name: str
    image: tuple[str, ...]
    state: tuple[str, ...]
    state_size: int
    proprio: Callable[[np.ndarray], np.ndarray] = lambda states: states
    actions: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda chunk, state: chunk
    prompt: Callable[[str], str] = str
    jump: float | None = None


@dataclass(frozen=True)
class PolicyVectors:
    """The parts (`data_pipelines.vectors`) and widths of a policy's vectors."""

    action: tuple[Part, ...]
    proprio: tuple[Part, ...]
    action_dim: int
    proprio_dim: int


def policy_vectors(config: Any) -> PolicyVectors:
    """Returns the vectors of the robot: `config.embodiment`, or the only one of a stage-2 run."""
    io, wanted = config.policy_io, config.get("embodiment", "")
    acting = [
        dataset
        for dataset in config.datasets.values()
        if dataset.action and wanted in ("", dataset.embodiment)
    ]
    described = (acting[0].action, acting[0].proprio) if acting else ("", "")
    action, proprio = map(parse, described, ("action", "proprio"))
    return PolicyVectors(action, proprio, io.action.dim, io.proprio.dim)


def plain(policy: PolicyVectors) -> Adapter:
    """This package's own client: one picture, the policy's own vectors."""
    return Adapter(
        name="plain",
        image=("observation/image",),
        state=("observation/state",),
        state_size=policy.proprio_dim,
    )


# openpi's LIBERO client turns its pictures by 180 degrees, as in mimic-video's training data. It
# keeps one connection for a whole suite and does not announce new episodes: at full speed the end
# effector moves 0.125 m in the five steps between two queries, and the next episode begins about
# 0.3 m from the end of a solved one (docs/serving.md).
EPISODE_JUMP_M = 0.2


def libero(policy: PolicyVectors) -> Adapter:
    """openpi's LIBERO client: third-person camera, end effector, at 20 Hz.

    It sends position 3 (m), axis-angle 3 (rad) and two fingers (m), and takes 7 OSC_POSE numbers.

    A policy with 10 proprioceptive and 10 action dimensions has the layout of
    `data_pipelines/embodiments/libero_panda.py`; a "black bowl" is then a "bowl", as in
    mimic-video's instructions. One with 8 and 7 was trained in the client's own layout.
    """
    own = Adapter(
        name="libero",
        image=("observation/image",),
        state=("observation/state",),
        state_size=8,
        jump=EPISODE_JUMP_M,
    )
    if (policy.proprio_dim, policy.action_dim) == (10, 10):
        parts = PolicyVectors(parse(HDF5_ACTION, "action"), parse(HDF5_PROPRIO, "proprio"), 10, 10)
        names = "obs/ee_pos", "obs/ee_ori", "obs/gripper_states"
        posed = converted(own, parts, lambda s: dict(zip(names, np.split(s, [3, 6], axis=-1))))

        def actions(chunk: np.ndarray, state: np.ndarray) -> np.ndarray:
            motion, gripper = np.split(posed.actions(chunk, state), [6], axis=1)
            # As in the release, the gripper either opens (-1) or closes (1).
            gripper = np.where(gripper > 0, 1, -1)
            return np.concatenate([motion, gripper], axis=1).astype(np.float32)

        prompt = lambda prompt: prompt.replace("black bowl", "bowl")  # noqa: E731
        return replace(posed, actions=actions, prompt=prompt)
    check_sizes("libero", state=(8, policy.proprio_dim), action=(7, policy.action_dim))
    return own


STATE = "observation.state"  # as in the public LeRobot datasets


def aloha(policy: PolicyVectors) -> Adapter:
    """openpi's ALOHA clients, real and simulated: high camera, two arms, at 50 Hz.

    Per arm they send and take six joints (rad) and a gripper in the robot's units. Actions that
    were learned relative to the present joints are made absolute. The simulated client sends no
    prompt: the server needs `--prompt`.
    """
    own = Adapter(name="aloha", image=("images", "cam_high"), state=("state",), state_size=14)
    check_sizes("aloha", state=(14, policy.proprio_dim), action=(14, policy.action_dim))
    if is_described_by(policy, {STATE}):
        return converted(own, policy, lambda state: {STATE: state})
    return own


# The streams of DROID's RLDS release.
POSE = "steps/observation/cartesian_position"
GRIPPER = "steps/observation/gripper_position"


def droid(policy: PolicyVectors) -> Adapter:
    """openpi's DROID client: left exterior camera, a Franka arm and its gripper, at 15 Hz.

    The unchanged client sends seven joints (rad) and the gripper, and executes joint velocities and
    a gripper command, on which the policy must have been trained. A policy of
    `data_pipelines/embodiments/droid_franka.py` needs a client that sends
    `observation/cartesian_position` [6] in place of the joints, and executes poses: position 3 (m),
    Euler angles 3 (rad) and gripper.
    """
    own = Adapter(
        name="droid",
        image=("observation/exterior_image_1_left",),
        state=("observation/joint_position", "observation/gripper_position"),
        state_size=8,
    )
    if is_described_by(policy, {POSE, GRIPPER}):
        keys = ("observation/cartesian_position", "observation/gripper_position")
        posed = replace(own, state=keys, state_size=7)
        return converted(posed, policy, lambda s: {POSE: s[..., :6], GRIPPER: s[..., 6:]})
    check_sizes("droid", state=(8, policy.proprio_dim), action=(8, policy.action_dim))
    return own


CLIENTS = {"plain": plain, "libero": libero, "aloha": aloha, "droid": droid}


def make_adapter(client: str, policy: PolicyVectors) -> Adapter:
    """Returns the adapter of a client; ValueError if it is unknown or does not fit the policy."""
    if client not in CLIENTS:
        raise ValueError(f"The client must be one of {', '.join(CLIENTS)}, got {client!r}.")
    return CLIENTS[client](policy)


def converted(
    adapter: Adapter, policy: PolicyVectors, split: Callable[[np.ndarray], Mapping[str, np.ndarray]]
) -> Adapter:
    """Returns an adapter that converts between the client's streams and the policy's vectors.

    Args:
        adapter: of the client, without conversion.
        policy: its vectors; `split` must return all their streams and bases.
        split: a client's state [..., state_size] -> streams by name, [..., any].
    """

    def proprio(states: np.ndarray) -> np.ndarray:
        return vector(policy.proprio, split(states), split(states[-1]), policy.proprio_dim)

    def actions(chunk: np.ndarray, state: np.ndarray) -> np.ndarray:
        restored = restore(policy.action, chunk, split(state))
        flat = [restored[name].reshape(len(chunk), -1) for name in streams(policy.action)]
        return np.concatenate(flat, axis=1).astype(np.float32)

    return replace(adapter, proprio=proprio, actions=actions)


def is_described_by(policy: PolicyVectors, names: set[str]) -> bool:
    """Returns whether a policy needs no other streams of a client's state than these."""
    needed = {*streams(policy.proprio), *bases(policy.proprio), *bases(policy.action)}
    return bool(policy.action and policy.proprio) and needed <= names


def check_sizes(client: str, *, state: tuple[int, int], action: tuple[int, int]) -> None:
    """Raises ValueError unless the sizes (the client's, the policy's) are equal."""
    for what, (sent, trained) in {"state": state, "action": action}.items():
        if sent != trained:
            raise ValueError(
                f"--client={client} has {sent} numbers of {what}, but this policy was trained "
                f"with {trained}: choose the --client that fits it, or plain."
            )
