"""Acting on one chunk while the next is being computed.

A robot that waits for every answer stands still for the policy's latency at every query. Here the
question is asked in the background and the robot goes on with the chunk it has. The answer's first
actions belong to steps that have passed meanwhile and are skipped, so a chunk must reach over the
steps between two queries and those of one latency.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

Infer = Callable[[Mapping[str, Any]], Mapping[str, Any]]  # such as PolicyClient.infer


class Overlap:
    """Chunks of actions, asked for in the background.

    Args:
        infer: asks the policy; called from one other thread only.

    Attributes:
        latencies: seconds of every query that has been answered.
        waited: seconds that the robot stood still because no chunk reached to the present step.
    """

    def __init__(self, infer: Infer) -> None:
        self._infer = infer
        self._thread = ThreadPoolExecutor(1, "query")
        self._asked: tuple[int, Future] | None = None
        self._start, self._chunk = 0, np.zeros((0, 0), np.float32)
        self.latencies: list[float] = []
        self.waited = 0.0

    @property
    def asking(self) -> bool:
        """Whether an answer is still to come; only one question is asked at a time."""
        return self._asked is not None

    def ask(self, step: int, observation: Mapping[str, Any]) -> None:
        """Asks what to do from control step `step` on, where this was observed.

        Raises:
            RuntimeError: the answer to another question is still to come.
        """
        if self.asking:
            raise RuntimeError(f"The query of step {self._asked[0]} has not been answered yet.")
        self._asked = step, self._thread.submit(self._timed, dict(observation))

    def action(self, step: int) -> np.ndarray:
        """The action [action_dim] of control step `step`, from the newest chunk there is.

        Waits only if no chunk that has come reaches to this step.

        Raises:
            RuntimeError: nothing was asked, or chunks are too short for the policy's latency.
            Exception: what `infer` raised.
        """
        if self.asking and self._asked[1].done():
            self._take()
        if step >= self._start + len(self._chunk) and self.asking:
            self.wait()
        if not self._start <= step < self._start + len(self._chunk):
            raise RuntimeError(
                f"Step {step} has no action: the newest chunk holds {len(self._chunk)} from step "
                f"{self._start} on. Ask more often."
            )
        return self._chunk[step - self._start]

    def wait(self) -> None:
        """Stands still until the answer to the open question has come.

        Raises:
            Exception: what `infer` raised.
        """
        began = time.monotonic()
        self._take()
        self.waited += time.monotonic() - began

    def close(self) -> None:
        """Ends the background thread, after the open question."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _timed(self, observation: Mapping[str, Any]) -> np.ndarray:
        began = time.monotonic()
        actions = self._infer(observation)["actions"]
        self.latencies.append(time.monotonic() - began)
        return actions

    def _take(self) -> None:
        (self._start, answer), self._asked = self._asked, None
        self._chunk = answer.result()
