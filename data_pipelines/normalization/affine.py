"""The modes of normalisation, and the affine map that each makes of a dimension's statistics."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

P2, P98 = 20, 980  # positions of 2 % and 98 % among the percentiles, in steps of 0.1 %
_FLAT = 1e-5  # below this spread a dimension counts as constant and is not scaled


class Mode(enum.StrEnum):
    """How a dimension is normalised (the release's normalization_type)."""

    VARIANCE = "VARIANCE"  # zero mean and unit spread of the clamped data, clamped
    SQUASH = "SQUASH"  # 2 % .. 98 % to [-1, 1], clamped to [-1.5, 1.5]
    SQUASH_HARD = "SQUASH_HARD"  # 1.5 times that range, within min .. max, to [-1, 1], clamped
    IDENTITY = "IDENTITY"  # unchanged, but the shape is checked
    NONE = "NONE"  # unchanged and unchecked; needs no statistics


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
