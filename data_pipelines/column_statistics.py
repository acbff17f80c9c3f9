"""Statistics of numeric columns that need not fit in memory, in one pass over the records' numbers.

The pass turns rows into columns on disk, one per time step and dimension; then every column is
sorted by itself, which gives exact percentiles with the memory of one column. A pass that was
stopped goes on where it was.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data_pipelines.normalizer import ROW, from_rows, row_statistics
from data_pipelines.records import RecordDataset, write_json

_THREADS = 2  # columns in memory at once; numpy sorts without the interpreter lock
_SAVED_EVERY = 64  # columns


def column_statistics(
    sources: Sequence[tuple[RecordDataset, np.ndarray]], key: str, scratch: Path
) -> dict[str, np.ndarray]:
    """`compute_statistics` of one column of several datasets; only their .npz files are read.

    Args:
        sources: datasets with that column, and the records of each that count (ascending).
        key: the column's name, of shape [H, D] in a record.
        scratch: folder for 4 bytes per number. It belongs to these sources alone; what an earlier
            call left there is used. The caller removes it.

    Returns:
        min, max, ... of shape [H, D] and percentiles [1001, H, D].
    """
    shape = sources[0][0].shapes[key]
    rows = sum(len(indices) for _, indices in sources)
    if rows == 0:
        raise ValueError(f"there are no records to take statistics of {key} from.")
    scratch.mkdir(parents=True, exist_ok=True)
    turned, gathered = scratch / f"{key}.columns", scratch / f"{key}.json"
    results = scratch / f"{key}.npy"
    if not turned.exists():
        for later in (gathered, results):
            later.unlink(missing_ok=True)
    columns = np.memmap(
        turned, np.float32, "r+" if turned.exists() else "w+", shape=(int(np.prod(shape)), rows)
    )
    _gather(sources, key, columns, gathered)
    return from_rows(_reduce(columns, results), shape)


def _gather(
    sources: Sequence[tuple[RecordDataset, np.ndarray]],
    key: str,
    columns: np.memmap,
    progress: Path,
) -> None:
    done = json.loads(progress.read_text()) if progress.exists() else 0
    shard = at = 0
    for dataset, indices in sources:
        first = 0
        for part in dataset.shard_columns(key):
            values = part[key]
            chosen = indices[np.searchsorted(indices, first) :]
            chosen = chosen[: np.searchsorted(chosen, first + len(values))] - first
            if shard >= done:
                turned = values[chosen].reshape(len(chosen), len(columns)).T
                columns[:, at : at + len(chosen)] = turned
                columns.flush()
                write_json(progress, shard + 1)
            shard, at, first = shard + 1, at + len(chosen), first + len(values)


def _reduce(columns: np.memmap, path: Path) -> np.ndarray:
    results = np.load(path) if path.exists() else np.zeros((0, ROW))
    with ThreadPoolExecutor(_THREADS) as pool:
        while len(results) < len(columns):
            some = columns[len(results) : len(results) + _SAVED_EVERY]
            results = np.concatenate([results, list(pool.map(row_statistics, some))])
            partial = path.with_suffix(".partial.npy")
            np.save(partial, results)
            partial.replace(path)
    return results
