"""Which episodes of a dataset are used for what: its splits, and few of every task to see what data
is worth.
"""

import hashlib
import math
from collections.abc import Hashable, Sequence
from typing import Protocol, TypeVar

PerTask = int | str | None
_PARTS = {"full": 1, "half": 2, "tenth": 10}  # and "one"


class Chosen(Protocol):
    """What is chosen among: an episode with an id, and instructions of which one names the task."""

    id: str
    instructions: Sequence[Hashable]


Row = TypeVar("Row", bound=Chosen)


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


def of_every_task(rows: Sequence[Row], per_task: PerTask, seed: int) -> list[Row]:
    """Chooses episodes of every task (the first instruction).

    Which ones depends on the seed and the ids alone, and a smaller choice is part of a larger one,
    so that results with more data differ by the data that was added.
    """
    tasks: dict[Hashable, list[Row]] = {}
    for row in sorted(rows, key=lambda row: hashlib.md5(f"{seed}/{row.id}".encode()).digest()):
        tasks.setdefault(row.instructions[0], []).append(row)
    return [row for task in tasks.values() for row in task[: kept(len(task), per_task)]]
