"""Stopping a run between two steps when the machine or the person asks for it."""

import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Interrupt:
    """Notes SIGTERM and Ctrl-C inside a `with` block instead of ending the process at once.

    A second signal ends the process as usual. With several processes all must stop at the same
    step; there JAX's own SIGTERM handling is asked, which agrees on one.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def exit_code(self, step: int) -> int | None:
        """None to go on; otherwise stop after this step: 0 for SIGTERM, 130 for Ctrl-C."""
        if jax.process_count() > 1:
            return 0 if multihost_utils.reached_preemption_sync_point(step) else None
        if self._signal is None:
            return None
        return 130 if self._signal == signal.SIGINT else 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
