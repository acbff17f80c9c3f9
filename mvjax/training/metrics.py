"""Writing metrics without making the devices wait for the disk or the host for the devices."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from mvjax.training.levels import named_levels
from mvjax.training.wandb_board import open_wandb

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
    """Writes `metrics.jsonl` and TensorBoard files, and tells Weights & Biases, on process 0.

    A record is fetched from the devices when the next one is given (or on `flush`), so the loop
    never waits for a step it has only just started. A value that is not finite is written as null.
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
        self._file = self._board = self._wandb = None
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
        self._wandb = open_wandb(wandb, workdir, config) if wandb else None

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
            on_device: Scalars still being computed.
            levels: `error_by_level` of this step and of those since the last record.
            on_host: Numbers that are known.
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
        if self._file is None or self._board is None:
            return
        record = {k: v if math.isfinite(v) else None for k, v in self.latest.items()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(values, step=step)

    def show(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Shows pictures, uint8 [h, w, 3], where TensorBoard and W&B show scalars."""
        for name, picture in pictures.items() if self._board else ():
            self._board.add_image(name, picture, step, dataformats="HWC")
        if self._wandb and pictures:
            self._wandb.show(pictures, step)

    def close(self) -> None:
        """Writes what is left and closes the files."""
        self.flush()
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()
        if self._wandb:
            self._wandb.close()
