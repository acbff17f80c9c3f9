"""Inspecting a dataset: what it holds, and what is wrong with it.

`inspect_path` and `inspect_dataset` read the episodes of any format, `inspect_records` a folder of
encoded records. `describe` writes the findings as text, `inspect_page.py` as an HTML page.

By default an inspection reads all metadata and numbers, and decodes a few frames of some episodes.
An unreadable episode is a finding and never stops the inspection.
"""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from data_pipelines.cutting import check_finite, cut_numbers
from data_pipelines.episode import NANOSECONDS, Episode, Stream
from data_pipelines.normalize import VECTORS, dimension_names
from data_pipelines.pickles import PickleRefused
from data_pipelines.records import RecordDataset, read_columns
from data_pipelines.representations import Mode, seams
from data_pipelines.sources.formats import open_dataset
from data_pipelines.statistics import collapsed, compute_statistics
from data_pipelines.vectors import modes, parse
from data_pipelines.video import VideoFile
from data_pipelines.windows import usual_steps

_THREADS = 4
_SAMPLED_EPISODES = 24  # episodes with decoded frames
_SHOWN_EPISODES = 12  # of these, on the page
_SAMPLED_RECORDS = 64
_CURVE_POINTS = 200
_THUMBNAIL = (240, 180)  # maximum size, pixels
_GAP_PERIODS = 1.5  # a longer step between samples is a gap
_SAME_PERIODS = 1.5  # streams may begin or end this many periods of the slower one apart
_BOX = 8  # pixels; averaging boxes removes compression noise
_STILL = 4.0  # grey levels by which the boxes of a still picture may differ after compression
_BLACK = 4.0  # mean grey level below which a picture is black
_DECODED_FRAMES = 16  # in memory at a time
_NORMALISED_ROWS = 200_000  # samples of a stream from which it is told what normalisation loses
_WIDEST = 64  # dimensions of a stream that may be an action or a state
# Streams that no policy takes, and that are rarely other than 0.
_BOOKKEEPING = re.compile(r"\b(next|reward|discount|done|success|is_\w+|\w*index|timestamp)\b")
_ALL = "the dataset"  # in place of an episode, for a problem of the whole dataset


@dataclass(frozen=True)
class Problem:
    """A problem of an episode, or of the whole dataset."""

    kind: str
    episode: str
    text: str


class Wanted(NamedTuple):
    """What a configuration asks of a dataset."""

    dataset: ConfigDict  # `video`, `action` and `proprio`, as of `cutting.cut_episode`
    policy_io: ConfigDict
    anchor_fps: float | None = None


@dataclass(frozen=True)
class StreamSummary:
    """A stream of one episode, or of a whole dataset."""

    shape: tuple[int, ...]  # of one sample; () for a video of unknown size
    dtype: str
    rate: float | None = None  # samples per second; None for fewer than two samples
    low: np.ndarray | None = None  # of numbers: smallest finite value per dimension [prod(shape)]
    high: np.ndarray | None = None  # of numbers: the largest
    codec: str = ""  # of a video file
    camera: bool = False


