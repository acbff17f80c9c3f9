"""A simulator suite as the evaluating process sees it, which need not have it installed."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mvjax.evaluation.worker import MakeSimulator

Convert = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""A policy's chunk [h, action_dim] and its present proprioception [proprio_dim] -> what the
simulator takes [h, any]. Poses relative to the present one become absolute here."""


def as_given(chunk: np.ndarray, proprio: np.ndarray) -> np.ndarray:
    """For policies that speak in the simulator's own actions."""
    del proprio
    return chunk


def this_interpreter() -> Path:
    """For simulators that share an environment with jax."""
    return Path(sys.executable)


@dataclass(frozen=True)
class Suite:
    """What an evaluation must know of a simulator.

    Attributes:
        make_simulator: task -> simulator, called in the worker; importable by name there.
        control_hz: control steps per second of simulated time.
        convert: the policy's actions to the simulator's.
        interpreter: the Python that has the simulator; raises where it is not installed.
    """

    make_simulator: MakeSimulator
    control_hz: float
    convert: Convert = as_given
    interpreter: Callable[[], Path] = this_interpreter
