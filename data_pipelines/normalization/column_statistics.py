"""Statistics of numeric columns that need not fit in memory, in one pass over the records' numbers.

The pass turns rows into columns on disk, one per time step and dimension; then every column is
sorted by itself, which gives exact percentiles with the memory of one column. A pass that was
stopped goes on where it was.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data_pipelines.normalization.normalizer import ROW, from_rows, row_statistics
from data_pipelines.records.dataset import RecordDataset
from data_pipelines.records.writer import write_json

_THREADS = 2  # columns in memory at once; numpy sorts without the interpreter lock
_SAVED_EVERY = 64  # columns


def column_statistics(
    sources: Sequence[tuple[RecordDataset, np.ndarray]],
    key: str,
    scratch: Path,
    *,
    padding: bool = True,
) -> dict[str, np.ndarray]:
    """`compute_statistics` of one column of several datasets; only their .npz files are read.

    Args:
        sources: datasets with that column, and the records of each that count (ascending).
        key: the column's name, of shape [H, D] in a record.
        scratch: folder for 4 bytes per number. It belongs to these sources and this `padding`
            alone; what an earlier call left there is used. The caller removes it.
        padding: whether time steps outside the episode count, which repeat an edge value. A time
            step that lies outside in every record takes the statistics of the nearest other.

    Returns:
        min, max, ... of shape [H, D] and percentiles [1001, H, D].

    Raises:
        ValueError: if there are no records, or nothing but padding.
    """
    shape = sources[0][0].shapes[key]
    rows = sum(len(indices) for _, indices in sources)
    if rows == 0:
        raise ValueError(f"there are no records to take statistics of {key} from.")
    scratch.mkdir(parents=True, exist_ok=True)
    columns, gathered, results = (
        scratch / f"{key}.{suffix}" for suffix in ("columns", "json", "npy")
    )
    if not columns.exists():
        for later in (gathered, results):
            later.unlink(missing_ok=True)
    _gather(sources, key, padding, rows, columns, gathered)
    reduced = _reduce(columns, rows, int(np.prod(shape)), results)
    return from_rows(_filled(reduced.reshape(*shape, ROW), key).reshape(-1, ROW), shape)


def _gather(
    sources: Sequence[tuple[RecordDataset, np.ndarray]],
    key: str,
    padding: bool,
    rows: int,
    columns: Path,
    progress: Path,
) -> None:
    """Writes a file of float32 [columns, rows]; NaN is what does not count.

    No memory map: its pages would count as memory.
    """
    names = (key,) if padding else (key, f"{key}_padded")
    done = json.loads(progress.read_text()) if progress.exists() else 0
    shard = at = 0
    with columns.open("r+b" if columns.exists() else "w+b") as file:
        for dataset, indices in sources:
            first = 0
            for part in dataset.shard_columns(*names):
                values = part[key]
                if not padding:
                    values = np.where(part[names[1]][..., None], np.nan, values)
                chosen = indices[np.searchsorted(indices, first) :]
                chosen = chosen[: np.searchsorted(chosen, first + len(values))] - first
                if shard >= done:
                    turned = values[chosen].reshape(len(chosen), -1 if len(chosen) else 0).T
                    for number, column in enumerate(turned.astype(np.float32, order="C")):
                        os.pwrite(file.fileno(), column.data, 4 * (number * rows + at))
                    os.fsync(file.fileno())
                    write_json(progress, shard + 1)
                shard, at, first = shard + 1, at + len(chosen), first + len(values)


def _reduce(columns: Path, rows: int, count: int, path: Path) -> np.ndarray:
    """`row_statistics` of every column: float64 [count, ROW], NaN where nothing counts."""
    results = np.load(path) if path.exists() else np.zeros((0, ROW))

    def one(number: int) -> np.ndarray:
        column = np.fromfile(columns, np.float32, rows, offset=4 * number * rows)
        column = column[~np.isnan(column)]
        return row_statistics(column) if len(column) else np.full(ROW, np.nan)

    with ThreadPoolExecutor(_THREADS) as pool:
        while len(results) < count:
            some = range(len(results), min(len(results) + _SAVED_EVERY, count))
            results = np.concatenate([results, list(pool.map(one, some))])
            partial = path.with_suffix(".partial.npy")
            np.save(partial, results)
            partial.replace(path)
    return results


def _filled(steps: np.ndarray, key: str) -> np.ndarray:
    """Statistics [H, D, ROW] where a time step that has none takes those of the nearest."""
    known = np.flatnonzero(~np.isnan(steps).any((1, 2)))
    if len(known) == 0:
        raise ValueError(f"all {key} are padding, so there is nothing to take statistics of.")
    return steps[[known[np.abs(known - step).argmin()] for step in range(len(steps))]]
