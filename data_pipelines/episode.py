"""Episodes: what every data source yields and everything downstream reads.

An episode is a set of named streams, each with its own timestamps, so that frame rates and
horizons stay configuration: windows are drawn by time, never by index.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

NANOSECONDS = 1_000_000_000


@runtime_checkable
class FrameReader(Protocol):
    """Frames that stay on disk until they are asked for."""

    def __len__(self) -> int:
        """Number of frames."""
        ...

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Frames at `indices` (any order, repeats allowed): uint8 [k, h, w, 3]."""
        ...


@dataclass(frozen=True)
class Stream:
    """One signal over time.

    Attributes:
        timestamps: int64 [n], nanoseconds, strictly increasing.
        values: [n, ...] array, or a `FrameReader` of n frames for a video.

    Raises:
        ValueError: if the timestamps are not such, or the lengths differ.
    """

    timestamps: np.ndarray
    values: np.ndarray | FrameReader

    def __post_init__(self):
        times = self.timestamps
        if times.dtype != np.int64 or times.ndim != 1:
            raise ValueError(
                f"timestamps must be int64 nanoseconds of shape [n], got {times.dtype} of shape "
                f"{list(times.shape)}; multiply seconds by 1e9 and round"
            )
        if len(times) != len(self.values):
            raise ValueError(
                f"a stream needs one timestamp per value, got {len(times)} timestamps and "
                f"{len(self.values)} values"
            )
        if len(times) == 0:
            raise ValueError("a stream needs at least one value, got none")
        late = np.flatnonzero(np.diff(times) <= 0)
        if len(late):
            i = int(late[0])
            raise ValueError(
                f"timestamps must strictly increase, but number {i + 1} ({times[i + 1]} ns) does "
                f"not come after number {i} ({times[i]} ns)"
            )


@dataclass(frozen=True)
class Episode:
    """One demonstration or one video clip.

    Attributes:
        id: unique within its source and the same at every opening.
        source: the dataset's name.
        embodiment: the body that acts ("metaworld_sawyer", "human", ...).
        instructions: one or more descriptions of what happens; ("",) where there is none.
        streams: the dataset's own feature names -> signals; a common time axis.
        cameras: the streams that are video.
        embeddings: where the dataset stores them, an instruction's text embedding, float [n, d]
            without trailing zero rows.
    """

    id: str
    source: str
    embodiment: str
    instructions: tuple[str, ...]
    streams: Mapping[str, Stream]
    cameras: tuple[str, ...]
    embeddings: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        missing = [name for name in self.cameras if name not in self.streams]
        if missing:
            raise ValueError(
                f"episode {self.id} of {self.source} names the cameras {missing}, but its "
                f"streams are {sorted(self.streams)}"
            )


class LazyEpisodes(Sequence[Episode]):
    """A sequence that loads an episode only when it is asked for."""

    def __init__(self, length: int, load: Callable[[int], Episode]):
        self._length = length
        self._load = load

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Episode:
        if not -self._length <= index < self._length:
            raise IndexError(f"episode {index} asked for, but there are {self._length}")
        return self._load(index % self._length)

    def __iter__(self) -> Iterator[Episode]:
        return (self._load(i) for i in range(self._length))
