"""A policy's actions as LIBERO's simulator takes them."""

import numpy as np

from data_pipelines.embodiments.libero_panda import HDF5_ACTION
from data_pipelines.vectors.parts import parse
from data_pipelines.vectors.vector import restore

_ACTION = parse(HDF5_ACTION, "action")


def libero_commands(chunk: np.ndarray, proprio: np.ndarray) -> np.ndarray:
    """OSC_POSE actions of a policy's ten numbers (`data_pipelines/embodiments/libero_panda.py`).

    Args:
        chunk: float32 [h, 10]: position delta 3, two rows of the rotation delta 6, gripper.
        proprio: unused, since actions are relative to wherever the hand is.

    Returns:
        float32 [h, 7]; the gripper opens (-1) or closes (1), nothing between.
    """
    del proprio
    actions = restore(_ACTION, chunk, {})["actions"]
    actions[:, 6] = np.where(actions[:, 6] > 0, 1, -1)
    return actions.astype(np.float32)
