"""Statistics for normalizers, of arrays and of records that do not fit in memory.

`affine_of` is what each mode makes of them, `collapsed` finds what that would lose.

They are per time step and dimension: arrays [n, horizon, dim] are reduced over n, so every step of
an action chunk has its own scale, as in the release.
"""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.atomic import replacing, write_json
from data_pipelines.records import RecordDataset
from data_pipelines.representations import Mode

Statistics = Mapping[str, np.ndarray]

_SCALARS = ("min", "max", "mean", "std", "clamp_min", "clamp_max", "mean_clamped", "std_clamped")
NAMES = (*_SCALARS, "percentiles")
P2, P98 = 20, 980  # indices of 2 % and 98 % among the percentiles
PERCENTILES = 1001  # how many, from 0 to 100 %
_PERCENTS = np.linspace(0.0, 100.0, PERCENTILES)
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


_FLAT = 1e-5  # a dimension with a smaller spread counts as constant and is not scaled


@dataclass(frozen=True)
class Affine:
    """`normalized = clip((x - shift) * scale, clamp_min, clamp_max)`; all float32 [...]."""

    shift: np.ndarray
    scale: np.ndarray
    clamp_min: np.ndarray
    clamp_max: np.ndarray


def affine_of(statistics: Statistics, mode: Mode) -> Affine:
    """The affine map of a mode, from the output of `compute_statistics`."""
    mean, low, high = statistics["mean"], *np.asarray(statistics["percentiles"])[[P2, P98]]
    if mode is Mode.VARIANCE:
        shift, spread = statistics["mean_clamped"], np.asarray(statistics["std_clamped"])
    elif mode in (Mode.SQUASH, Mode.SQUASH_HARD):
        if mode is Mode.SQUASH_HARD:
            margin = 0.25 * (high - low)
            low = np.maximum(low - margin, statistics["min"])
            high = np.minimum(high + margin, statistics["max"])
        shift, spread = 0.5 * (low + high), 0.5 * (high - low)
    else:
        shift, spread = np.zeros_like(mean), np.ones_like(mean)
    scale = 1.0 / np.where(np.abs(spread) < _FLAT, 1.0, spread)
    if mode is Mode.VARIANCE:
        bounds = ((statistics[name] - shift) * scale for name in ("clamp_min", "clamp_max"))
    else:
        limit = {Mode.SQUASH: 1.5, Mode.SQUASH_HARD: 1.0}.get(mode, np.inf)
        bounds = (np.full_like(mean, -limit), np.full_like(mean, limit))
    return Affine(*(np.asarray(part, np.float32) for part in (shift, scale, *bounds)))


# What a mode loses.

_RARE = 1e-3  # the smallest share of the values that counts; the percentiles tell no smaller one
_NOISE = 1e-4  # a smaller spread is more likely noise than a motion
_RESOLUTION = 64 * np.finfo(np.float32).eps  # a smaller relative spread is rounding


def collapsed(statistics: Statistics, modes: Mode | Sequence[Mode]) -> list[tuple[int, str]]:
    """The dimensions of which normalisation loses what varies, or in which it amplifies noise.

    VARIANCE, the release's formula, clamps at 1.5 times the distance from the mean to the 2nd and
    98th percentile. A command that is 1 in one step of 80 has both at 0, and becomes a constant.

    Args:
        statistics: of `compute_statistics`, [..., d].
        modes: one, or one of each of the d dimensions.

    Returns:
        Dimension -> what becomes of it, as the end of a sentence that begins with its name.
    """
    dim = np.shape(statistics["mean"])[-1]
    each = [Mode(modes)] * dim if isinstance(modes, str) else [Mode(mode) for mode in modes]
    erased = {mode: _erased(statistics, mode) for mode in Mode if mode != Mode.NONE}
    grid = np.moveaxis(statistics["percentiles"], -1, 0).reshape(dim, len(_PERCENTS), -1)
    found = []
    for i, mode in enumerate(each):
        if mode == Mode.NONE:
            continue
        worst = erased[mode][i]
        if worst is not None:
            keeping = [repr(m.value) for m in erased if erased[m][i] is None]
            remedy = f"; normalize={' or '.join(keeping)} keeps it" if keeping else ""
            found.append((i, f"{_described(grid[i][:, worst[0]])}, but {worst[1]}{remedy}"))
        elif text := _amplified(statistics, mode, i):
            found.append((i, text))
    return found


