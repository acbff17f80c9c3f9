"""Counts and latencies of a server, for its health page."""

import time
from collections import Counter, deque
from collections.abc import Iterable

import numpy as np

RECENT = 1000  # queries that the percentiles are of
PERCENTILES = (50, 95, 99)


class Latency:
    """What a server has done since it started.

    Attributes:
        counts: of queries, errors, refused connections and vanished clients.
    """

    def __init__(self) -> None:
        self.counts = Counter(queries=0, errors=0, refused=0, vanished=0)
        self._began = time.monotonic()
        self._parts: dict[str, deque[float]] = {}

    def add(self, **seconds: float) -> None:
        """Notes one query's seconds by part."""
        self.counts["queries"] += 1
        for part, value in seconds.items():
            self._parts.setdefault(part, deque(maxlen=RECENT)).append(value)

    def report(self) -> dict:
        """The counts, seconds since the start, and per part percentiles of recent queries in ms."""
        return {
            **self.counts,
            "up_s": round(time.monotonic() - self._began, 1),
            "latency_ms": {part: _percentiles(values) for part, values in self._parts.items()},
        }


def _percentiles(seconds: Iterable[float]) -> dict[str, float]:
    values = np.percentile(np.fromiter(seconds, float) * 1e3, PERCENTILES)
    return {f"p{p}": round(float(value), 2) for p, value in zip(PERCENTILES, values)}
