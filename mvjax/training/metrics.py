"""Writing metrics without making the devices wait for the disk or the host for the devices."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter

Record = dict[str, float]


def read_records(workdir: Path) -> list[Record]:
    """The records of `metrics.jsonl`, oldest first; a line cut off by a crash is left out."""
    path = Path(workdir) / "metrics.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


class MetricsWriter:
    """Writes `metrics.jsonl` and TensorBoard files on process 0.

    A record is fetched from the devices when the next one is given (or on `flush`), so the loop
    never waits for a step it has only just started. A value that is not finite is written as null.
    """

    def __init__(self, workdir: Path, resume_step: int):
        """Opens the files and drops the records of steps after `resume_step`, to be redone."""
        self.latest: Record | None = None
        self._pending: tuple[int, Mapping[str, Any], Mapping[str, float]] | None = None
        self._file = self._board = None
        if jax.process_index() != 0:
            return
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_records(workdir) if record["step"] <= resume_step]
        path, rewritten = workdir / "metrics.jsonl", workdir / "metrics.jsonl.tmp"
        rewritten.write_text("".join(json.dumps(record) + "\n" for record in kept))
        rewritten.replace(path)
        self._file = path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)

    def log(self, step: int, on_device: Mapping[str, Any], timing: Mapping[str, float]) -> None:
        """Takes the metrics of a step and writes those given before.

        Args:
            step: Number of steps made.
            on_device: Scalars still being computed.
            timing: Host numbers, in seconds unless their name says otherwise.
        """
        self.flush()
        self._pending = (step, on_device, timing)

    def flush(self) -> None:
        """Writes what was given last, waiting for its values."""
        if self._pending is None:
            return
        step, on_device, timing = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(dict(on_device)).items()}
        self.latest = {"step": step, "time": time.time(), **values, **timing}
        if self._file is None or self._board is None:
            return
        record = {k: v if math.isfinite(v) else None for k, v in self.latest.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in {**values, **timing}.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is left and closes the files."""
        self.flush()
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()
