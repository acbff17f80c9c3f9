"""Episodes: what every data source yields and everything downstream reads.

An episode is a set of named streams, each with its own timestamps. Windows are cut by time, never
by index, so frame rates and horizons stay configuration.

Also here: the train/validation split (`split_of`), few episodes of every task (`of_every_task`),
the limit on unreadable episodes (`BadShare`), and why a file cannot be read (`reason`).
"""

import hashlib
import math
import re
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

NANOSECONDS = 1_000_000_000  # per second
EMBEDDING = "language_embedding"  # in `Episode.left_out`: the stored embedding of the instruction

# What Python or pandas writes for bytes, a list or nothing, in place of a text.
ODD_TEXT = re.compile(r"""b(['"]).*\1|\[.*\]|none|nan|null|<na>""", re.IGNORECASE | re.DOTALL)

PerTask = int | str | None  # the number of episodes of every task, see `kept`
_PARTS = {"full": 1, "half": 2, "tenth": 10}  # and "one"
_NAMED = 3  # bad episodes named in an error
_GIT_LFS = b"version https://git-lfs"  # the beginning of a placeholder file


@runtime_checkable
class FrameReader(Protocol):
    """The frames of a video, decoded on demand."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Frames at `indices` (any order, repeats allowed): uint8 [k, h, w, 3]."""
        ...


@dataclass(frozen=True)
class Stream:
    """One signal over time."""

    timestamps: np.ndarray  # int64 [n], nanoseconds, strictly increasing
    values: np.ndarray | FrameReader  # [n, ...], or n frames of a video

    def __post_init__(self):
        times = self.timestamps
        if times.dtype != np.int64 or times.ndim != 1:
            raise ValueError(
                f"timestamps must be int64 nanoseconds of shape [n], got {times.dtype} of shape "
                f"{list(times.shape)}; multiply seconds by 1e9 and round"
            )
        if not 0 < len(times) == len(self.values):
            raise ValueError(
                f"a stream needs at least one value and a timestamp per value, got {len(times)} "
                f"timestamps and {len(self.values)} values"
            )
        late = np.flatnonzero(np.diff(times) <= 0)
        if len(late):
            i = int(late[0])
            raise ValueError(
                f"timestamps must strictly increase, but number {i} is {times[i]} ns and the next "
                f"one {times[i + 1]} ns"
            )


@dataclass(frozen=True)
class Section:
    """A part of an episode with a task of its own; it ends where the next one starts."""

    start: int  # nanoseconds, on the time axis of the streams
    instructions: tuple[str, ...]  # one or more descriptions of this task


@dataclass(frozen=True)
class Episode:
    """One demonstration or one video clip."""

    id: str  # unique within its source, and stable between openings
    source: str  # the dataset's name
    embodiment: str  # the robot or body that acts ("metaworld_sawyer", "human", ...)
    instructions: tuple[str, ...]  # one or more descriptions of the task; ("",) for none
    streams: Mapping[str, Stream]  # by the dataset's own feature names, on one time axis
    cameras: tuple[str, ...]  # the streams that are video
    # Instruction -> stored text embedding, float [n, d] without trailing zero rows.
    embeddings: Mapping[str, np.ndarray] = field(default_factory=dict)
    # Where the task changes during the episode: its sections in order of time. Empty if
    # `instructions` describe the whole episode; otherwise `instructions` are the texts of all.
    sections: tuple[Section, ...] = ()
    # Streams that the data name but that cannot be used -> why. They cost nothing unless the
    # configuration asks for them.
    left_out: Mapping[str, str] = field(default_factory=dict)
    # Stream -> what the data call each of its numbers, flattened, where they say it.
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    # Why it is not known how many steps a second has; the timestamps then are one second apart,
    # and no window can be cut.
    unknown_rate: str = ""
    # Disagreements between two sources of one fact that were settled, in sentences that say which
    # one was taken; equal for the same finding in another episode, so that they can be counted.
    findings: tuple[str, ...] = ()
    # Where windows may have their anchors: parts [start, end) in nanoseconds, in order of time.
    # None for everywhere. What a window shows around its anchor may lie outside of them.
    ranges: tuple[tuple[int, int], ...] | None = None
    # Why no windows are wanted of the episode, although it can be read: a sentence that becomes one
    # of the findings. "" for every other episode.
    unwanted: str = ""

    def __post_init__(self):
        missing = [name for name in self.cameras if name not in self.streams]
        if missing:
            raise ValueError(
                f"episode {self.id} of {self.source} names the cameras {missing}, but its "
                f"streams are {sorted(self.streams)}"
            )
        readers = (stream.values for stream in self.streams.values())
        found = (text for reader in readers for text in getattr(reader, "findings", ()))
        object.__setattr__(self, "findings", tuple(dict.fromkeys((*self.findings, *found))))
        if self.unwanted and self.unwanted not in self.findings:
            object.__setattr__(self, "findings", (*self.findings, self.unwanted))
        edges = [edge for part in self.ranges or () for edge in part]
        if edges != sorted(edges) or any(start == end for start, end in self.ranges or ()):
            raise ValueError(
                "the ranges of an episode must be [start, end) in order of time, and not overlap, "
                f"got {self.ranges}"
            )
        starts = [section.start for section in self.sections]
        if starts != sorted(set(starts)):
            raise ValueError(f"the sections of an episode must be in order of time, got {starts}")
        for section in self.sections:
            if not section.instructions or not {*section.instructions} <= {*self.instructions}:
                raise ValueError(
                    "a section needs instructions, which are also among the episode's: got "
                    f"{section.instructions}, but the episode has {self.instructions}"
                )

    def instructions_at(self, time: int) -> tuple[str, ...]:
        """The descriptions of the task at a moment (nanoseconds): one, or several paraphrases."""
        if not self.sections:
            return self.instructions
        started = [section for section in self.sections if section.start <= time]
        return (started[-1] if started else self.sections[0]).instructions


