"""The statistics a LeRobot v3.0 dataset carries, per episode and over all of it.

Each feature has min, max, mean, std, count and the quantiles q01, q10, q50, q90, q99. Vectors have
shape [d]; pictures are scaled to [0, 1] and have shape [3, 1, 1], over a sample of the frames.
"""

from collections.abc import Sequence

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}

Stats = dict[str, np.ndarray]


def vector_stats(values: np.ndarray) -> Stats:
    """Statistics of [n, d] values, each of shape [d] (count: [1])."""
    values = values.astype(np.float64)
    quantiles = np.quantile(values, list(QUANTILES.values()), axis=0)
    return {
        "min": values.min(0),
        "max": values.max(0),
        "mean": values.mean(0),
        "std": values.std(0),
        "count": np.array([len(values)]),
        **dict(zip(QUANTILES, quantiles)),
    }


def frame_stats(frames: Sequence[np.ndarray]) -> Stats:
    """Statistics of uint8 [h, w, 3] frames per channel, each of shape [3, 1, 1] (count: [1])."""
    stats = vector_stats(np.stack(frames).reshape(-1, 3) / 255.0)
    stats = {name: value.reshape(3, 1, 1) for name, value in stats.items() if name != "count"}
    return {**stats, "count": np.array([len(frames)])}


def combine(parts: Sequence[Stats]) -> Stats:
    """Statistics of a union from those of its parts; quantiles are averaged, as LeRobot does."""
    counts = np.array([part["count"][0] for part in parts], np.float64)
    weights = counts / counts.sum()

    def average(values: Sequence[np.ndarray]) -> np.ndarray:
        return np.tensordot(weights, np.stack(values), 1)

    mean = average([part["mean"] for part in parts])
    variance = average([part["std"] ** 2 + (part["mean"] - mean) ** 2 for part in parts])
    return {
        "min": np.min([part["min"] for part in parts], 0),
        "max": np.max([part["max"] for part in parts], 0),
        "mean": mean,
        "std": np.sqrt(variance),
        "count": np.array([int(counts.sum())]),
        **{name: average([part[name] for part in parts]) for name in QUANTILES},
    }
