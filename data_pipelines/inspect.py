"""Inspecting a dataset: what it holds, and what is wrong with it.

`inspect_path` and `inspect_dataset` read the episodes of any format (`inspect_episode.py`),
`inspect_records.py` a folder of encoded records. `inspect_text.py` writes the findings as text,
`inspect_page.py` as an HTML page.

By default an inspection reads all metadata and numbers, and decodes a few frames of some episodes.
An unreadable episode is a finding and never stops the inspection.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.episode import Episode
from data_pipelines.inspect_episode import (
    EpisodeSummary,
    Problem,
    StreamSummary,
    Wanted,
    inspect_episode,
    listed,
    spread,
)
from data_pipelines.progress import Bar
from data_pipelines.representations import Mode, seams
from data_pipelines.sources.formats import open_dataset
from data_pipelines.statistics import collapsed, compute_statistics

ALL = "the dataset"  # in place of an episode, for a problem of the whole dataset
LOSS_ROWS = 200_000  # samples of a stream from which it is told what normalisation loses
_THREADS = 4
_SAMPLED_EPISODES = 24  # episodes with decoded frames
_SHOWN_EPISODES = 12  # of these, on the page


@dataclass
class Inspection:
    """The findings."""

    title: str  # the dataset's path or name
    length_unit: str = "seconds"  # or "windows"
    facts: list[tuple[str, str]] = field(default_factory=list)  # in display order
    streams: dict[str, StreamSummary] = field(default_factory=dict)  # with ranges over all episodes
    # (stream, why an encoding job could not use it) -> number of episodes
    left_out: Counter[tuple[str, str]] = field(default_factory=Counter)
    instructions: Counter[str] = field(default_factory=Counter)  # -> number of episodes
    lengths: list[float] = field(default_factory=list)  # of the readable episodes
    problems: list[Problem] = field(default_factory=list)  # in the order of the episodes
    samples: list[EpisodeSummary] = field(default_factory=list)  # with pictures and curves
    readable: int = 0  # number of episodes

    def add_problem(self, kind: str, episode: str, text: str) -> None:
        """Adds a problem."""
        self.problems.append(Problem(kind, episode, text))

    def add_findings(self, findings: Mapping[str, Sequence[str]]) -> None:
        """Adds each distinct finding once, with the episodes that have it."""
        for text, episodes in findings.items():
            more = f" and {len(episodes) - 1:,} more" if len(episodes) > 1 else ""
            self.add_problem("finding", f"{episodes[0]}{more}", text)

    def problems_by_kind(self) -> dict[str, list[Problem]]:
        """The problems, the most frequent kind first."""
        kinds: dict[str, list[Problem]] = {}
        for problem in self.problems:
            kinds.setdefault(problem.kind, []).append(problem)
        return dict(sorted(kinds.items(), key=lambda item: -len(item[1])))


def inspect_path(
    path: Path, format: str, options: Mapping[str, Any], **settings: int | bool
) -> Inspection:
    """Opens a dataset in a format of `sources.formats.FORMATS` and inspects it.

    The further arguments are `limit` and `thorough` of `inspect_dataset`.
    """
    episodes = open_dataset(format, path, path.resolve().name, "unknown", options)
    return inspect_dataset(episodes, str(path), format, **settings)


def inspect_dataset(
    episodes: Sequence[Episode],
    title: str,
    format: str,
    *,
    limit: int = 1000,
    thorough: bool = False,
    wanted: Wanted | None = None,
) -> Inspection:
    """Inspects at most `limit` episodes of a source (0: all), spread evenly.

    `thorough` decodes every frame of them. `title` and `format` are only shown. With `wanted`, the
    episodes that the encoding job would skip are problems, too.
    """
    total = len(episodes)
    chosen = spread(total, limit or total)
    decoded = set(chosen[spread(len(chosen), _SAMPLED_EPISODES)].tolist())
    found = Inspection(title)
    ids, embodiments, rates = Counter(), set(), defaultdict(list)
    findings: dict[str, list[str]] = defaultdict(list)
    sectioned, unknown = 0, {}
    numbers: dict[str, list[np.ndarray]] = defaultdict(list)
    summaries = _summaries(episodes, chosen, decoded, thorough, wanted)
    for episode in Bar(summaries, desc="inspect", unit="episode", total=len(chosen)):
        found.problems += episode.problems
        found.left_out.update(episode.left_out.items())
        for text in episode.findings:
            findings[text].append(episode.id)
        if episode.unknown_rate:
            unknown[episode.id] = f"{episode.unknown_rate} (--option=fps=... here)"
        if not episode.streams:
            continue
        _compare(found, episode)
        for name, values in episode.numbers.items():
            if sum(map(len, numbers[name])) < LOSS_ROWS:
                numbers[name].append(values)
        episode.numbers = {}
        found.readable += 1
        sectioned += episode.has_sections
        found.lengths.append(episode.seconds)
        found.instructions.update(dict.fromkeys(episode.instructions, 1))
        embodiments.add(episode.embodiment)
        ids[episode.id] += 1
        for name, stream in episode.streams.items():
            if stream.rate:
                rates[name].append(stream.rate)
        if episode.sampled:
            found.samples.append(episode)
    found.samples = [found.samples[i] for i in spread(len(found.samples), _SHOWN_EPISODES)]
    found.add_findings(findings)
    if unknown:
        first, why = next(iter(unknown.items()))
        more = f"{first} and {len(unknown) - 1:,} more" if len(unknown) > 1 else first
        found.add_problem("unknown rate", ALL if len(unknown) == len(chosen) else more, why)
    for name, count in ids.items():
        if count > 1:
            found.add_problem("duplicate id", name, f"{count} episodes have it")
    for name, values in rates.items():
        found.streams[name] = replace(found.streams[name], rate=float(np.median(values)))
    for name, stream in found.streams.items():
        if stream.low is not None and (stream.low == stream.high).any():
            constant = np.flatnonzero(stream.low == stream.high)
            values = [f"{i} (always {stream.low[i]:g})" for i in constant]
            found.add_problem("constant dimension", ALL, f"{name}: {listed(values)}")
    for name, parts in numbers.items():
        same = [values for values in parts if values.shape[1:] == parts[0].shape[1:]]
        if found.streams[name].dtype.startswith("float"):
            for what in seams(np.stack([values[0] for values in same]).astype(np.float64)):
                text = f"{name}, between the first values of episodes: {what}"
                found.add_problem("jump between two values of one angle", ALL, text)
        for i, what in lost(np.concatenate(same), Mode.VARIANCE):
            text = f"{name}: dimension {i} {what}"
            found.add_problem("lost when VARIANCE, the default, normalises it", ALL, text)
    every = len(chosen) == total
    share = "" if every else f", of which {len(chosen):,} were inspected"
    about = "" if every else "about "
    seconds = sum(found.lengths) * total / max(len(chosen), 1)
    found.facts = [
        ("format", format),
        ("episodes", f"{total:,}{share}"),
        ("readable", f"{found.readable:,} of {len(chosen):,}"),
        ("hours", f"{about}{seconds / 3600:,.2f} ({about}{seconds / 60:,.1f} minutes)"),
        ("embodiment", ", ".join(sorted(embodiments)) or "unknown"),
        *([("rate", "unknown; a step is shown as one second")] if unknown else []),
        *(
            [("task changes", f"within {sectioned:,} episode{'s' * (sectioned > 1)}")]
            if sectioned
            else []
        ),
        ("frames", "every frame decoded" if thorough else f"{len(decoded)} episodes sampled"),
    ]
    return found


def _summaries(
    episodes: Sequence[Episode],
    chosen: np.ndarray,
    decoded: set[int],
    thorough: bool,
    wanted: Wanted | None,
) -> Iterator[EpisodeSummary]:
    def summary(index: int) -> EpisodeSummary:
        return inspect_episode(episodes, index, index in decoded, thorough, wanted)

    with ThreadPoolExecutor(_THREADS) as pool:
        # In batches, so that Ctrl-C does not wait for the whole dataset.
        for first in range(0, len(chosen), 4 * _THREADS):
            yield from pool.map(summary, chosen[first : first + 4 * _THREADS].tolist())


def _compare(found: Inspection, episode: EpisodeSummary) -> None:
    """Extends the dataset's ranges by an episode, and finds differences from the first one."""
    expected = set(found.streams) if found.readable else set(episode.streams)
    if missing := sorted(expected - episode.streams.keys()):
        found.add_problem("missing stream", episode.id, ", ".join(missing))
    if further := sorted(episode.streams.keys() - expected):
        found.add_problem("extra stream", episode.id, ", ".join(further))
    for name, stream in episode.streams.items():
        first = found.streams.get(name)
        if first is None or (first.camera and not first.shape):
            found.streams[name] = stream
        elif stream.shape and (stream.shape, stream.dtype) != (first.shape, first.dtype):
            here, there = (f"{s.dtype} {list(s.shape)}" for s in (stream, first))
            text = f"{name} is {here}, in the first episode {there}"
            found.add_problem("other shape", episode.id, text)
        elif stream.low is not None:
            first.low[:] = np.minimum(first.low, stream.low)
            first.high[:] = np.maximum(first.high, stream.high)


def lost(values: np.ndarray, modes: Mode | Sequence[Mode]) -> list[tuple[int, str]]:
    """`statistics.collapsed` of the finite rows of values [n, ..., d]."""
    finite = values[np.isfinite(values).reshape(len(values), -1).all(axis=1)]
    return collapsed(compute_statistics(finite), modes) if len(finite) else []
