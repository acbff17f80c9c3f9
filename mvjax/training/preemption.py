"""SIGTERM and Ctrl-C: a run stops between two steps when the machine or the person asks for it."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

GRACE = 5.0  # seconds after a signal in which what the loop waits for may still come


class Overdue(BaseException):
    """What the loop waited for has not come in time after a signal.

    No `Exception`, so that nothing on its way takes it for a failure that it can recover from.
    """


class Interrupt:
    """Notes SIGTERM and Ctrl-C inside a `with` block instead of ending the process at once.

    A wait inside `waiting()` is broken off where it lasts, by `Overdue`, so that a run whose data
    does not come can be saved. Further SIGTERMs change nothing, since schedulers send several; a
    second Ctrl-C ends the process, unless the loop has begun to save and stop.

    Several processes must all stop at the same step: JAX notices a SIGTERM to any of them and
    agrees on the step; Ctrl-C counts as SIGTERM, and a second one ends the process.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, object] = {}
        self._first: int | None = None
        self._waiting = self._overdue = self._stopping = False
        self._timer: threading.Timer | None = None

    def __enter__(self) -> "Interrupt":
        # With several processes JAX's own SIGTERM handler must stay in place.
        handlers = {
            signal.SIGTERM: self._note,
            signal.SIGINT: self._note,
            signal.SIGURG: self._break_off,
        }
        if jax.process_count() > 1:
            handlers = {signal.SIGINT: self._pass_on}
        for number, handler in handlers.items():
            self._previous[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._timer:
            self._timer.cancel()
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
        self._stopping = True
        return 130 if self._signal == signal.SIGINT else 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a wait that may never end, between two steps.

        Raises:
            Overdue: `GRACE` seconds after a signal; never with several processes.
        """
        if self._overdue:
            raise Overdue
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None:
            self._signal = number
            self._timer = threading.Timer(GRACE, self._wake)
            self._timer.daemon = True
            self._timer.start()
        elif number == signal.SIGINT and not self._stopping:
            self._restore()
            signal.raise_signal(number)

    def _wake(self) -> None:
        # Only the main thread can break its wait off, in the handler of a signal; this one is
        # ignored where it comes too late for that.
        signal.pthread_kill(threading.main_thread().ident, signal.SIGURG)

    def _break_off(self, number: int, frame: FrameType | None) -> None:
        self._overdue = True
        if self._waiting:
            self._waiting = False
            raise Overdue

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        signal.raise_signal(signal.SIGTERM)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
