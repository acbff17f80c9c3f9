"""A dataset looked at as a whole: what is in it, and what is wrong with it.

Cheap by default: lists and numbers of the episodes, and a few decoded frames of some of them. An
episode that cannot be read is a finding and never stops the inspection.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipelines.episode import Episode
from data_pipelines.inspection.episode import look_at
from data_pipelines.inspection.found import Problem, SeenEpisode, SeenStream
from data_pipelines.sources.open import open_dataset
from data_pipelines.sources.rlds import UnknownRate

_SAMPLED = 24  # episodes whose frames are decoded, unless all are
_SHOWN = 12  # of these, on the page
_THREADS = 4
ALL = "the dataset"


@dataclass
class Inspection:
    """What was found.

    Attributes:
        title: the dataset's path or name.
        facts: (what, value) in the order to show them.
        streams: of all episodes together, with the ranges of all of them.
        instructions: how many episodes have each.
        lengths: of every readable episode, in `length_unit`.
        length_unit: "seconds" or "windows".
        problems: in the order of the episodes.
        samples: episodes with pictures and curves.
        readable: number of episodes that could be read.
    """

    title: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    streams: dict[str, SeenStream] = field(default_factory=dict)
    instructions: Counter[str] = field(default_factory=Counter)
    lengths: list[float] = field(default_factory=list)
    length_unit: str = "seconds"
    problems: list[Problem] = field(default_factory=list)
    samples: list[SeenEpisode] = field(default_factory=list)
    readable: int = 0

    def problems_by_kind(self) -> dict[str, list[Problem]]:
        """The problems, the most frequent kind first."""
        kinds: dict[str, list[Problem]] = {}
        for problem in self.problems:
            kinds.setdefault(problem.kind, []).append(problem)
        return dict(sorted(kinds.items(), key=lambda item: -len(item[1])))


def inspect_dataset(
    episodes: Sequence[Episode],
    title: str,
    format: str,
    *,
    limit: int = 1000,
    thorough: bool = False,
) -> Inspection:
    """Looks at a dataset.

    Args:
        episodes: as a source opened them.
        title: path or name of the dataset.
        format: its format.
        limit: look at no more episodes than this, spread evenly; 0 for all.
        thorough: decode every frame of them.
    """
    total = len(episodes)
    chosen = _spread(total, limit or total)
    decoded = set(chosen[_spread(len(chosen), _SAMPLED)].tolist())
    found = Inspection(title)
    ids, embodiments = Counter(), set()
    rates: dict[str, list[float]] = {}
    looked = _look(episodes, chosen, decoded, thorough)
    for seen in tqdm(looked, desc="inspect", unit="episode", total=len(chosen)):
        found.problems += seen.problems
        if not seen.streams:
            continue
        _compare(found, seen)
        found.readable += 1
        found.lengths.append(seen.seconds)
        found.instructions.update(set(seen.instructions))
        embodiments.add(seen.embodiment)
        ids[seen.id] += 1
        for name, stream in seen.streams.items():
            rates.setdefault(name, []).extend([stream.rate] if stream.rate else [])
        if seen.sample is not None and len(found.samples) < _SAMPLED:
            found.samples.append(seen)
    found.samples = [found.samples[i] for i in _spread(len(found.samples), _SHOWN)]
    found.problems += [
        Problem("duplicate id", name, f"{count} episodes have it")
        for name, count in ids.items()
        if count > 1
    ]
    for name, values in rates.items():
        rate = float(np.median(values)) if values else None
        found.streams[name] = replace(found.streams[name], rate=rate)
    _check_constant(found)
    seconds = sum(found.lengths)
    share = "" if len(chosen) == total else f", of which {len(chosen):,} were looked at"
    found.facts = [
        ("format", format),
        ("episodes", f"{total:,}{share}"),
        ("readable", f"{found.readable:,} of {len(chosen):,}"),
        ("hours", _hours(seconds * total / max(len(chosen), 1), exact=len(chosen) == total)),
        ("embodiment", ", ".join(sorted(embodiments)) or "unknown"),
        ("frames", "every frame decoded" if thorough else f"{len(decoded)} episodes sampled"),
    ]
    return found


def inspect_path(
    path: Path,
    format: str,
    options: Mapping[str, Any],
    *,
    limit: int = 1000,
    thorough: bool = False,
) -> Inspection:
    """Opens a dataset and looks at it, also where training would refuse it for want of `fps`.

    Args:
        path: its folder or file.
        format: of `sources.open.FORMATS`.
        options: of this format.
        limit, thorough: of `inspect_dataset`.

    Raises:
        ValueError: if it cannot be opened.
    """
    name, unknown = path.resolve().name, None
    try:
        episodes = open_dataset(format, path, name, "unknown", options)
    except UnknownRate as error:  # what is seen helps to find it
        episodes = open_dataset(format, path, name, "unknown", {**options, "fps": 1.0})
        unknown = Problem("unknown rate", ALL, f"{error} (--option=fps=... here)")
    found = inspect_dataset(episodes, str(path), format, limit=limit, thorough=thorough)
    if unknown:
        found.facts.append(("rate", "unknown; a step is shown as one second"))
        found.problems.append(unknown)
    return found


def _spread(total: int, count: int) -> np.ndarray:
    """`count` of `total` indices, the first and the last among them."""
    return np.unique(np.linspace(0, total - 1, min(total, count)).round().astype(int))


def _look(
    episodes: Sequence[Episode], chosen: np.ndarray, decoded: set[int], thorough: bool
) -> Iterator[SeenEpisode]:
    def look(index: int) -> SeenEpisode:
        return look_at(episodes, index, decode=index in decoded, thorough=thorough)

    with ThreadPoolExecutor(_THREADS) as pool:
        # In portions, so that Ctrl-C does not wait for the whole dataset.
        for first in range(0, len(chosen), 4 * _THREADS):
            yield from pool.map(look, chosen[first : first + 4 * _THREADS].tolist())


def _compare(found: Inspection, seen: SeenEpisode) -> None:
    """Widens the dataset's ranges by an episode, and says where it differs from the first ones."""
    expected = set(found.streams) if found.readable else set(seen.streams)
    if missing := sorted(expected - seen.streams.keys()):
        found.problems.append(Problem("missing stream", seen.id, ", ".join(missing)))
    if further := sorted(seen.streams.keys() - expected):
        found.problems.append(Problem("stream of its own", seen.id, ", ".join(further)))
    for name, stream in seen.streams.items():
        first = found.streams.get(name)
        if first is None or (first.camera and not first.shape):
            found.streams[name] = stream
        elif stream.shape and (stream.shape, stream.dtype) != (first.shape, first.dtype):
            found.problems.append(
                Problem(
                    "other shape",
                    seen.id,
                    f"{name} is {stream.dtype} {list(stream.shape)}, in the first episode "
                    f"{first.dtype} {list(first.shape)}",
                )
            )
        elif stream.low is not None:
            first.low[:] = np.minimum(first.low, stream.low)
            first.high[:] = np.maximum(first.high, stream.high)


def _check_constant(found: Inspection) -> None:
    for name, stream in found.streams.items():
        if stream.low is None:
            continue
        if constant := np.flatnonzero(stream.low == stream.high).tolist():
            values = [f"{i} (always {stream.low[i]:g})" for i in constant[:8]]
            more = f" and {len(constant) - 8} more" if len(constant) > 8 else ""
            what = f"{name}: {', '.join(values)}{more}"
            found.problems.append(Problem("constant dimension", ALL, what))


def _hours(seconds: float, exact: bool) -> str:
    about = "" if exact else "about "
    return f"{about}{seconds / 3600:,.2f} ({about}{seconds / 60:,.1f} minutes)"