def _erased(statistics: Statistics, mode: Mode) -> list[tuple[int, str] | None]:
    """Of each dimension None, or the time step of which a mode loses most, and what it keeps."""
    affine = affine_of(statistics, mode)
    dim = np.shape(statistics["mean"])[-1]
    scale = affine.scale.astype(np.float64)
    low, high = (
        (affine.shift + bound / scale).reshape(-1, dim)
        for bound in (affine.clamp_min, affine.clamp_max)
    )
    grid = np.reshape(statistics["percentiles"], (len(_PERCENTS), -1, dim))
    span = grid[-1] - grid[0]
    kept = np.minimum(high, grid[-1]) - np.maximum(low, grid[0])
    beyond, middle = np.maximum(grid - high, low - grid), grid[P98] - grid[P2]
    constant = middle < np.maximum(_FLAT, _RESOLUTION * np.abs(grid[P2 : P98 + 1]).max(0))
    rare = np.abs(grid - np.median(grid, axis=0)) > 1e-3 * span
    # What counts: rare values beside a constant; values so far out that they are of another kind
    # (a Gaussian's largest are clamped, too); most values, because one huge value moved the mean.
    lost = constant & ((rare & (beyond > 0.1 * span)).sum(0) > 0.5 * rare.sum(0))
    lost |= (beyond > 1.5 * np.maximum(kept, 0.0)).mean(0) > 2 * _RARE
    lost |= (beyond[P2 : P98 + 1] > 1e-3 * middle).mean(0) > 0.02
    lost &= span > np.maximum(_FLAT, _RESOLUTION * np.abs(grid).max(0))
    result = []
    for i in range(dim):
        steps = np.flatnonzero(lost[:, i])
        if len(steps) == 0:
            result.append(None)
            continue
        step = steps[np.argmax(span[steps, i])]
        ends = sorted((low[step, i], high[step, i]))
        left = f"{ends[0]:.3g}" if np.isclose(*ends) else f"{ends[0]:.3g} to {ends[1]:.3g}"
        result.append((step, f"{mode} leaves only {left} of it"))
    return result


def _described(grid: np.ndarray) -> str:
    """What a dimension with these percentiles holds."""
    low, middle, high = grid[0], np.median(grid), grid[-1]
    away = (np.abs(grid - middle) > 1e-3 * (high - low)).mean()
    if away > 0.1:
        return f"is between {low:.3g} and {high:.3g}"
    most = high if high - middle > middle - low else low
    # The grid of percentiles counts a single value as 0.1 %.
    return f"is {middle:.3g} except in {100 * away:.1f} % of its values, which reach {most:.3g}"


def _amplified(statistics: Statistics, mode: Mode, i: int) -> str | None:
    """What is to be said of a dimension that hardly varies."""
    if mode not in (Mode.VARIANCE, Mode.SQUASH, Mode.SQUASH_HARD):
        return None
    scale = float(affine_of(statistics, mode).scale[..., i].min())
    low, high = statistics["min"][..., i].min(), statistics["max"][..., i].max()
    size = np.abs(statistics["percentiles"][P2 : P98 + 1, ..., i]).max()
    span = high - low
    if span == 0 or (scale == 1 and span < _RESOLUTION * size):
        return None
    if scale == 1 and (most := max(abs(low), abs(high))) < _FLAT:
        return f"reaches only {most:.2g} and is not scaled: give it in a smaller unit"
    if scale > 1 / max(_NOISE, _RESOLUTION * size):
        return (
            f"varies by {span:.2g} only (from {low:.9g} to {high:.9g}), which {mode} scales up to "
            "the size of the others: if it is noise, use normalize='IDENTITY' or leave it out"
        )
    return None


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
                if not np.isfinite(values).all():  # NaN would count as padding
                    raise ValueError(
                        f"the {key} of {dataset.name!r} hold NaN or infinity; encode it again"
                    )
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
