"""Statistics for normalizers, of arrays and of records that do not fit in memory.

They are per time step and dimension: arrays [n, horizon, dim] are reduced over n, so every step of
an action chunk has its own scale, as in the release.
"""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data_pipelines.atomic import replacing, write_json
from data_pipelines.records import RecordDataset

Statistics = Mapping[str, np.ndarray]

_SCALARS = ("min", "max", "mean", "std", "clamp_min", "clamp_max", "mean_clamped", "std_clamped")
NAMES = (*_SCALARS, "percentiles")
P2, P98 = 20, 980  # indices of 2 % and 98 % among the percentiles
_PERCENTS = np.linspace(0.0, 100.0, 1001)
_ROW = len(_SCALARS) + len(_PERCENTS)  # numbers per dimension


def compute_statistics(data: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics over the first axis (release: `array_to_stats`).

    Args:
        data: [n, ...], typically [windows, horizon, dim].

    Returns:
        float64 min, max, mean, std, clamp_min, clamp_max, mean_clamped and std_clamped of shape
        [...]; percentiles [1001, ...] in steps of 0.1 %.
    """
    data = np.asarray(data)
    rows = [row_statistics(row) for row in data.reshape(len(data), -1).T]
    return _from_rows(np.reshape(rows, (-1, _ROW)), data.shape[1:])


def concat_statistics(
    statistics: Mapping[str, Statistics], keys: Sequence[str]
) -> dict[str, np.ndarray]:
    """Joins the statistics of several keys along the last axis, in the given order."""
    return {
        name: np.concatenate([np.asarray(statistics[key][name]) for key in keys], axis=-1)
        for name in NAMES
    }


def row_statistics(values: np.ndarray) -> np.ndarray:
    """Statistics of one dimension, finite [n], n > 0: float64 [`_ROW`], scalars, percentiles."""
    ordered = np.sort(values)
    # Equal to `np.percentile(ordered, _PERCENTS)`, which would sort again.
    position = _PERCENTS / 100 * (len(ordered) - 1)
    before = np.floor(position).astype(np.int64)
    after = np.minimum(before + 1, len(ordered) - 1)
    start, end = ordered[before].astype(np.float64), ordered[after].astype(np.float64)
    percentiles = start + (position - before) * (end - start)

    mean, std = ordered.mean(dtype=np.float64), ordered.std(dtype=np.float64)
    clamp_min = mean + 1.5 * (percentiles[P2] - mean)
    clamp_max = mean + 1.5 * (percentiles[P98] - mean)
    # Sorted values need clamping only at both ends.
    low, high = np.searchsorted(ordered, (clamp_min, clamp_max))
    clamped = ordered.astype(np.float64)
    clamped[:low], clamped[high:] = clamp_min, clamp_max
    scalars = (ordered[0], ordered[-1], mean, std, clamp_min, clamp_max)
    return np.concatenate([scalars, (clamped.mean(), clamped.std()), percentiles])


def _from_rows(rows: np.ndarray, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The result of `compute_statistics` from rows [prod(shape), `_ROW`]."""
    scalars = {name: rows[:, i].reshape(shape) for i, name in enumerate(_SCALARS)}
    percentiles = rows[:, len(scalars) :].T.reshape(len(_PERCENTS), *shape)
    return scalars | {"percentiles": percentiles}


# Statistics of records that need not fit in memory. One pass over the shards transposes rows into
# columns on disk, one per time step and dimension. Then each column is sorted by itself, for exact
# percentiles with the memory of one column. A stopped pass resumes where it was.

_THREADS = 2  # columns in memory at once; numpy releases the interpreter lock to sort
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
        sources: each dataset, and the records of it that count (ascending).
        key: name of a column, of shape [H, D] in a record.
        scratch: a folder for 4 bytes per number, from which a stopped call with the same sources
            and `padding` resumes. The caller removes it.
        padding: whether padded time steps count. A step that is padded in every record gets the
            statistics of the nearest other step.

    Returns:
        min, max, ... of shape [H, D] and percentiles [1001, H, D].

    Raises:
        ValueError: there are no records, or all is padding.
    """
    shape = sources[0][0].shapes[key]
    rows = sum(len(indices) for _, indices in sources)
    if rows == 0:
        raise ValueError(f"there are no records for the statistics of {key}.")
    scratch.mkdir(parents=True, exist_ok=True)
    columns, progress, results = (
        scratch / f"{key}.{suffix}" for suffix in ("columns", "json", "npy")
    )
    if not columns.exists():
        for later in (progress, results):
            later.unlink(missing_ok=True)
    _gather(sources, key, padding, rows, columns, progress)
    steps = _reduce(columns, rows, int(np.prod(shape)), results).reshape(*shape, _ROW)
    known = np.flatnonzero(~np.isnan(steps).any((1, 2)))
    if len(known) == 0:
        raise ValueError(f"all {key} are padding, so they have no statistics.")
    nearest = [known[np.abs(known - step).argmin()] for step in range(len(steps))]
    return _from_rows(steps[nearest].reshape(-1, _ROW), shape)


def _gather(
    sources: Sequence[tuple[RecordDataset, np.ndarray]],
    key: str,
    padding: bool,
    rows: int,
    columns: Path,
    progress: Path,
) -> None:
    """Writes a file of float32 [columns, rows], NaN where a value does not count."""
    names = (key,) if padding else (key, f"{key}_padded")
    done = json.loads(progress.read_text()) if progress.exists() else 0
    shard = at = 0
    with columns.open("r+b" if columns.exists() else "w+b") as file:
        for dataset, indices in sources:
            first = 0  # the shard's first record in this dataset
            for part in dataset.shard_columns(*names):
                values = part[key]
                if not padding:
                    values = np.where(part[names[1]][..., None], np.nan, values)
                start, end = np.searchsorted(indices, (first, first + len(values)))
                chosen = indices[start:end] - first
                if shard >= done:
                    turned = values[chosen].reshape(len(chosen), -1 if len(chosen) else 0).T
                    # Not a memory map, whose dirty pages would count as memory.
                    for number, column in enumerate(turned.astype(np.float32, order="C")):
                        os.pwrite(file.fileno(), column.data, 4 * (number * rows + at))
                    os.fsync(file.fileno())  # before `progress` marks the shard as done
                    write_json(progress, shard + 1)
                shard, at, first = shard + 1, at + len(chosen), first + len(values)


def _reduce(columns: Path, rows: int, count: int, path: Path) -> np.ndarray:
    """`row_statistics` of every column: float64 [count, `_ROW`], NaN where nothing counts."""
    results = np.load(path) if path.exists() else np.zeros((0, _ROW))

    def one(number: int) -> np.ndarray:
        column = np.fromfile(columns, np.float32, rows, offset=4 * number * rows)
        column = column[~np.isnan(column)]
        return row_statistics(column) if len(column) else np.full(_ROW, np.nan)

    with ThreadPoolExecutor(_THREADS) as pool:
        while len(results) < count:
            some = range(len(results), min(len(results) + _SAVED_EVERY, count))
            results = np.concatenate([results, list(pool.map(one, some))])
            with replacing(path) as partial, partial.open("wb") as file:
                np.save(file, results)
    return results
