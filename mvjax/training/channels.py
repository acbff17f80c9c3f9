"""Side channels: what people look at while a run trains. They may fail; the run goes on.

A failure is said once, and again when the channel works; meanwhile failures are counted. What may
wait for a disk or a network runs in a thread of its own, and is left out where that falls behind.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import image, scalar

log = logging.getLogger(__name__)

RETRY = 30.0  # seconds before something that failed is opened again


class BestEffort:
    """As a context: lets no error of the block out, says the first one and the end of the trouble.

    Attributes:
        lost: How many blocks have failed.
    """

    def __init__(self, what: str, meanwhile: str):
        """Takes the words for the messages.

        Args:
            what: What may fail, as the subject of a sentence: "TensorBoard".
            meanwhile: What follows from a failure: "its records are left out".
        """
        self._what, self._meanwhile = what, meanwhile
        self._lock, self.lost, self._in_a_row = threading.Lock(), 0, 0

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if error is None:
            self.works()
        elif isinstance(error, Exception):
            self.failed(error)
        return error is None or isinstance(error, Exception)

    def failed(self, reason: object) -> None:
        """Counts a failure; says it if it is the first one in a row."""
        with self._lock:
            self.lost, self._in_a_row, first = self.lost + 1, self._in_a_row + 1, not self._in_a_row
        if first:
            kind = f"{type(reason).__name__}: " if isinstance(reason, Exception) else ""
            text = " ".join(str(reason).split())[:300]
            log.warning(f"{self._what} failed ({kind}{text}); {self._meanwhile}.")

    def works(self) -> None:
        """Says that the trouble is over, if there was any."""
        with self._lock:
            count, self._in_a_row = self._in_a_row, 0
        if count:
            log.warning(f"{self._what} works again, after {count} failure{'s' * (count > 1)}.")


class Channel:
    """A `Sink` behind a thread and a short queue, so that nobody waits for it.

    The sink is opened in the thread, and again some time after a failure.
    """

    def __init__(self, name: str, open_sink: Callable[[], "Sink"], room: int = 200):
        """Starts the thread.

        Args:
            name: In messages.
            open_sink: Called in the thread.
            room: What waits beyond this number is left out.
        """
        self._effort = BestEffort(
            name, "the run goes on, and what comes meanwhile is missing there"
        )
        self._name, self._open, self._sink = name, open_sink, None
        self._not_before = 0.0
        self._queue: queue.Queue[Callable[[Sink], None] | None] = queue.Queue(room)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, work: Callable[["Sink"], None]) -> None:
        """Has `work(sink)` done in the thread, or left out if too much is waiting."""
        try:
            self._queue.put_nowait(work)
        except queue.Full:
            self._effort.failed(f"it does not keep up: {self._queue.maxsize} entries wait")

    def close(self, seconds: float = 20.0) -> None:
        """Waits until everything is written, but not longer than so many seconds."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=seconds / 2)
        self._thread.join(seconds / 2)
        if self._thread.is_alive():
            log.warning(f"{self._name} does not answer; its last entries are left out.")

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            if time.monotonic() < self._not_before:
                self._effort.failed("waiting")  # one in a row, so nothing is said
                continue
            with self._effort:
                self._not_before = time.monotonic() + RETRY  # unless it works
                if self._sink is None:
                    self._sink = self._open()
                work(self._sink)
                self._not_before = 0.0
            if self._not_before and self._sink is not None:
                self._abandon()
        if self._sink is not None:
            with self._effort:
                self._sink.close()

    def _abandon(self) -> None:
        sink, self._sink = self._sink, None
        with contextlib.suppress(Exception):
            sink.close()


class Sink(Protocol):
    """Where records and pictures go; every method may fail."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the numbers of a step."""
        ...

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Takes pictures, uint8 [h, w, 3]."""
        ...

    def close(self) -> None:
        """Writes what is left."""
        ...


class TensorBoard:
    """A TensorBoard file.

    tensorboardX's own `SummaryWriter` has a thread that ends at its first error, after which every
    call waits for ever; so this uses the parts below it.
    """

    def __init__(self, folder: Path, purge_step: int | None):
        """Opens a new file.

        Args:
            folder: Made if it is not there.
            purge_step: What earlier files say from this step on is to be forgotten; None for
                nothing.
        """
        folder.mkdir(parents=True, exist_ok=True)
        # The name has the time in seconds, and a file of the same name would be overwritten.
        suffix = f".{time.time_ns()}"
        try:
            self._file = EventsWriter(str(folder / "events"), suffix)
            if purge_step is not None:
                start = SessionLog(status=SessionLog.START)
                self._add(purge_step, file_version="brain.Event:2")
                self._add(purge_step, session_log=start)
            self._file.flush()
        except BaseException:
            for path in folder.glob(f"*{suffix}"):  # on a full disk, it would be one per attempt
                path.unlink()
            raise

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the numbers of a step, down to the disk."""
        now = time.time()
        for name, value in values.items():
            self._add(step, now, summary=scalar(name, value))
        self._file.flush()

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Writes pictures, uint8 [h, w, 3]."""
        for name, picture in pictures.items():
            self._add(step, summary=image(name, picture, dataformats="HWC"))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _add(self, step: int, now: float | None = None, **content: Any) -> None:
        now = time.time() if now is None else now
        self._file.write_event(Event(wall_time=now, step=step, **content))


class WandB:
    """A run at Weights & Biases."""

    def __init__(self, wandb: Any, **settings: Any):
        """Starts or continues it; `settings` are those of `wandb.init`."""
        self._wandb = wandb
        self._run = wandb.init(**settings)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the numbers of a step."""
        self._run.log(dict(values), step=step)

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Sends pictures, uint8 [h, w, 3]."""
        images = {name: self._wandb.Image(picture) for name, picture in pictures.items()}
        self._run.log(images, step=step)

    def close(self) -> None:
        """Waits until everything is sent."""
        self._run.finish()
