"""Statistics of actions and proprioception, and the normalisation made from them.

Every statistic is per time step and dimension: arrays [n, horizon, dim] are reduced over n, so
the first and the last step of an action chunk have their own scale, as in the release.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.atomic import write_json
from data_pipelines.episode import PerTask
from data_pipelines.records import RecordDataset
from data_pipelines.representations import Mode
from data_pipelines.vectors import modes, parse

# The modes of normalisation, and the affine map that each makes of a dimension's statistics.


P2, P98 = 20, 980  # positions of 2 % and 98 % among the percentiles, in steps of 0.1 %
_FLAT = 1e-5  # below this spread a dimension counts as constant and is not scaled


# unchanged and unchecked; needs no statistics


@dataclass(frozen=True)
class Affine:
    """`normalized = clip((x - shift) * scale, clamp_min, clamp_max)`; all float32 [...]."""

    shift: np.ndarray
    scale: np.ndarray
    clamp_min: np.ndarray
    clamp_max: np.ndarray


def affine_of(statistics: Mapping[str, np.ndarray], mode: Mode) -> Affine:
    """The map that a mode makes of the statistics of `compute_statistics`."""
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


PERCENTS = np.linspace(0.0, 100.0, 1001)
_STATISTICS = (
    "min",
    "max",
    "mean",
    "std",
    "clamp_min",
    "clamp_max",
    "mean_clamped",
    "std_clamped",
    "percentiles",
)


def compute_statistics(data: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics over the first axis (release: `array_to_stats`).

    Args:
        data: [n, ...], typically [windows, horizon, dim].

    Returns:
        float64 min, max, mean, std, clamp_min, clamp_max, mean_clamped and std_clamped of shape
        [...]; percentiles [1001, ...] in steps of 0.1 %.
    """
    data = np.asarray(data)
    if len(data) == 0:
        raise ValueError("No data to take statistics of: the first axis has length 0.")
    shape = data.shape[1:]
    rows = [row_statistics(row) for row in data.reshape(len(data), -1).T]
    return from_rows(np.reshape(rows, (-1, ROW)), shape)


ROW = len(_STATISTICS) - 1 + len(PERCENTS)  # numbers that describe one dimension


def row_statistics(values: np.ndarray) -> np.ndarray:
    """Statistics of one dimension.

    Args:
        values: [n], one dimension of all windows; finite.

    Returns:
        float64 [ROW], for `from_rows`.
    """
    ordered = np.sort(values)
    percentiles = _percentiles(ordered)
    mean = ordered.mean(dtype=np.float64)
    clamp_min = mean + 1.5 * (percentiles[P2] - mean)
    clamp_max = mean + 1.5 * (percentiles[P98] - mean)
    # Sorted values are clamped at their ends only.
    low, high = np.searchsorted(ordered, (clamp_min, clamp_max))
    clamped = ordered.astype(np.float64)
    clamped[:low], clamped[high:] = clamp_min, clamp_max
    moments = (
        mean,
        ordered.std(dtype=np.float64),
        clamp_min,
        clamp_max,
        clamped.mean(),
        clamped.std(),
    )
    return np.concatenate([[ordered[0], ordered[-1]], moments, percentiles])


def _percentiles(ordered: np.ndarray) -> np.ndarray:
    """`np.percentile(ordered, PERCENTS)` of sorted values, which need not be sorted again."""
    position = PERCENTS / 100 * (len(ordered) - 1)
    before = np.floor(position).astype(np.int64)
    after = np.minimum(before + 1, len(ordered) - 1)
    start, end = ordered[before].astype(np.float64), ordered[after].astype(np.float64)
    return start + (position - before) * (end - start)


