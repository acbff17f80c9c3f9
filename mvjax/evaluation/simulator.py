"""What a simulated task offers to rollouts and to demonstration recording.

One file per simulator in `suites/` implements this. Simulators run in worker processes that never
import jax.
"""

from typing import Protocol

import numpy as np


class Simulator(Protocol):
    """One task of one simulator.

    Attributes:
        instruction: what to do, in words.
        control_hz: control steps per second of simulated time.
        max_steps: control steps after which an episode counts as failed.
        action_dim: numbers in an action.
    """

    instruction: str
    control_hz: int
    max_steps: int
    action_dim: int

    def reset(self, seed: int) -> None:
        """Start the episode that `seed` names; equal seeds give equal episodes."""
        ...

    def step(self, action: np.ndarray) -> bool:
        """Apply one action (float [d], environment units) and return whether the task is done."""
        ...

    def render(self) -> np.ndarray:
        """The policy's camera, upright: uint8 [h, w, 3]."""
        ...

    def proprio(self) -> np.ndarray:
        """The robot's own state: float32 [d], raw units."""
        ...

    def expert_action(self) -> np.ndarray:
        """What a scripted expert would do now: float32 [d]."""
        ...

    def lookahead(self, steps: int, stride: int) -> np.ndarray:
        """The expert's future from here, leaving the episode untouched.

        Args:
            steps: control steps to look ahead.
            stride: control steps between frames.

        Returns:
            uint8 [steps // stride, h, w, 3]: frames `stride`, `2 * stride`, ... steps from now.
        """
        ...

    def close(self) -> None:
        """Free the renderer; the simulator cannot be used afterwards."""
        ...
