"""Statistics of actions and proprioception, and the normalisation made from them.

Every statistic is per time step and dimension: arrays [n, horizon, dim] are reduced over n, so
the first and the last step of an action chunk have their own scale, as in the release.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.normalization.affine import P2, P98, Affine, Mode, affine_of

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