def from_rows(rows: np.ndarray, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """What `compute_statistics` returns.

    Args:
        rows: of `row_statistics`, [c, ROW], for every dimension of every time step.
        shape: [horizon, dim], c together.
    """
    scalars = {name: rows[:, i].reshape(shape) for i, name in enumerate(_STATISTICS[:-1])}
    return scalars | {"percentiles": rows[:, len(scalars) :].T.reshape(len(PERCENTS), *shape)}


def concat_statistics(
    statistics: Mapping[str, Mapping[str, np.ndarray]], keys: Sequence[str]
) -> dict[str, np.ndarray]:
    """Joins the statistics of several keys along the last axis, in the given order."""
    return {
        name: np.concatenate([np.asarray(statistics[key][name]) for key in keys], axis=-1)
        for name in _STATISTICS
    }


@dataclass(frozen=True)
class Normalizer:
    """Normalises named arrays, each with its own statistics and mode.

    Attributes:
        statistics: key -> output of `compute_statistics`.
        modes: key -> one mode, or one mode per dimension of the last axis (positions by VARIANCE
            beside rotations by IDENTITY).
        fingerprint: identity of the data the statistics were taken from.
    """

    statistics: Mapping[str, Mapping[str, np.ndarray]]
    modes: Mapping[str, Mode | Sequence[Mode]]
    fingerprint: str = ""

    def __post_init__(self) -> None:
        for key, mode in self.modes.items():
            missing = (
                set() if mode == Mode.NONE else set(_STATISTICS) - set(self.statistics.get(key, ()))
            )
            if missing:
                raise ValueError(
                    f"Normalizer key {key!r} has mode {mode} but lacks the statistics "
                    f"{sorted(missing)}; known keys: {sorted(self.statistics)}."
                )

    @cached_property
    def affines(self) -> dict[str, Affine]:
        """Key -> the affine map and its clamps, for use inside jitted code; no NONE keys."""
        result = {}
        for key, mode in self.modes.items():
            if isinstance(mode, str):
                if Mode(mode) is not Mode.NONE:
                    result[key] = affine_of(self.statistics[key], Mode(mode))
                continue
            dim = np.shape(self.statistics[key]["mean"])[-1]
            if len(mode) != dim:
                raise ValueError(f"Key {key!r} has {dim} dimensions but {len(mode)} modes.")
            whole = {one: affine_of(self.statistics[key], Mode(one)) for one in set(mode)}
            result[key] = Affine(
                *(
                    np.stack([getattr(whole[one], part)[..., i] for i, one in enumerate(mode)], -1)
                    for part in ("shift", "scale", "clamp_min", "clamp_max")
                )
            )
        return result

    def normalize(self, key: str, values: np.ndarray) -> np.ndarray:
        """Raw values [..., horizon, dim] to float32 normalised, clamped values."""
        affine = self._checked(key, values)
        if affine is None:
            return np.asarray(values, np.float32)
        scaled = (np.asarray(values, np.float32) - affine.shift) * affine.scale
        return np.clip(scaled, affine.clamp_min, affine.clamp_max)

    def unnormalize(self, key: str, values: np.ndarray) -> np.ndarray:
        """Normalised values [..., horizon, dim] to float32 raw values; nothing is clamped."""
        affine = self._checked(key, values)
        if affine is None:
            return np.asarray(values, np.float32)
        return np.asarray(values, np.float32) / affine.scale + affine.shift

    def _checked(self, key: str, values: np.ndarray) -> Affine | None:
        if key not in self.modes:
            raise KeyError(f"Normalizer has no key {key!r}; it has {sorted(self.modes)}.")
        affine = self.affines.get(key)
        if affine is not None:
            shape = affine.shift.shape
            if np.shape(values)[-len(shape) :] != shape and shape:
                raise ValueError(
                    f"{key!r} has shape {np.shape(values)}, but its statistics are for "
                    f"[..., {', '.join(map(str, shape))}]: check the horizon and dimension in the "
                    "config against the data the normalizer was made from."
                )
        return affine

    def save(self, path: str | Path) -> None:
        """Writes JSON in the release's layout `{key: {min, max, ...}}`, plus one "meta" entry."""
        write_statistics(Path(path), self.as_json())

    def as_json(self) -> dict[str, Any]:
        """The content of such a file."""
        content = {
            key: {name: np.asarray(value).tolist() for name, value in statistics.items()}
            for key, statistics in self.statistics.items()
        }
        modes = {
            k: str(m) if isinstance(m, str) else list(map(str, m)) for k, m in self.modes.items()
        }
        return content | {"meta": {"modes": modes, "fingerprint": self.fingerprint}}


def write_statistics(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON so that `path` never holds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content))
    os.replace(partial, path)


def load_normalizer(
    path: str | Path, modes: Mapping[str, Mode | Sequence[Mode]] | None = None
) -> Normalizer:
    """Reads the normalizer of one embodiment, or the released statistics.

    Args:
        path: JSON written by `Normalizer.save` or released as `dataset_statistics/*.json`.
        modes: replaces the file's modes; required for released files, which hold none.
    """
    return normalizer_from(json.loads(Path(path).read_text()), str(path), modes)