@dataclass
class EpisodeSummary:
    """One episode; it has no streams if it is unreadable."""

    id: str
    sampled: bool  # whether frames are decoded, and pictures and curves kept for the page
    embodiment: str = ""
    instructions: tuple[str, ...] = ()
    seconds: float = 0.0  # duration of the longest stream, with the last sample's period
    streams: dict[str, StreamSummary] = field(default_factory=dict)
    has_sections: bool = False  # the task changes within it
    left_out: Mapping[str, str] = field(default_factory=dict)  # see `Episode`
    findings: tuple[str, ...] = ()
    unknown_rate: str = ""
    problems: list[Problem] = field(default_factory=list)
    # Camera -> thumbnails of the first, middle and last frame, uint8 [h, w, 3].
    pictures: dict[str, list[np.ndarray]] = field(default_factory=dict)
    # Stream of numbers -> seconds [k] and values [k, d].
    curves: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    # Stream of numbers -> all of its values, float32 [n, d].
    numbers: dict[str, np.ndarray] = field(default_factory=dict)

    def add_problem(self, kind: str, text: str) -> None:
        """Adds a problem of this episode."""
        self.problems.append(Problem(kind, self.id, text))


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
        """Adds each distinct finding of the source once, with the episodes that have it."""
        for text, episodes in findings.items():
            more = f" and {len(episodes) - 1:,} more" if len(episodes) > 1 else ""
            self.add_problem("sources that disagree", f"{episodes[0]}{more}", text)

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

    `thorough` decodes every frame of them. `title` and `format` are shown in the findings. With
    `wanted`, these also tell which episodes an encoding job would skip.
    """
    total = len(episodes)
    chosen = _spread(total, limit or total)
    decoded = set(chosen[_spread(len(chosen), _SAMPLED_EPISODES)].tolist())
    found = Inspection(title)
    ids, embodiments, rates = Counter(), set(), defaultdict(list)
    findings: dict[str, list[str]] = defaultdict(list)
    sectioned, unknown = 0, {}
    numbers: dict[str, list[np.ndarray]] = defaultdict(list)
    summaries = _summaries(episodes, chosen, decoded, thorough, wanted)
    for episode in tqdm(summaries, desc="inspect", unit="episode", total=len(chosen)):
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
            if sum(map(len, numbers[name])) < _NORMALISED_ROWS:
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
    found.samples = [found.samples[i] for i in _spread(len(found.samples), _SHOWN_EPISODES)]
    found.add_findings(findings)
    if unknown:
        first, why = next(iter(unknown.items()))
        more = f"{first} and {len(unknown) - 1:,} more" if len(unknown) > 1 else first
        found.add_problem("unknown rate", _ALL if len(unknown) == len(chosen) else more, why)
    for name, count in ids.items():
        if count > 1:
            found.add_problem("duplicate id", name, f"{count} episodes have it")
    for name, values in rates.items():
        found.streams[name] = replace(found.streams[name], rate=float(np.median(values)))
    for name, stream in found.streams.items():
        if stream.low is not None and (stream.low == stream.high).any():
            constant = np.flatnonzero(stream.low == stream.high)
            values = [f"{i} (always {stream.low[i]:g})" for i in constant]
            found.add_problem("constant dimension", _ALL, f"{name}: {_listed(values)}")
    for name, parts in numbers.items():
        same = [values for values in parts if values.shape[1:] == parts[0].shape[1:]]
        for i, what in _lost(np.concatenate(same), Mode.VARIANCE):
            text = f"{name}: dimension {i} {what}"
            found.add_problem("lost when VARIANCE, the default, normalises it", _ALL, text)
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
        *([("task changes", f"within {_episodes(sectioned)}")] if sectioned else []),
        ("frames", "every frame decoded" if thorough else f"{len(decoded)} episodes sampled"),
    ]
    return found


def _spread(total: int, count: int) -> np.ndarray:
    """`count` of `total` indices, evenly spread, with the first and the last."""
    return np.unique(np.linspace(0, total - 1, min(total, count)).round().astype(int))


def _summaries(
    episodes: Sequence[Episode],
    chosen: np.ndarray,
    decoded: set[int],
    thorough: bool,
    wanted: Wanted | None,
) -> Iterator[EpisodeSummary]:
    def summary(index: int) -> EpisodeSummary:
        return _inspect_episode(episodes, index, index in decoded, thorough, wanted)

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


def _listed(values: Sequence[object], most: int = 8) -> str:
    listed = ", ".join(map(str, values[:most]))
    return f"{listed} and {len(values) - most} more" if len(values) > most else listed


# One episode.


def _inspect_episode(
    episodes: Sequence[Episode], index: int, sampled: bool, thorough: bool, wanted: Wanted | None
) -> EpisodeSummary:
    """Inspects one episode; every error becomes one of its problems."""
    summary = EpisodeSummary(f"number {index}", sampled)
    try:
        episode = episodes[index]
    except Exception as error:  # libraries of the formats raise types of their own
        summary.add_problem(_kind(error), _text(error))
        return summary
    summary.id, summary.embodiment = episode.id, episode.embodiment
    summary.instructions = tuple(episode.instructions)
    summary.has_sections = len(episode.sections) > 1
    summary.left_out, summary.findings = episode.left_out, episode.findings
    summary.unknown_rate = episode.unknown_rate
    summary.problems += _check_instructions(summary.id, summary.instructions)
    for name, stream in episode.streams.items():
        try:
            if name in episode.cameras:
                summary.streams[name] = _inspect_video(summary, name, stream, thorough)
            else:
                summary.streams[name] = _inspect_numbers(summary, name, stream)
        except Exception as error:
            summary.add_problem(_kind(error), f"{name}: {_text(error)}")
    if not episode.streams:
        why = [f"{name} ({reason})" for name, reason in episode.left_out.items()]
        summary.add_problem("no stream that can be used", _listed(why) or "it has none")
    _check_times(summary, episode)
    if wanted:
        _check_wanted(summary, episode, wanted)
    summary.seconds = max(map(_seconds, episode.streams.values()), default=0.0)
    return summary


def _check_wanted(summary: EpisodeSummary, episode: Episode, wanted: Wanted) -> None:
    """Cuts the numbers of an episode as the encoding job would."""
    try:
        columns = cut_numbers(episode, wanted.dataset, wanted.policy_io, wanted.anchor_fps)
        check_finite(columns)
    except ValueError as error:
        summary.add_problem("skipped by the encoding job", _text(error))


# Kinds of errors: the types of an error or of its causes, and words of the sources' own checks,
# which have no cause. The first match counts.
_KINDS: tuple[tuple[str, Any, str], ...] = (
    ("file that was not downloaded", (), r"git lfs"),
    ("missing file", FileNotFoundError, r"\bmissing\b|no such file|not complete"),
    ("text in another encoding", UnicodeDecodeError, r"utf-8"),
    ("unreadable video", av.FFmpegError, r"readable video|no frames between"),
    ("refused pickle", PickleRefused, r"pickle"),
    ("timestamps that do not increase", (), r"strictly increase"),
    ("empty stream", (), r"got 0 timestamps"),
)


def _kind(error: BaseException | None) -> str:
    text, chain = str(error).lower(), []
    while error is not None:
        chain.append(error)
        error = error.__cause__ or error.__context__
    for kind, types, words in _KINDS:
        if any(isinstance(one, types) for one in chain) or re.search(words, text):
            return kind
    return "unreadable episode"


def _text(error: Exception) -> str:
    words = " ".join(str(error).split())
    return words if isinstance(error, ValueError) and words else f"{type(error).__name__}: {words}"


def _check_instructions(episode: str, texts: Sequence[str]) -> Iterator[Problem]:
    empty = sum(not text.strip() for text in texts)
    if empty == len(texts):
        yield Problem("no instruction", episode, "training uses the empty text")
        return
    if empty:
        yield Problem("empty instruction", episode, f"{empty} of {len(texts)}")
    if any("\ufffd" in text for text in texts):  # a decoder's replacement of an invalid byte
        lost = f"characters were lost: {list(texts)}"
        yield Problem("text in another encoding", episode, lost)


def _inspect_numbers(summary: EpisodeSummary, name: str, stream: Stream) -> StreamSummary:
    values = np.asarray(stream.values)
    shape, dtype, rate = values.shape[1:], str(values.dtype), _rate(stream)
    if values.dtype.kind not in "biuf":
        return StreamSummary(shape, dtype, rate)
    flat = values.reshape(len(values), -1)
    finite = np.isfinite(flat)
    if not finite.all():
        dimensions = np.flatnonzero(~finite.all(axis=0))
        summary.add_problem(
            "NaN or infinity",
            f"{name}: {int((~finite).sum())} of {flat.size} numbers, in the dimensions "
            f"{_listed(dimensions)}, first in sample {int(np.argmax(~finite.all(axis=1)))}",
        )
    if summary.sampled and flat.shape[1]:
        keep = _spread(len(flat), _CURVE_POINTS)
        times = (stream.timestamps[keep] - stream.timestamps[0]) / NANOSECONDS
        summary.curves[name] = (times, flat[keep].astype(np.float64))
    for text in seams(flat.astype(np.float64)):
        summary.add_problem("jump between two values of one angle", f"{name}: {text}")
    if 0 < flat.shape[1] <= _WIDEST and not _BOOKKEEPING.search(name):
        summary.numbers[name] = flat.astype(np.float32)
    return StreamSummary(shape, dtype, rate, *_finite_range(flat))


def _lost(values: np.ndarray, modes: Mode | Sequence[Mode]) -> list[tuple[int, str]]:
    """`statistics.collapsed` of the finite rows of values [n, ..., d]."""
    finite = values[np.isfinite(values).reshape(len(values), -1).all(axis=1)]
    return collapsed(compute_statistics(finite), modes) if len(finite) else []


def _finite_range(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest finite value of each column, float64."""
    wide, finite = flat.astype(np.float64), np.isfinite(flat)
    low = np.min(wide, axis=0, where=finite, initial=np.inf)
    return low, np.max(wide, axis=0, where=finite, initial=-np.inf)


