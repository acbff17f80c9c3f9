"""Episodes: what every data source yields and everything downstream reads.

An episode is a set of named streams, each with its own timestamps, so that frame rates and
horizons stay configuration: windows are drawn by time, never by index.

Below `Episode` stand which episodes are used for what (`split_of`, `of_every_task`), how many may
be unreadable (`BadShare`), and why a file cannot be read (`reason`).
"""

import hashlib
import math
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

NANOSECONDS = 1_000_000_000  # per second

PerTask = int | str | None  # how many episodes of every task: see `kept`
_PARTS = {"full": 1, "half": 2, "tenth": 10}  # and "one"
_NAMED = 3  # bad episodes that an error names
_GIT_LFS = b"version https://git-lfs"  # how the file begins that stands for another one


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
        if not 0 < len(times) == len(self.values):
            raise ValueError(
                f"a stream needs a timestamp per value and at least one, got {len(times)} "
                f"timestamps and {len(self.values)} values"
            )
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
        # Not that of `Sequence`, which would take an IndexError while loading for the end.
        return (self._load(i) for i in range(self._length))


# Which episodes are used for what: splits, and few of every task to see what data is worth.


def split_of(episode_id: str, validation_share: float) -> str:
    """Of an episode: by md5 of its id (the release's stage 1), so that new data moves none."""
    bucket = int(hashlib.md5(episode_id.encode()).hexdigest(), 16) % 10_000
    return "validation" if bucket < round(validation_share * 10_000) else "train"


def kept(total: int, per_task: PerTask) -> int:
    """How many of a task's episodes are used.

    Args:
        total: how many there are.
        per_task: a number; "one", "tenth", "half" (rounded up) or "full"; None is "full".

    Raises:
        ValueError: for anything else.
    """
    if per_task is None or per_task in _PARTS:
        return math.ceil(total / _PARTS.get(per_task, 1))
    if per_task == "one":
        per_task = 1
    if isinstance(per_task, bool) or not isinstance(per_task, int) or per_task < 1:
        raise ValueError(
            f"training.episodes_per_task is {per_task!r}; give a number of episodes, or one, "
            f"{', '.join(reversed(_PARTS))} for a share of every task's."
        )
    return min(per_task, total)


def of_every_task(rows: Sequence[Any], per_task: PerTask, seed: int) -> list[Any]:
    """Chooses episodes (with an id and instructions) of every task (the first instruction).

    Which ones depends on the seed and the ids alone, and a smaller choice is part of a larger one,
    so that results with more data differ by the data that was added.
    """
    tasks: dict[Hashable, list[Any]] = {}
    for row in sorted(rows, key=lambda row: hashlib.md5(f"{seed}/{row.id}".encode()).digest()):
        tasks.setdefault(row.instructions[0], []).append(row)
    return [row for task in tasks.values() for row in task[: kept(len(task), per_task)]]


# How much of a dataset may be unreadable before the work on it stops. Out of thousands of files
# some are always broken. Each is left out, counted and named; too many of them mean that something
# else is wrong, and a person should know before hours are spent.


class TooManyBad(ValueError):
    """More was unreadable than `max_bad_share` allows."""


class BadShare:
    """Counts what was read and what could not be; for several threads."""

    def __init__(self, allowed: float, what: str, least: int, remedy: str):
        """Starts at zero.

        Args:
            allowed: share that may be bad, 0 to 1.
            what: what is counted, for the sentence: "episodes of 'robot'".
            least: nothing is said before so many were seen: one of the first three may be bad.
            remedy: what a person can do, for the sentence: "Repair them".
        """
        self._allowed, self._what, self._least, self._remedy = allowed, what, least, remedy
        self._lock = threading.Lock()
        self._bad: list[str] = []
        self.seen = self.bad = 0

    def good(self) -> None:
        """One was read."""
        with self._lock:
            self.seen += 1

    def is_bad(self, name: str, reason: str) -> None:
        """One could not be read.

        Raises:
            TooManyBad: if that is one too many.
        """
        with self._lock:
            self.seen += 1
            self.bad += 1
            if len(self._bad) < _NAMED:
                self._bad.append(f"{name} ({reason})")
        if self.seen >= self._least:
            self.check()

    def check(self) -> None:
        """Raises TooManyBad if the share is too large, whatever was seen so far."""
        if self.bad > self._allowed * self.seen:
            unnamed = self.bad - len(self._bad)
            more = f" and {unnamed} more" if unnamed else ""
            raise TooManyBad(
                f"{self.bad} of {self.seen} {self._what} could not be read, more than "
                f"config.max_bad_share = {self._allowed:g} allows: {', '.join(self._bad)}{more}. "
                f"{self._remedy}, or allow more with --config.max_bad_share."
            )


def reason(path: Path, error: object) -> str:
    """Why a file cannot be read, in one line: what a library says of it, or that it is not there.

    Args:
        path: the file.
        error: the library's exception, or a text.
    """
    with suppress(OSError), path.open("rb") as file:
        if file.read(len(_GIT_LFS)) == _GIT_LFS:  # cloned without its large files
            return "it is a placeholder of Git LFS, git lfs pull fetches the file"
    return " ".join(str(getattr(error, "strerror", None) or error).split())