def normalizer_from(
    content: Mapping[str, Any], where: str, modes: Mapping[str, Mode | Sequence[Mode]] | None = None
) -> Normalizer:
    """The normalizer that `Normalizer.as_json` describes; `where` is for error messages."""
    content = dict(content)
    meta = content.pop("meta", {"modes": None, "fingerprint": ""})
    modes = modes if modes is not None else meta["modes"]
    if modes is None:
        raise ValueError(
            f"{where} holds statistics but no modes; pass modes, such as "
            f"{{{next(iter(content), 'actions')!r}: 'VARIANCE'}}."
        )
    statistics = {
        key: {name: np.asarray(value) for name, value in entry.items()}
        for key, entry in content.items()
    }
    return Normalizer(statistics, modes, meta["fingerprint"])


# Statistics of numeric columns that need not fit in memory, in one pass over the records' numbers.
#
# The pass turns rows into columns on disk, one per time step and dimension; then every column is
# sorted by itself, which gives exact percentiles with the memory of one column. A pass that was
# stopped goes on where it was.


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


# One normalizer per embodiment: a gripper's millimetres say nothing about another robot's.


VECTORS = {"actions": "action", "proprio": "proprio"}  # name in a record -> in the config


@dataclass(frozen=True)
class Normalizers:
    """The normalizers of a run, by embodiment.

    Attributes:
        by_embodiment: of each one; "" is of statistics that name none.
        fingerprint: identity of the data that all were made from.
    """

    by_embodiment: Mapping[str, Normalizer]
    fingerprint: str

    def of(self, embodiment: str = "") -> Normalizer:
        """The normalizer of an embodiment; "" is the only one there is.

        Raises:
            ValueError: if there is none, or more than one for "".
        """
        known = self.by_embodiment
        if len(known) == 1 and (not embodiment or "" in known):
            return next(iter(known.values()))
        if embodiment not in known:
            asked = f"there is none of {embodiment!r}" if embodiment else "say which is meant"
            raise ValueError(
                f"this run has a normalizer for each of the embodiments {', '.join(sorted(known))};"
                f" {asked} (--config.embodiment=NAME)."
            )
        return known[embodiment]

    def save(self, path: Path) -> None:
        """Writes JSON: of one embodiment as `Normalizer.save` does, else each below its name."""
        content = {name: one.as_json() for name, one in self.by_embodiment.items()}
        if len(content) == 1:
            (name, content), *_ = content.items()
            content["meta"]["embodiment"] = name
        else:
            content = {"embodiments": content, "meta": {"fingerprint": self.fingerprint}}
        write_statistics(Path(path), content)


def load_normalizers(path: Path) -> Normalizers:
    """Reads what `Normalizers.save` or `Normalizer.save` wrote."""
    content = json.loads(Path(path).read_text())
    meta = content.get("meta", {})
    each = content.get("embodiments", {meta.get("embodiment", ""): content})
    normalizers = {name: normalizer_from(one, str(path)) for name, one in each.items()}
    return Normalizers(normalizers, meta.get("fingerprint", ""))


def data_fingerprint(
    datasets: Sequence[RecordDataset],
    episodes_per_task: PerTask = None,
    seed: int = 0,
    mask_padding: bool = False,
) -> str:
    """Identity of the statistics that `make_normalizers` makes, known before they are made."""
    identity = [*(dataset.fingerprint for dataset in datasets), f"{episodes_per_task} {seed}"]
    identity += ["mask_padding"] * mask_padding
    return hashlib.sha256("/".join(identity).encode()).hexdigest()


def make_normalizers(
    datasets: Sequence[RecordDataset],
    episodes_per_task: PerTask = None,
    seed: int = 0,
    mask_padding: bool = False,
    *,
    scratch: Path | None = None,
) -> Normalizers:
    """Statistics of actions and proprioception over the training windows of every embodiment.

    Modes are those of the parts that the vectors were made of. Only numbers are read, a column at a
    time: memory does not grow with the data's horizon or dimensions.

    Args:
        datasets: those with actions and proprio.
        episodes_per_task: as in `record_mixture`, so that statistics see what training sees.
        seed: as in `record_mixture`.
        mask_padding: as in `record_mixture`: action steps that are not learned do not count either.
            Proprioception is what the network sees, repeated or not, so all of it counts.
        scratch: a folder to work in, from which a stopped call goes on; removed at the end.

    Raises:
        ValueError: if datasets of one embodiment are normalised differently, or have no windows for
            training, or with `mask_padding` do not tell what is padding.
    """
    choice = (episodes_per_task, seed, mask_padding)
    if mask_padding:
        check_padding_is_told(datasets)
    fingerprint = data_fingerprint(datasets, *choice)
    temporary = scratch is None
    scratch = Path(tempfile.mkdtemp()) if temporary else Path(scratch)
    if not temporary and scratch.exists() and not (scratch / fingerprint).exists():
        shutil.rmtree(scratch)  # left by other data
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / fingerprint).touch()
    try:
        names = sorted({dataset.embodiment for dataset in datasets})
        result = {}
        for number, name in enumerate(names):
            ours = [dataset for dataset in datasets if dataset.embodiment == name]
            sources = [(d, d.record_indices("train", episodes_per_task, seed)) for d in ours]
            folder = scratch / str(number)
            statistics = {
                "actions": column_statistics(sources, "actions", folder, padding=not mask_padding),
                "proprio": column_statistics(sources, "proprio", folder),
            }
            own = data_fingerprint(ours, *choice)
            result[name] = Normalizer(statistics, _modes(ours), own)
        shutil.rmtree(scratch)
    finally:
        if temporary:
            shutil.rmtree(scratch, ignore_errors=True)
    return Normalizers(result, fingerprint)