def _inspect_video(
    summary: EpisodeSummary, name: str, stream: Stream, thorough: bool
) -> StreamSummary:
    values, n = stream.values, len(stream.values)
    is_array = isinstance(values, np.ndarray)
    shape, codec = values.shape[1:] if is_array else (), ""
    if isinstance(values, VideoFile):
        shape, codec = (*values.size, 3), values.codec
    shown = sorted({0, n // 2, n - 1})
    wanted = range(n) if thorough else shown if summary.sampled else []
    pictures, first, difference, brightness = [], None, 0.0, 0.0
    for start in range(0, len(wanted), _DECODED_FRAMES):
        part = list(wanted[start : start + _DECODED_FRAMES])
        frames = np.asarray(values[part] if is_array else values.read(part))
        shape = frames.shape[1:]
        for at, frame in zip(part, frames):
            picture = Image.fromarray(frame)
            boxes = np.asarray(picture.convert("L").reduce(_BOX), np.int16)
            first = boxes if first is None else first
            difference = max(difference, float(np.abs(boxes - first).max()))
            brightness = max(brightness, float(frame.mean()))
            if at in shown:
                picture.thumbnail(_THUMBNAIL)
                pictures.append(np.asarray(picture))
    looked = f"all {n} frames" if thorough else f"{len(shown)} frames from first to last"
    if wanted and brightness < _BLACK:
        summary.add_problem("black video", f"{name}: {looked} are black")
    elif wanted and n > 2 and difference < _STILL:
        summary.add_problem("frozen video", f"{name}: {looked} are the same picture")
    if summary.sampled:
        summary.pictures[name] = pictures
    return StreamSummary(shape, "uint8", _rate(stream), codec=codec, camera=True)


def _rate(stream: Stream) -> float | None:
    """Samples per second where there is no pause."""
    steps = np.diff(stream.timestamps)
    if len(steps) == 0:
        return None
    return NANOSECONDS / float(steps[steps <= _GAP_PERIODS * usual_steps(stream.timestamps)].mean())


def _seconds(stream: Stream) -> float:
    """The duration, with the last sample's period and with pauses."""
    rate, times = _rate(stream), stream.timestamps
    return int(times[-1] - times[0]) / NANOSECONDS + 1 / rate if rate else 0.0


def _check_times(summary: EpisodeSummary, episode: Episode) -> None:
    clocks: dict[bytes, list[str]] = {}  # streams with equal timestamps share their problems
    for name, stream in episode.streams.items():
        clocks.setdefault(stream.timestamps.tobytes(), []).append(name)
    for names in clocks.values():
        times, label = episode.streams[names[0]].timestamps, ", ".join(names)
        if len(times) <= 2:
            summary.add_problem("two or fewer samples", f"{label}: {len(times)}")
            continue
        seconds, steps, usual = (times - times[0]) / NANOSECONDS, np.diff(times), usual_steps(times)
        gaps = np.flatnonzero(steps > _GAP_PERIODS * usual)
        if len(gaps):
            worst = gaps[np.argmax(steps[gaps])]
            summary.add_problem(
                "timestamp gap",
                f"{label}: {len(gaps)}, the longest {steps[worst] / NANOSECONDS:.3g} s after "
                f"{seconds[worst]:.3f} s (a period is {usual[worst] / NANOSECONDS:.3g} s)",
            )
        close = np.flatnonzero(steps < 0.1 * usual)
        if len(close):
            summary.add_problem(
                "duplicate timestamps",
                f"{label}: {len(close)} samples less than a tenth of a period after another, "
                f"the first after {seconds[close[0]]:.3f} s",
            )
    _check_lengths(summary, episode, [names[0] for names in clocks.values()])


def _check_lengths(summary: EpisodeSummary, episode: Episode, names: list[str]) -> None:
    for camera, name in product(episode.cameras, names):
        pair = episode.streams[camera].timestamps, episode.streams[name].timestamps
        if name in episode.cameras or min(map(len, pair)) < 3:
            continue
        periods = [usual_steps(times) for times in pair]
        if any(
            abs(int(pair[0][end]) - int(pair[1][end]))
            > _SAME_PERIODS * max(p[end] for p in periods)
            for end in (0, -1)
        ):
            video, numbers = (
                f"from {t[0] / NANOSECONDS:.3f} to {t[-1] / NANOSECONDS:.3f} s ({len(t)} {what})"
                for t, what in zip(pair, ("frames", "samples"))
            )
            text = f"{camera} {video}, {name} {numbers}"
            summary.add_problem("video and numbers of different length", text)


# Records folders.


def is_records(path: Path) -> bool:
    """Whether a folder was written by the encoding job, finished or not."""
    return (path / "plan.json").is_file() or (path / "manifest.json").is_file()


def inspect_records(path: Path, *, thorough: bool = False) -> Inspection:
    """Inspects a records folder; `thorough` reads every record."""
    if not (path / "manifest.json").is_file():
        return _inspect_unfinished(path)
    try:
        dataset = RecordDataset(path)
    except Exception as error:  # the libraries below raise types of their own
        raise ValueError(f"{path} cannot be opened ({error}); encode it again") from error
    found = Inspection(str(path), length_unit="windows")
    _add_rows(found, dataset.skipped)
    splits, texts = Counter(), dataset.instructions
    for row in dataset.episodes:
        splits[row.split] += row.count
        _add_rows(found, [{**vars(row), "instructions": [texts[i] for i in row.instructions]}])
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    found.facts = [
        ("format", "records"),
        ("dataset", dataset.name),
        ("windows", ", ".join(f"{count:,} {split}" for split, count in splits.items())),
        ("episodes", f"{found.readable:,} of {len(dataset.episodes):,}"),
        ("shards", f"{len(list(path.glob('*.arrayrecord'))):,}, finished"),
        ("size", f"{size / 1e9:,.3f} GB"),
        *_settings(dataset.settings),
        ("fingerprint", dataset.fingerprint),
    ]
    names = [row.id for row in dataset.episodes]
    found.add_findings({text: [names[i] for i in at] for text, at in dataset.findings.items()})
    _read_records(found, dataset, thorough)
    _read_columns(found, dataset)
    return found


def _inspect_unfinished(path: Path) -> Inspection:
    try:
        plan = json.loads((path / "plan.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}/plan.json is damaged ({error}); encode it again") from error
    found = Inspection(str(path), length_unit="windows")
    shards, findings = sorted(path.glob("shard_*.npz")), defaultdict(list)
    for file in shards:
        try:
            rows = json.loads(str(read_columns(file, "rows")["rows"]))
        except Exception as error:
            found.add_problem("unreadable shard", file.name, str(error))
        else:
            _add_rows(found, rows)
            for row, finding in ((r, f) for r in rows for f in r.get("findings", ())):
                findings[finding].append(row["id"])
    found.add_findings(findings)
    total = math.ceil(plan["episodes"] / plan["episodes_per_shard"])
    found.facts = [
        ("format", "records, not finished: run the encoding job again"),
        ("windows", f"{int(sum(found.lengths)):,}"),
        ("episodes", f"{found.readable:,} of {plan['episodes']:,}"),
        ("shards", f"{len(shards)} of {total} finished"),
        *_settings(plan),
    ]
    return found


def _add_rows(found: Inspection, rows: Iterable[Mapping[str, Any]]) -> None:
    """Counts rows of encoded episodes: `id`, and `reason` or `count` and `instructions`."""
    for row in rows:
        if "reason" in row:
            found.add_problem("skipped while encoding", row["id"], row["reason"])
        elif row["count"]:
            found.readable += 1
            found.lengths.append(row["count"])
            found.instructions.update(dict.fromkeys(row["instructions"], 1))
            found.problems += _check_instructions(row["id"], row["instructions"])


def _settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (key, json.dumps(settings[key], ensure_ascii=False)[1:-1].replace('"', ""))
        for key in ("clip", "policy_io", "identity")
        if settings.get(key)
    ]


def _read_records(found: Inspection, dataset: RecordDataset, thorough: bool) -> None:
    total = len(dataset)
    counted = sum(row.count for row in dataset.episodes)
    if counted != total:
        text = f"the manifest lists {counted} records, the shards hold {total}"
        found.add_problem("records missing", _ALL, text)
    chosen = _spread(total, total if thorough else _SAMPLED_RECORDS)
    for index in tqdm(chosen, desc="inspect", unit="record"):
        try:
            record = dataset[int(index)]
        except Exception as error:
            found.add_problem("unreadable record", f"record {index}", str(error))
            continue
        owner = dataset.episodes[int(record["episode"])].id
        for name, value in record.items():
            found.streams.setdefault(name, StreamSummary(value.shape, value.dtype.name))
            # A single NaN in the latents would spoil a whole run.
            if not np.isfinite(value.astype(np.float32)).all():
                found.add_problem("NaN or infinity", owner, f"{name} of record {index}")
    found.facts.append(("records read", f"{len(chosen):,} of {total:,}"))


def _read_columns(found: Inspection, dataset: RecordDataset) -> None:
    """Ranges of the numeric columns over all windows, per dimension of the last axis."""
    for name in VECTORS:
        if name not in dataset.shapes:
            continue
        try:
            column = dataset.columns(name)[name]
        except Exception as error:
            found.add_problem("unreadable shard", _ALL, f"column {name}: {error}")
            continue
        low, high = _finite_range(column.reshape(-1, column.shape[-1]))
        found.streams[name] = StreamSummary(column.shape[1:], column.dtype.name, low=low, high=high)
        parts, dim = parse(dataset.settings["dataset"].get(VECTORS[name], "")), column.shape[-1]
        if not parts:
            continue
        names = dimension_names(parts, dim)
        few = column[_spread(len(column), _NORMALISED_ROWS), :: -(-column.shape[1] // 4)]
        for i, what in _lost(few, modes(parts, dim)):
            text = f"{name}: dimension {i} ({names[i]}) {what}"
            found.add_problem("lost by normalisation", _ALL, text)


# An inspection as text for a terminal.

_INSTRUCTIONS = 10
_EXAMPLES = 5  # problems shown of each kind


def describe(found: Inspection) -> str:
    """The findings as text, with a few problems of each kind; the page lists more."""
    lines = [found.title, *_columns([("  " + what, value) for what, value in found.facts])]
    cameras = [("  camera", "size", "fps", "codec")]
    numbers = [("  stream", "shape", "dtype", "rate", "min", "max")]
    for name, s in found.streams.items():
        if s.camera:
            cameras.append((f"  {name}", size_text(s), rate_text(s), s.codec or "–"))
        else:
            known = s.low is not None and s.low.size
            ends = (f"{s.low.min():.4g}", f"{s.high.max():.4g}") if known else ("–", "–")
            numbers.append((f"  {name}", str(list(s.shape)), s.dtype, rate_text(s), *ends))
    for table in (cameras, numbers):
        lines += ["", *_columns(table)] if len(table) > 1 else []
    if found.left_out:
        lines += ["", "  not used by an encoding job"]
        lines += [f"    {line}" for line in left_out_text(found)]
    if found.lengths:
        low, middle, high = np.percentile(found.lengths, [0, 50, 100])
        unit = found.length_unit
        lines += ["", f"  lengths: {low:.4g} to {high:.4g} {unit}, median {middle:.4g}"]
    lines += ["", f"  instructions: {len(found.instructions):,} distinct"]
    frequent = found.instructions.most_common(_INSTRUCTIONS)
    lines += [f"    {count:>6,}  {text!r}" for text, count in frequent]
    total = len(found.problems)
    lines += ["", f"  problems: {total:,}" if total else "  no problems found"]
    for kind, problems in found.problems_by_kind().items():
        lines.append(f"    {len(problems):>6,}  {kind}")
        lines += [f"            {p.episode}: {p.text}" for p in problems[:_EXAMPLES]]
        if len(problems) > _EXAMPLES:
            lines.append(f"            ... and {len(problems) - _EXAMPLES:,} more")
    # Names and texts that are not valid UTF-8 would fail to print.
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()


def _episodes(count: int) -> str:
    return f"{count:,} episode{'s' if count > 1 else ''}"


def left_out_text(found: Inspection) -> list[str]:
    """A line per stream that an encoding job could not use, and why; a few reasons of each."""
    lines, reasons = [], defaultdict(list)
    for (name, why), count in found.left_out.most_common():
        reasons[name].append((why, count))
    for name, each in reasons.items():
        lines += [f"{name}: {why} ({_episodes(count)})" for why, count in each[:_EXAMPLES]]
        if rest := each[_EXAMPLES:]:
            more = _episodes(sum(count for _, count in rest))
            lines.append(f"{name}: {len(rest):,} other reasons ({more})")
    return lines


def size_text(stream: StreamSummary) -> str:
    """Width x height of a camera."""
    return f"{stream.shape[1]}x{stream.shape[0]}" if stream.shape else "unknown"


def rate_text(stream: StreamSummary) -> str:
    """Samples per second."""
    return "–" if stream.rate is None else f"{stream.rate:.4g}"


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
