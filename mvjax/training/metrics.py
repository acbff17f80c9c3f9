"""What a run measures and writes while it trains: metrics, throughput, profiler traces.

Nothing here makes the devices wait for the disk, or the host for the devices.
"""

import contextlib
import importlib
import json
import logging
import math
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import psutil

from data_pipelines.atomic import write_text
from mvjax.models.flops import peak_flops
from mvjax.training.channels import BestEffort, Channel, Sink, TensorBoard, WandB
from mvjax.training.objectives import Stage, named_levels

log = logging.getLogger(__name__)

Record = dict[str, float]
MB = 2**20


class MetricsWriter:
    """Writes `metrics.jsonl`, TensorBoard files and Weights & Biases, on process 0.

    A record is fetched from the devices when the next one is given (or on `flush`), so the loop
    never waits for a step it has only just started. JSON has no NaN: a value that is not finite is
    written as null. Nothing that cannot be written stops the run: `metrics.jsonl` is completed when
    it can be written again, the others leave out what they could not take.
    """

    def __init__(self, workdir: Path, resume_step: int, wandb: str = "", config: Any = None):
        """Opens the files and drops the records of steps after `resume_step`, to be redone.

        Args:
            workdir: The training directory.
            resume_step: The step the run starts from.
            wandb: Project at Weights & Biases; "" for none.
            config: JSON-able settings shown there.
        """
        self.latest: Record | None = None
        self._pending: tuple[Any, ...] | None = None
        self._journal: _Journal | None = None
        self._channels: list[Channel] = []
        if jax.process_index() != 0:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self._journal = _Journal(workdir, resume_step)
        purge = [resume_step + 1]  # once

        def open_board() -> Sink:
            board = TensorBoard(workdir / "tensorboard", *purge or [None])
            purge.clear()
            return board

        self._channels.append(Channel("TensorBoard", open_board))
        if wandb:
            package = require_wandb(wandb)

            def open_wandb() -> Sink:
                return WandB(
                    package,
                    project=wandb,
                    name=workdir.name,
                    id=_wandb_id(workdir / "wandb_id"),
                    dir=str(workdir),
                    resume="allow",
                    config=config,
                )

            self._channels.append(Channel("Weights & Biases", open_wandb))

    def log(
        self,
        step: int,
        on_device: Mapping[str, Any],
        levels: Sequence[Any],
        on_host: Mapping[str, float],
    ) -> None:
        """Takes the metrics of a step and writes those given before.

        Args:
            step: Number of steps made.
            on_device: Scalars that may still be being computed.
            levels: `error_by_level` of every step since the last record.
            on_host: Further numbers, already known.
        """
        self.flush()
        self._pending = (step, dict(on_device), list(levels), on_host)

    def flush(self) -> None:
        """Writes what was given last, waiting for its values."""
        if self._pending is None:
            return
        step, on_device, levels, on_host = self._pending
        self._pending = None
        on_device, levels = jax.device_get((on_device, levels))
        values = {name: float(value) for name, value in on_device.items()}
        values |= {**named_levels(levels), **on_host}
        self.latest = {"step": step, "time": time.time(), **values}
        if self._journal is None:
            return
        self._journal.write(self.latest)
        for channel in self._channels:
            channel.put(lambda sink: sink.numbers(step, values))

    def show(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Adds pictures, uint8 [h, w, 3], to TensorBoard and Weights & Biases."""
        for channel in self._channels if pictures else ():
            channel.put(lambda sink: sink.pictures(step, pictures))

    def close(self) -> None:
        """Writes what is left and closes the files."""
        self.flush()
        if self._journal is not None:
            self._journal.close()
        for channel in self._channels:
            channel.close()


def _wandb_id(file: Path) -> str:
    """The id of a run: its own when it continues, a new one for a copy of its folder."""
    said = file.read_text().splitlines() if file.exists() else []
    id, *place = said or [uuid.uuid4().hex[:12]]
    if place and (original := Path(place[0]) / file.name).exists():  # moved, it is there no more
        if not original.samefile(file) and original.read_text().startswith(id):
            id = uuid.uuid4().hex[:12]
    if [id, here := str(file.parent.absolute())] != said:
        write_text(file, f"{id}\n{here}\n")
    return id


class _Journal:
    """The file `metrics.jsonl`: records that cannot be written yet wait for the next one."""

    def __init__(self, workdir: Path, resume_step: int):
        """Drops the records of steps after `resume_step`."""
        self._path, self._resume_step = workdir / "metrics.jsonl", resume_step
        self._size: int | None = None  # of what is whole; None before the first write
        self._waiting: list[str] = []
        self._effort = BestEffort(f"writing {self._path}", "the run goes on, and its records wait")
        self._write()

    def write(self, record: Record) -> None:
        """Adds a record."""
        finite = {k: v if math.isfinite(v) else None for k, v in record.items()}
        self._waiting.append(json.dumps(finite) + "\n")
        self._write()

    def close(self) -> None:
        """Tries once more to write what waits, and says what is lost."""
        if self._waiting:
            self._write()
        if self._waiting:
            log.warning(f"{self._path} lacks its last {len(self._waiting)} records.")

    def _write(self) -> None:
        with self._effort:
            if self._size is None:  # here, since reading may fail as well
                found = read_records(self._path.parent)
                kept = [json.dumps(r) + "\n" for r in found if r["step"] <= self._resume_step]
                write_text(self._path, "".join(kept))
                self._size = self._path.stat().st_size
            # Opened each time: on a network a file that stays open may become stale.
            with self._path.open("ab") as file:
                if file.tell() > self._size:  # what an attempt that failed has left
                    file.truncate(self._size)
                file.write("".join(self._waiting).encode())
            self._size, self._waiting = self._path.stat().st_size, []


def require_wandb(project: str) -> ModuleType:
    """Imports the package that a run in this project needs; ValueError if it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(
            f"config.wandb is {project!r}, but the package wandb is not installed: "
            'pip install wandb, or leave config.wandb="".'
        ) from error


def read_records(workdir: Path) -> list[Record]:
    """The records of `metrics.jsonl`, oldest first; lines that a crash has spoilt are left out."""
    path = Path(workdir) / "metrics.jsonl"
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # no text, or no JSON
            record = json.loads(line)
            if isinstance(record, dict) and "step" in record:
                records.append(record)
    return records


class Throughput:
    """Seconds per activity, and steps and samples per second, since the last `take`.

    Steps are counted when the devices have finished them, not when they are queued: the time of a
    step is that of data and step together, divided by the number finished meanwhile.
    """

    def __init__(self, stage: Stage, batch_size: int, step: int):
        """Starts at `step` of a run with this global batch size."""
        self._stage, self._batch_size = stage, batch_size
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._counted = self._finished = step
        peak = peak_flops(jax.devices()[0])
        self._peak = peak * jax.device_count() if peak else None

    @contextlib.contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        """Counts the time inside the block under `<activity>_seconds`."""
        start = time.perf_counter()
        yield
        self._spent[f"{activity}_seconds"] += time.perf_counter() - start

    def finished(self, step: int) -> None:
        """Notes that the devices have made this step."""
        self._finished = step

    def take(self) -> dict[str, float]:
        """What was measured, by name; `mfu` only where the devices' peak is known."""
        numbers, self._spent = dict(self._spent), defaultdict(float)
        steps, self._counted = self._finished - self._counted, self._finished
        seconds = numbers.get("data_seconds", 0.0) + numbers.get("step_seconds", 0.0)
        if steps and seconds:
            samples = steps * self._batch_size / seconds
            numbers |= {"seconds_per_step": seconds / steps, "samples_per_second": samples}
            if self._stage.tokens:
                numbers["tokens_per_second"] = samples * self._stage.tokens
            if self._stage.flops and self._peak:
                numbers["mfu"] = samples * self._stage.flops / self._peak
        return numbers | _memory()


def _memory() -> dict[str, float]:
    """The peak of any local device so far; of this process where the backend does not tell."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        return {"device_peak_mb": max(peaks) / MB}
    return {"host_mb": psutil.Process().memory_info().rss / MB}


WARM_UP, TRACED = 3, 3  # steps before a trace begins, and steps in it


def traced_steps(first: int, last: int, folder: Path | None) -> Iterator[int]:
    """Yields the steps `first` to `last`, and traces a few of them into `folder` (None: none).

    Every step runs inside a `StepTraceAnnotation`, which costs nothing unless something traces.
    """
    start = max(first, min(first + WARM_UP, last - TRACED + 1)) if folder else last + 1
    tracing, effort = False, BestEffort("the profiler", "the run goes on without a trace")
    try:
        for step in range(first, last + 1):
            if step == start:
                with effort:
                    jax.profiler.start_trace(str(folder))
                    tracing = True
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                yield step
            # One step late: the loop waits for a step only after it has queued the next.
            if tracing and step == start + TRACED:
                tracing = False
                with effort:
                    jax.profiler.stop_trace()
    finally:
        if tracing:
            with effort:
                jax.profiler.stop_trace()