def check_padding_is_told(datasets: Sequence[RecordDataset]) -> None:
    """Raises ValueError if records were made before they told which actions are padding."""
    for dataset in datasets:
        if "actions" in dataset.shapes and "actions_padded" not in dataset.shapes:
            raise ValueError(
                f"The records of {dataset.name!r} do not tell which actions are padding; encode "
                "them again, or set policy_io.action.mask_padding to False."
            )


def _modes(datasets: Sequence[RecordDataset]) -> dict[str, Mode | tuple[Mode, ...]]:
    """Of one embodiment, whose datasets must agree."""
    chosen: dict[str, tuple[Mode, ...]] = {}
    for dataset in datasets:
        for key, setting in VECTORS.items():
            parts = parse(dataset.settings["dataset"][setting], setting)
            own = tuple(modes(parts, dataset.shapes[key][-1]))
            if chosen.setdefault(key, own) != own:
                raise ValueError(
                    f"The datasets {datasets[0].name!r} and {dataset.name!r} have the embodiment "
                    f"{dataset.embodiment!r}, but normalise {key} differently; make their parts "
                    "alike, or call the embodiments differently."
                )
    # One mode for all dimensions reads better in the file.
    return {key: own[0] if len(set(own)) == 1 else own for key, own in chosen.items()}


# The released `dataset_statistics/*.json` as a normalizer of what the released decoders read.
#
# The release normalises every stream by itself and concatenates position (3), rotation (6) and
# gripper (1); its keys are `action/<stream>` and `obs/<stream>`, e.g. `obs/eef_pos_lowdim`.
# Positions and grippers are normalised by VARIANCE, rotations left as they are (mimic-video
# release, `configs/dataloading/policy_io`).


STREAMS = {"pos": Mode.VARIANCE, "rot": Mode.IDENTITY, "gripper": Mode.VARIANCE}  # in their order
GROUPS = {"actions": "action/", "proprio": "obs/"}


def looks_like_statistics(path: Path) -> bool:
    """Whether a file is JSON rather than weights."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(64).lstrip().startswith(b"{")


def released_normalizer(path: Path) -> Normalizer:
    """Reads released statistics as the normalizer of "actions" and "proprio".

    Args:
        path: the JSON file.

    Raises:
        ValueError: if the file is damaged or has other entries than the releases.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); copy or download it again.") from error
    incomplete = [k for k, v in content.items() if not isinstance(v, dict) or "mean" not in v]
    if incomplete:
        raise ValueError(
            f"{path} is no file of statistics: {', '.join(incomplete)} lack min, max, mean, std ..."
        )
    statistics, modes = {}, {}
    for name, prefix in GROUPS.items():
        keys = _in_order(path, [key for key in content if key.startswith(prefix)], prefix)
        try:
            statistics[name] = concat_statistics(content, keys)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: the entries {', '.join(keys)} lack {error}.") from error
        dims = [np.shape(content[key]["mean"])[-1] for key in keys]
        modes[name] = [m for m, dim in zip(STREAMS.values(), dims) for _ in range(dim)]
    return Normalizer(statistics, modes, f"released {path.name}")


def _in_order(path: Path, keys: list[str], prefix: str) -> list[str]:
    ordered = [k for s in STREAMS for k in keys if f"_{s}_" in f"_{k.removeprefix(prefix)}_"]
    if len(ordered) != len(STREAMS) or len(keys) != len(STREAMS):
        raise ValueError(
            f"{path} must hold one position, one rotation and one gripper entry below {prefix!r}, "
            f"as the releases do; it has {', '.join(keys) or 'none'}."
        )
    return ordered
