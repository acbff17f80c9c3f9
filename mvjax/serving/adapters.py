"""What robots' clients send and want, for each kind of client that `--client` knows.

A new client is one more function of a policy's vectors that returns an `Adapter`, and its name in
`CLIENTS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data_pipelines.embodiments.libero_panda import HDF5_ACTION, HDF5_PROPRIO
from data_pipelines.representations import Part
from data_pipelines.vectors import bases, parse, restore, streams, vector


def unchanged(values: np.ndarray, *_: np.ndarray) -> np.ndarray:
    """The numbers as they are."""
    return values


@dataclass(frozen=True)
class Adapter:
    """How one kind of client words its observations and wants its actions.

    Attributes:
        name: as given to `--client`.
        image: keys from the message to the picture, uint8 [h, w, 3] or [3, h, w].
        state: keys whose numbers, one after the other, are the robot's state.
        state_size: how many these are.
        proprio: states [h, state_size] as the policy's proprioception [h, proprio_dim].
        actions: the policy's chunk [horizon, action_dim], and the state [state_size] it starts
            from, as the client's actions [horizon, any].
        prompt: the instruction as the policy was trained to read it.
        jump: a robot whose first three numbers (metres) move farther than this between two
            messages has begun a new episode; None where messages must say so.
    """

    name: str
    image: tuple[str, ...]
    state: tuple[str, ...]
    state_size: int
    proprio: Callable[[np.ndarray], np.ndarray] = unchanged
    actions: Callable[[np.ndarray, np.ndarray], np.ndarray] = unchanged
    prompt: Callable[[str], str] = str
    jump: float | None = None


@dataclass(frozen=True)
class PolicyVectors:
    """What a policy takes and gives.

    Attributes:
        action, proprio: what its vectors are made of (`data_pipelines.vectors`).
        action_dim, proprio_dim: their widths.
    """

    action: tuple[Part, ...]
    proprio: tuple[Part, ...]
    action_dim: int
    proprio_dim: int


def policy_vectors(config: Any) -> PolicyVectors:
    """Of the embodiment that acts: `config.embodiment`, or the only one that was learned from.

    Args:
        config: the configuration of a stage-2 run.
    """
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
    """This package's own client: one picture, the policy's own numbers.

    `observation/image`, `observation/state` [proprio_dim]; actions [horizon, action_dim].
    """
    return Adapter(
        name="plain",
        image=("observation/image",),
        state=("observation/state",),
        state_size=policy.proprio_dim,
    )


# openpi's LIBERO client turns its pictures by 180 degrees, as mimic-video's training data are
# turned. It keeps one connection for a whole suite and does not say where an episode begins: at
# full command the end effector moves 0.125 m in the five steps between two queries, and the next
# episode begins about 0.3 m from where a solved one ended (docs/serving.md).
EPISODE_JUMP_M = 0.2


def libero(policy: PolicyVectors) -> Adapter:
    """openpi's LIBERO client: third-person camera, end effector, at 20 Hz.

    Position 3 (m), axis-angle 3 (rad) and two fingers (m) in, OSC_POSE actions of 7 out.

    A policy of 10 and 10 numbers is one of `data_pipelines/embodiments/libero_panda.py`, which have
    one layout whatever files they were trained on; a "black bowl" is then a "bowl", as in
    mimic-video's instructions. One of 8 and 7 was trained on the client's own numbers.

    Raises:
        ValueError: the policy has other numbers of dimensions.
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
        posed = converted(own, parts, _streams)
        return replace(
            posed,
            actions=lambda chunk, state: _either_gripper(posed.actions(chunk, state)),
            prompt=lambda prompt: prompt.replace("black bowl", "bowl"),
        )
    check_sizes("libero", state=(8, policy.proprio_dim), action=(7, policy.action_dim))
    return own


def _streams(state: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "obs/ee_pos": state[..., :3],
        "obs/ee_ori": state[..., 3:6],
        "obs/gripper_states": state[..., 6:],
    }


def _either_gripper(actions: np.ndarray) -> np.ndarray:
    """The gripper opens (-1) or closes (1), nothing between, as the release drives it."""
    gripper = np.where(actions[:, 6:] > 0, 1, -1)
    return np.concatenate([actions[:, :6], gripper], axis=1).astype(np.float32)


STATE = "observation.state"  # as in the public LeRobot datasets


def aloha(policy: PolicyVectors) -> Adapter:
    """openpi's ALOHA clients, real and simulated: the high camera, fourteen joints, at 50 Hz.

    Per arm six joints (rad) and a gripper, in and out, as the robot has them.

    Actions that were learned relative to the present joints are made absolute. The simulated client
    sends no prompt: the server needs `--prompt`.

    Raises:
        ValueError: the policy has another number of proprioceptive or action dimensions.
    """
    # Actions learned relative to the present joints are made absolute.
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

    Seven joints (rad) and the gripper in, eight action numbers out: the client unchanged.

    It executes joint velocities and a gripper command, so the policy must have been trained on
    these. A policy of `data_pipelines/embodiments/droid_franka.py` needs a client that sends
    `observation/cartesian_position` [6] in place of the joints, and that executes poses: it is
    given position 3 (m), Euler angles 3 (rad) and gripper.

    Raises:
        ValueError: the policy has another number of proprioceptive or action dimensions.
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
    """The adapter of a client, for a policy with this policy.

    Raises:
        ValueError: for an unknown client, or one that does not fit the policy.
    """
    if client not in CLIENTS:
        raise ValueError(f"The client must be one of {', '.join(CLIENTS)}, got {client!r}.")
    return CLIENTS[client](policy)


def converted(
    adapter: Adapter, policy: PolicyVectors, split: Callable[[np.ndarray], Mapping[str, np.ndarray]]
) -> Adapter:
    """An adapter whose client speaks in the streams that the policy's vectors are made of.

    Args:
        adapter: of the client, in its own numbers.
        policy: its vectors; their streams and bases must be among those of `split`.
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
    """Whether these streams are all that a policy needs of a client's state."""
    needed = {*streams(policy.proprio), *bases(policy.proprio), *bases(policy.action)}
    return bool(policy.action and policy.proprio) and needed <= names


def check_sizes(client: str, *, state: tuple[int, int], action: tuple[int, int]) -> None:
    """Checks that a policy speaks the numbers of a client.

    Args:
        client: its name.
        state, action: how many numbers the client has, and how many the policy.

    Raises:
        ValueError: they differ.
    """
    for what, (clients, policys) in {"state": state, "action": action}.items():
        if clients != policys:
            raise ValueError(
                f"--client={client} has {clients} numbers of {what}, but this policy was trained "
                f"with {policys}: choose the --client that fits it, or plain."
            )
