"""openpi's LIBERO client: third-person camera, end effector as position and axis-angle, at 20 Hz.

The client turns its pictures by 180 degrees as mimic-video's training data are turned. It keeps one
connection for a whole suite and does not say where an episode begins.
"""

from dataclasses import replace

import numpy as np

from data_pipelines.embodiments.libero_panda import HDF5_ACTION, HDF5_PROPRIO
from data_pipelines.vectors.parts import parse
from mvjax.policy.serving.adapters.adapter import Adapter, check_sizes
from mvjax.policy.serving.adapters.body import Body, converted

# At full command the end effector moves 0.125 m in the five steps between two queries; the next
# episode begins about 0.3 m from where a solved one ended (docs/serving.md).
EPISODE_JUMP_M = 0.2


def libero(body: Body) -> Adapter:
    """Position 3 (m), axis-angle 3 (rad) and two fingers (m) in, OSC_POSE actions of 7 out.

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
    if (body.proprio_dim, body.action_dim) == (10, 10):
        parts = Body(parse(HDF5_ACTION, "action"), parse(HDF5_PROPRIO, "proprio"), 10, 10)
        posed = converted(own, parts, _streams)
        return replace(
            posed,
            actions=lambda chunk, state: _either_gripper(posed.actions(chunk, state)),
            prompt=lambda prompt: prompt.replace("black bowl", "bowl"),
        )
    check_sizes("libero", state=(8, body.proprio_dim), action=(7, body.action_dim))
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
