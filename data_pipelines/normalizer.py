"""Statistics of actions and proprioception, and the normalisation made from them.

Every statistic is per time step and dimension: arrays [n, horizon, dim] are reduced over n, so
the first and the last step of an action chunk have their own scale, as in the release.
"""

import enum
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

PERCENTS = np.linspace(0.0, 100.0, 1001)
_P2, _P98 = 20, 980  # positions of 2 % and 98 % in PERCENTS
_FLAT = 1e-5  # below this spread a dimension counts as constant and is not scaled
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


class Mode(enum.StrEnum):
    """How a dimension is normalised (the release's normalization_type)."""

    VARIANCE = "VARIANCE"  # zero mean and unit spread of the clamped data, clamped
    SQUASH = "SQUASH"  # 2 % .. 98 % to [-1, 1], clamped to [-1.5, 1.5]
    SQUASH_HARD = "SQUASH_HARD"  # 1.5 times that range, within min .. max, to [-1, 1], clamped
    IDENTITY = "IDENTITY"  # unchanged, but the shape is checked
    NONE = "NONE"  # unchanged and unchecked; needs no statistics


def compute_statistics(data: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics over the first axis (release: `array_to_stats`).

    Args:
        data: [n, ...], typically [windows, horizon, dim].

    Returns:
        min, max, mean, std, clamp_min, clamp_max, mean_clamped and std_clamped of shape [...];
        percentiles [1001, ...] in steps of 0.1 %.
    """
    data = np.asarray(data)
    if len(data) == 0:
        raise ValueError("No data to take statistics of: the first axis has length 0.")
    percentiles = np.percentile(data, PERCENTS, axis=0)
    mean = data.mean(axis=0)
    clamp_min = mean + 1.5 * (percentiles[_P2] - mean)
    clamp_max = mean + 1.5 * (percentiles[_P98] - mean)
    clamped = np.clip(data, clamp_min, clamp_max)
    return {
        "min": data.min(axis=0),
        "max": data.max(axis=0),
        "mean": mean,
        "std": data.std(axis=0),
        "clamp_min": clamp_min,
        "clamp_max": clamp_max,
        "mean_clamped": clamped.mean(axis=0),
        "std_clamped": clamped.std(axis=0),
        "percentiles": percentiles,
    }


def concat_statistics(
    statistics: Mapping[str, Mapping[str, np.ndarray]], keys: Sequence[str]
) -> dict[str, np.ndarray]:
    """Joins the statistics of several keys along the last axis, in the given order."""
    return {
        name: np.concatenate([np.asarray(statistics[key][name]) for key in keys], axis=-1)
        for name in _STATISTICS
    }


@dataclass(frozen=True)
class Affine:
    """`normalized = clip((x - shift) * scale, clamp_min, clamp_max)`; all float32 [...]."""

    shift: np.ndarray
    scale: np.ndarray
    clamp_min: np.ndarray
    clamp_max: np.ndarray


def _affine(statistics: Mapping[str, np.ndarray], mode: Mode) -> Affine:
    mean, low, high = statistics["mean"], *np.asarray(statistics["percentiles"])[[_P2, _P98]]
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
                    result[key] = _affine(self.statistics[key], Mode(mode))
                continue
            dim = np.shape(self.statistics[key]["mean"])[-1]
            if len(mode) != dim:
                raise ValueError(f"Key {key!r} has {dim} dimensions but {len(mode)} modes.")
            whole = {one: _affine(self.statistics[key], Mode(one)) for one in set(mode)}
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
        path = Path(path)
        content = {
            key: {name: np.asarray(value).tolist() for name, value in statistics.items()}
            for key, statistics in self.statistics.items()
        }
        modes = {
            k: str(m) if isinstance(m, str) else list(map(str, m)) for k, m in self.modes.items()
        }
        content["meta"] = {"modes": modes, "fingerprint": self.fingerprint}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(content))
        os.replace(partial, path)


def load_normalizer(
    path: str | Path, modes: Mapping[str, Mode | Sequence[Mode]] | None = None
) -> Normalizer:
    """Reads a normalizer, or the released statistics.

    Args:
        path: JSON written by `Normalizer.save` or released as `dataset_statistics/*.json`.
        modes: replaces the file's modes; required for released files, which hold none.
    """
    content = json.loads(Path(path).read_text())
    meta = content.pop("meta", {"modes": None, "fingerprint": ""})
    modes = modes if modes is not None else meta["modes"]
    if modes is None:
        raise ValueError(
            f"{path} holds statistics but no modes; pass modes, such as "
            f"{{{next(iter(content), 'actions')!r}: 'VARIANCE'}}."
        )
    statistics = {
        key: {name: np.asarray(value) for name, value in entry.items()}
        for key, entry in content.items()
    }
    return Normalizer(statistics, modes, meta["fingerprint"])