class LazyEpisodes(Sequence[Episode]):
    """A sequence that loads each episode on access."""

    def __init__(self, length: int, load: Callable[[int], Episode]):
        self._length = length
        self._load = load

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Episode:
        if not -self._length <= index < self._length:
            raise IndexError(f"episode {index} of {self._length}")
        return self._load(index % self._length)

    def __iter__(self) -> Iterator[Episode]:
        # `Sequence.__iter__` would take an IndexError raised while loading for the end.
        return (self._load(i) for i in range(self._length))


# Choosing episodes: splits, and few episodes of every task (to measure data efficiency).


def split_of(episode_id: str, validation_share: float) -> str:
    """Returns "train" or "validation" by the id's md5 (as in the release's stage 1).

    Adding episodes to a dataset moves none from one split to the other.
    """
    bucket = int(hashlib.md5(episode_id.encode()).hexdigest(), 16) % 10_000
    return "validation" if bucket < round(validation_share * 10_000) else "train"


def kept(total: int, per_task: PerTask) -> int:
    """How many of a task's `total` episodes are used.

    `per_task` is a number, "one", "tenth", "half" (both rounded up) or "full"; None means "full".
    """
    if per_task is None or per_task in _PARTS:
        return math.ceil(total / _PARTS.get(per_task, 1))
    if per_task == "one":
        per_task = 1
    if isinstance(per_task, bool) or not isinstance(per_task, int) or per_task < 1:
        raise ValueError(
            f"training.episodes_per_task is {per_task!r}; give a number of episodes of each task, "
            f"or one, {', '.join(reversed(_PARTS))}."
        )
    return min(per_task, total)


def of_every_task(rows: Sequence[Any], per_task: PerTask, seed: int) -> list[Any]:
    """Chooses episodes (rows with `id` and `instructions`) of every task (first instruction).

    The choice depends on the seed and the ids alone. A smaller choice is a subset of a larger one,
    so runs with more data differ by the added data only.
    """
    tasks: dict[Hashable, list[Any]] = {}
    for row in sorted(rows, key=lambda row: hashlib.md5(f"{seed}/{row.id}".encode()).digest()):
        tasks.setdefault(row.instructions[0], []).append(row)
    return [row for task in tasks.values() for row in task[: kept(len(task), per_task)]]


# The limit on unreadable data. Some of thousands of files are always broken: each is skipped,
# counted and named. Too many mean a systematic fault, which a person should see before hours pass.


class TooManyBad(ValueError):
    """A larger share was unreadable than `max_bad_share` allows."""


class BadShare:
    """Counts readable and unreadable items; thread-safe."""

    def __init__(self, allowed: float, what: str, least: int, remedy: str):
        """Starts at zero.

        Args:
            allowed: the share that may be unreadable, 0 to 1.
            what: the items in the error, e.g. "episodes of 'robot'".
            least: number of items before the share is checked; 1 bad of the first 3 says nothing.
            remedy: the advice in the error, e.g. "Repair them".
        """
        self._allowed, self._what, self._least, self._remedy = allowed, what, least, remedy
        self._lock = threading.Lock()
        self._bad: list[str] = []
        self.seen = self.bad = 0

    def count_good(self) -> None:
        """Counts a readable item."""
        with self._lock:
            self.seen += 1

    def count_bad(self, name: str, reason: str) -> None:
        """Counts an unreadable item; raises TooManyBad if the share is now too large."""
        with self._lock:
            self.seen += 1
            self.bad += 1
            if len(self._bad) < _NAMED:
                self._bad.append(f"{name} ({reason})")
        if self.seen >= self._least:
            self.check()

    def check(self) -> None:
        """Raises TooManyBad if the share is too large, however few items were seen."""
        if self.bad > self._allowed * self.seen:
            unnamed = self.bad - len(self._bad)
            more = f" and {unnamed} more" if unnamed else ""
            raise TooManyBad(
                f"{self.bad} of {self.seen} {self._what} could not be read, more than "
                f"config.max_bad_share = {self._allowed:g} allows: {', '.join(self._bad)}{more}. "
                f"{self._remedy}, or allow more with --config.max_bad_share."
            )


def reason(path: Path, error: object) -> str:
    """Why a file cannot be read, in one line: the library's error, or that it is a placeholder."""
    with suppress(OSError), path.open("rb") as file:
        if file.read(len(_GIT_LFS)) == _GIT_LFS:  # the repository was cloned without large files
            return "it is a placeholder of Git LFS; run git lfs pull to fetch the file"
    return " ".join(str(getattr(error, "strerror", None) or error).split())
