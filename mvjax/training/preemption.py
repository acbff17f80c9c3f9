"""SIGTERM and Ctrl-C: a run stops between two steps when the machine or the person asks for it."""

import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Interrupt:
    """Notes SIGTERM and Ctrl-C inside a `with` block instead of ending the process at once.

    A second signal ends a single process as usual. Several processes must all stop at the same
    step: JAX notices a SIGTERM to any of them and agrees on the step; Ctrl-C counts as SIGTERM.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, object] = {}
        self._first: int | None = None

    def __enter__(self) -> "Interrupt":
        # With several processes JAX's own SIGTERM handler must stay in place.
        several = jax.process_count() > 1
        for number in (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._pass_on if several else self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def exit_code(self, step: int) -> int | None:
        """None to go on; otherwise stop after this step: 0 for SIGTERM, 130 for Ctrl-C.

        With several processes, each must ask after every step.
        """
        if jax.process_count() > 1:
            # JAX agrees on the largest number it was asked about, plus one. Before the first call
            # that is 1, so a run that continues at step 1000 must not ask about 1001: a signal
            # received while it compiled would be lost.
            self._first = step if self._first is None else self._first
            count = step - self._first + 1
            return 0 if multihost_utils.reached_preemption_sync_point(count) else None
        if self._signal is None:
            return None
        return 130 if self._signal == signal.SIGINT else 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        self._restore()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGTERM)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
