"""A dataset looked at as a whole: what is in it, and what is wrong with it.

Cheap by default: lists and numbers of the episodes, and a few decoded frames of some of them. An
episode that cannot be read is a finding and never stops the inspection.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

from data_pipelines.episode import NANOSECONDS, Episode, Stream
from data_pipelines.records import RecordDataset
from data_pipelines.sources.formats import open_dataset
from data_pipelines.sources.rlds import UnknownRate
from data_pipelines.video import VideoFile
from data_pipelines.video_index import VideoPlace, open_video

# What an inspection finds out about an episode.


@dataclass(frozen=True)
class Problem:
    """Something that is wrong.

    Attributes:
        kind: under which it is counted.
        episode: id of the episode, or which data it concerns.
        text: what was found.
    """

    kind: str
    episode: str
    text: str


@dataclass(frozen=True)
class SeenStream:
    """A stream of one episode, or of a whole dataset.

    Attributes:
        shape: of one sample; () of a video whose size is not known.
        dtype: of the numbers.
        rate: samples per second; None for fewer than two.
        low: the least finite value of every dimension [prod(shape)]; None for video.
        high: the greatest.
        codec: of a video; "" for numbers and pictures.
        camera: whether it is video.
    """

    shape: tuple[int, ...]
    dtype: str
    rate: float | None = None
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    codec: str = ""
    camera: bool = False


@dataclass(frozen=True)
class Sample:
    """What a page shows of an episode.

    Attributes:
        pictures: camera -> small uint8 [h, w, 3] of its first, middle and last frame.
        curves: stream -> seconds [k] and values [k, d].
    """

    pictures: dict[str, list[np.ndarray]] = field(default_factory=dict)
    curves: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)


@dataclass
class SeenEpisode:
    """An episode that was looked at; without streams if it could not be read."""

    id: str
    embodiment: str = ""
    instructions: tuple[str, ...] = ()
    seconds: float = 0.0
    streams: dict[str, SeenStream] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    sample: Sample | None = None

    def complain(self, kind: str, text: str) -> None:
        """Notes a problem."""
        self.problems.append(Problem(kind, self.id, text))


def rate_of(stream: Stream) -> float | None:
    """Samples per second; None for fewer than two."""
    times = stream.timestamps
    if len(times) < 2:
        return None
    return (len(times) - 1) * NANOSECONDS / int(times[-1] - times[0])


# The video of an episode looked at: does it decode, and does it show anything.


_STILL = 4.0  # grey levels by which boxes of an unmoved picture differ, after compression
_BOX = 8  # pixels; the means of such boxes hide what compression does to single pixels
_BLACK = 4.0  # the mean grey level of a picture that shows nothing
_THUMBNAIL = (240, 180)  # pixels, at most
_DECODE_FRAMES = 16  # at a time when every frame is decoded


def look_at_video(
    seen: SeenEpisode, name: str, stream: Stream, sample: Sample | None, thorough: bool
) -> SeenStream:
    """Looks at one camera; what is wrong is noted in `seen`.

    Args:
        seen: the episode.
        name: of the camera.
        stream: its frames.
        sample: takes small pictures of the first, middle and last frame; None decodes nothing.
        thorough: decode every frame.

    Raises:
        ValueError: if frames cannot be decoded.
    """
    values, rate = stream.values, rate_of(stream)
    read = (lambda at: values[at]) if isinstance(values, np.ndarray) else values.read
    shape, codec = _facts(values.path) if isinstance(values, VideoFile) else ((), "")
    if isinstance(values, np.ndarray):
        shape = values.shape[1:]
    n = len(values)
    shown = sorted({0, n // 2, n - 1})
    pictures, first, difference, brightness = [], None, 0.0, 0.0
    if thorough:
        parts = [range(i, min(i + _DECODE_FRAMES, n)) for i in range(0, n, _DECODE_FRAMES)]
    else:
        parts = [shown] if sample is not None else []
    for part in parts:
        frames = np.asarray(read(list(part)))
        shape = frames.shape[1:]
        for at, frame in zip(part, frames):
            boxes = _boxes(frame)
            first = boxes if first is None else first
            difference = max(difference, float(np.abs(boxes - first).max()))
            brightness = max(brightness, float(frame.mean()))
            if at in shown and sample is not None:
                pictures.append(_small(frame))
    looked = f"all {n} frames" if thorough else f"{len(shown)} frames from first to last"
    if parts and brightness < _BLACK:
        seen.complain("black video", f"{name}: {looked} are black")
    elif parts and n > 2 and difference < _STILL:
        seen.complain("frozen video", f"{name}: {looked} are the same picture")
    if sample is not None:
        sample.pictures[name] = pictures
    return SeenStream(shape, "uint8", rate, codec=codec, camera=True)


@lru_cache(maxsize=256)  # files that hold many episodes are opened once
def _facts(place: VideoPlace) -> tuple[tuple[int, ...], str]:
    """Shape of the frames and name of the codec."""
    with open_video(place) as container:
        context = container.streams.video[0].codec_context
        return (context.height, context.width, 3), context.name


def _boxes(frame: np.ndarray) -> np.ndarray:
    grey = Image.fromarray(frame).convert("L")
    return np.asarray(grey.reduce(_BOX), np.int16)


def _small(frame: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(frame)
    picture.thumbnail(_THUMBNAIL)
    return np.asarray(picture)


# One episode looked at: what is in it, and what is wrong with it.


GAP_PERIODS = 1.5  # a longer step between neighbouring samples is a gap
_SAME_PERIODS = 1.5  # by so many periods of the slower one streams may begin or end apart
_CURVE_POINTS = 200
_NUMERIC = "biuf"


def look_at(
    episodes: Sequence[Episode], index: int, *, decode: bool, thorough: bool
) -> SeenEpisode:
    """Looks at one episode; whatever is wrong with it ends up among its problems.

    Args:
        episodes: the dataset.
        index: of the episode.
        decode: also decode three frames of every camera and keep them, with the numbers' curves.
        thorough: decode every frame.
    """
    seen = SeenEpisode(f"number {index}")
    try:
        episode = episodes[index]
    except Exception as error:  # libraries of the formats raise types of their own
        seen.complain(_kind(error), _text(error))
        return seen
    seen.id, seen.embodiment = episode.id, episode.embodiment
    seen.instructions = tuple(episode.instructions)
    seen.problems += check_instructions(seen.id, seen.instructions)
    sample = Sample() if decode else None
    for name, stream in episode.streams.items():
        try:
            if name in episode.cameras:
                seen.streams[name] = look_at_video(seen, name, stream, sample, thorough)
            else:
                seen.streams[name] = _numbers(seen, name, stream, sample)
        except Exception as error:
            seen.complain(_kind(error), f"{name}: {_text(error)}")
    _check_times(seen, episode)
    seen.seconds = max((_seconds(stream) for stream in episode.streams.values()), default=0.0)
    seen.sample = sample
    return seen


# Sources say in words what is wrong; these are the words people count by. The first one counts.
_KINDS = {
    "file that was not downloaded": r"git lfs",
    "missing file": r"(is|are) missing|no such file|not complete",
    "text in another encoding": r"utf-8|codec can't decode",
    "unreadable video": r"readable video|no frames between|avcodec|avformat",
    "refused pickle": r"pickle",
    "timestamps that do not increase": r"strictly increase",
    "without any sample": r"needs at least one value",
}


def _kind(error: Exception) -> str:
    if isinstance(error, av.FFmpegError):
        return "unreadable video"
    text = str(error).lower()
    kinds = (kind for kind, words in _KINDS.items() if re.search(words, text))
    return next(kinds, "unreadable episode")


def _text(error: Exception) -> str:
    words = " ".join(str(error).split())
    return words if isinstance(error, ValueError) and words else f"{type(error).__name__}: {words}"


def check_instructions(episode: str, texts: Sequence[str]) -> list[Problem]:
    """What is wrong with the instructions of an episode."""
    empty = sum(not text.strip() for text in texts)
    if empty == len(texts):
        return [Problem("no instruction", episode, "training gives it the empty text")]
    found = []
    if empty:
        found.append(Problem("empty instruction", episode, f"{empty} of {len(texts)}"))
    if any("\ufffd" in text for text in texts):
        lost = f"characters were lost: {list(texts)}"
        found.append(Problem("text in another encoding", episode, lost))
    return found


def _check_times(seen: SeenEpisode, episode: Episode) -> None:
    together: dict[bytes, list[str]] = {}  # streams of one clock are named together
    for name, stream in episode.streams.items():
        together.setdefault(stream.timestamps.tobytes(), []).append(name)
    for names in together.values():
        stream, label = episode.streams[names[0]], ", ".join(names)
        times = stream.timestamps
        if len(times) <= 2:
            seen.complain("two or fewer samples", f"{label}: {len(times)}")
            continue
        steps = np.diff(times)
        period = float(np.median(steps))
        gaps = np.flatnonzero(steps > GAP_PERIODS * period)
        if len(gaps):
            worst = gaps[np.argmax(steps[gaps])]
            seen.complain(
                "timestamp gap",
                f"{label}: {len(gaps)}, the longest {steps[worst] / NANOSECONDS:.3g} s after "
                f"{(times[worst] - times[0]) / NANOSECONDS:.3f} s (a period is "
                f"{period / NANOSECONDS:.3g} s)",
            )
        close = np.flatnonzero(steps < 0.1 * period)
        if len(close):
            at = (times[close[0]] - times[0]) / NANOSECONDS
            seen.complain(
                "duplicate timestamps",
                f"{label}: {len(close)} samples less than a tenth of a period after the one before "
                f"them, the first after {at:.3f} s",
            )
    _check_lengths(seen, episode, [names[0] for names in together.values()])


def _check_lengths(seen: SeenEpisode, episode: Episode, names: list[str]) -> None:
    for camera in episode.cameras:
        video = episode.streams[camera]
        for name in names:
            other = episode.streams[name]
            if name in episode.cameras or min(len(video.timestamps), len(other.timestamps)) < 3:
                continue
            periods = (float(np.median(np.diff(s.timestamps))) for s in (video, other))
            allowed = _SAME_PERIODS * max(periods)
            ends = [(int(s.timestamps[0]), int(s.timestamps[-1])) for s in (video, other)]
            if any(abs(a - b) > allowed for a, b in zip(*ends)):
                spans = [f"{a / NANOSECONDS:.3f} to {b / NANOSECONDS:.3f} s" for a, b in ends]
                seen.complain(
                    "video and numbers of different length",
                    f"{camera} from {spans[0]} ({len(video.timestamps)} frames), {name} from "
                    f"{spans[1]} ({len(other.timestamps)} samples)",
                )


def _numbers(seen: SeenEpisode, name: str, stream: Stream, sample: Sample | None) -> SeenStream:
    values = np.asarray(stream.values)
    shape, dtype, rate = values.shape[1:], str(values.dtype), rate_of(stream)
    if values.dtype.kind not in _NUMERIC:
        return SeenStream(shape, dtype, rate)
    flat = values.reshape(len(values), -1)
    finite = np.isfinite(flat)
    if not finite.all():
        bad = np.flatnonzero(~finite.all(axis=0))
        seen.complain(
            "NaN or infinity",
            f"{name}: {int((~finite).sum())} of {flat.size} numbers, in the dimensions "
            f"{_shortened(bad)}, first in sample {int(np.argmax(~finite.all(axis=1)))}",
        )
    wide = flat.astype(np.float64)
    low = np.min(wide, axis=0, where=finite, initial=np.inf)
    high = np.max(wide, axis=0, where=finite, initial=-np.inf)
    if sample is not None and flat.shape[1]:
        keep = np.unique(np.linspace(0, len(flat) - 1, _CURVE_POINTS).astype(int))
        times = (stream.timestamps[keep] - stream.timestamps[0]) / NANOSECONDS
        sample.curves[name] = (times, wide[keep])
    return SeenStream(shape, dtype, rate, low, high)


def _seconds(stream: Stream) -> float:
    """How long a stream lasts, its last sample included."""
    rate = rate_of(stream)
    return len(stream.timestamps) / rate if rate else 0.0


def _shortened(numbers: np.ndarray, most: int = 8) -> str:
    listed = ", ".join(map(str, numbers[:most]))
    return f"{listed} and {len(numbers) - most} more" if len(numbers) > most else listed


_SAMPLED_EPISODES = 24  # episodes whose frames are decoded, unless all are
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
    decoded = set(chosen[_spread(len(chosen), _SAMPLED_EPISODES)].tolist())
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
        if seen.sample is not None and len(found.samples) < _SAMPLED_EPISODES:
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


# A records folder looked at: what the encoding job wrote, and whether it can be read.


_SAMPLED_RECORDS = 64  # records that are read, unless all are
_SKIPPED = "skipped while encoding"


def is_records(path: Path) -> bool:
    """Whether a folder was made by the encoding job, finished or not."""
    return (path / "plan.json").is_file() or (path / "manifest.json").is_file()


def inspect_records(path: Path, *, thorough: bool = False) -> Inspection:
    """Looks at a records folder.

    Args:
        path: the folder.
        thorough: read every record.

    Raises:
        ValueError: if not even its lists can be read.
    """
    if not (path / "manifest.json").is_file():
        return _unfinished(path)
    try:
        dataset = RecordDataset(path)
    except Exception as error:  # the libraries below raise types of their own
        raise ValueError(f"{path} cannot be opened ({error}); encode it again") from error
    found = Inspection(str(path), length_unit="windows")
    found.lengths = [row.count for row in dataset.episodes if row.count]
    found.readable = len(found.lengths)
    found.problems += [Problem(_SKIPPED, row["id"], row["reason"]) for row in dataset.skipped]
    for row in dataset.episodes:
        if row.count:
            texts = {dataset.instructions[i] for i in row.instructions}
            found.instructions.update(texts)
            found.problems += check_instructions(row.id, tuple(texts))
    splits = Counter()
    for row in dataset.episodes:
        splits[row.split] += row.count
    files = [file for file in path.iterdir() if file.is_file()]
    found.facts = [
        ("format", "records"),
        ("dataset", dataset.name),
        ("windows", ", ".join(f"{count:,} {split}" for split, count in splits.items())),
        ("episodes", f"{found.readable:,} of {len(dataset.episodes):,}"),
        ("shards", f"{len(list(path.glob('*.arrayrecord'))):,}, finished"),
        ("size", f"{sum(file.stat().st_size for file in files) / 1e9:,.3f} GB"),
        *_settings(dataset.settings),
        ("fingerprint", dataset.fingerprint),
    ]
    _read(found, dataset, thorough)
    _ranges(found, dataset)
    return found


def _unfinished(path: Path) -> Inspection:
    try:
        plan = json.loads((path / "plan.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}/plan.json is damaged ({error}); encode it again") from error
    found = Inspection(str(path), length_unit="windows")
    for file in sorted(path.glob("shard_*.npz")):
        try:
            with np.load(file, allow_pickle=False) as columns:
                rows = json.loads(str(columns["rows"]))
        except Exception as error:
            found.problems.append(Problem("unreadable shard", file.name, str(error)))
            continue
        for row in rows:
            if "reason" in row:
                found.problems.append(Problem(_SKIPPED, row["id"], row["reason"]))
            elif row["count"]:
                found.lengths.append(row["count"])
                found.instructions.update(set(row["instructions"]))
                found.problems += check_instructions(row["id"], row["instructions"])
    found.readable = len(found.lengths)
    done, each = len(list(path.glob("shard_*.npz"))), plan.get("episodes_per_shard")
    total = f" of {-(-plan['episodes'] // each)}" if each and "episodes" in plan else ""
    found.facts = [
        ("format", "records, not finished: run the encoding job again"),
        ("windows", f"{int(sum(found.lengths)):,}"),
        ("episodes", f"{found.readable:,} of {plan.get('episodes', 0):,}"),
        ("shards", f"{done}{total} finished"),
        *_settings(plan),
    ]
    return found


def _settings(settings: dict[str, Any]) -> list[tuple[str, str]]:
    shown = ((key, settings.get(key)) for key in ("clip", "policy_io", "identity"))
    return [(key, _in_words(value)) for key, value in shown if value]


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(
            f"{key} ({_in_words(part)})" if isinstance(part, dict) else f"{key} {part}"
            for key, part in value.items()
        )
    return str(value)


def _read(found: Inspection, dataset: RecordDataset, thorough: bool) -> None:
    """Reads records; latents that are not finite would poison a whole run."""
    total = len(dataset)
    counted = sum(row.count for row in dataset.episodes)
    if counted != total:
        text = f"the lists name {counted} records, the shards hold {total}"
        found.problems.append(Problem("records missing", ALL, text))
    chosen = np.unique(
        np.linspace(0, total - 1, total if thorough else _SAMPLED_RECORDS).astype(int)
    )
    for index in tqdm(chosen, desc="inspect", unit="record"):
        try:
            record = dataset[int(index)]
        except Exception as error:
            found.problems.append(Problem("unreadable record", f"record {index}", str(error)))
            continue
        owner = dataset.episodes[int(record["episode"])].id
        for name, value in record.items():
            if name not in found.streams:
                found.streams[name] = SeenStream(value.shape, value.dtype.name)
            if not np.isfinite(value.astype(np.float32)).all():
                text = f"{name} of record {index}"
                found.problems.append(Problem("NaN or infinity", owner, text))
    found.facts.append(("records read", f"{len(chosen):,} of {total:,}"))


def _ranges(found: Inspection, dataset: RecordDataset) -> None:
    """Ranges of the numeric columns over all windows, per dimension of the last axis."""
    for name in ("actions", "proprio"):
        if name not in dataset.shapes:
            continue
        try:
            column = dataset.columns(name)[name]
        except Exception as error:
            found.problems.append(Problem("unreadable shard", ALL, f"column {name}: {error}"))
            continue
        flat = column.reshape(-1, column.shape[-1]).astype(np.float64)
        finite = np.isfinite(flat)
        found.streams[name] = SeenStream(
            column.shape[1:],
            column.dtype.name,
            low=np.min(flat, axis=0, where=finite, initial=np.inf),
            high=np.max(flat, axis=0, where=finite, initial=-np.inf),
        )


# An inspection as lines of text for a terminal.


_INSTRUCTIONS = 10
_EXAMPLES = 5  # problems of a kind


def describe(found: Inspection) -> str:
    """What is in a dataset and what is wrong with it; the page lists every problem."""
    lines = [found.title, *_columns([("  " + what, value) for what, value in found.facts])]
    cameras = {name: stream for name, stream in found.streams.items() if stream.camera}
    numbers = {name: stream for name, stream in found.streams.items() if not stream.camera}
    if cameras:
        head = ("  camera", "size", "fps", "codec")
        rows = [("  " + name, size(s), rate(s), s.codec or "–") for name, s in cameras.items()]
        lines += ["", *_columns([head, *rows])]
    if numbers:
        head = ("  stream", "shape", "dtype", "rate", "min", "max")
        rows = [
            ("  " + name, str(list(s.shape)), s.dtype, rate(s), *_range(s))
            for name, s in numbers.items()
        ]
        lines += ["", *_columns([head, *rows])]
    if found.lengths:
        low, middle, high = np.percentile(found.lengths, [0, 50, 100])
        unit = found.length_unit
        lines += ["", f"  lengths: {low:.4g} to {high:.4g} {unit}, half below {middle:.4g}"]
    lines += ["", f"  instructions: {len(found.instructions):,} distinct"]
    frequent = found.instructions.most_common(_INSTRUCTIONS)
    lines += [f"    {count:>6,}  {text!r}" for text, count in frequent]
    lines += ["", *_problems(found)]
    # Names and texts that were never UTF-8 cannot be printed as they are.
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()


def size(stream: SeenStream) -> str:
    """Width x height of a camera."""
    return f"{stream.shape[1]}x{stream.shape[0]}" if stream.shape else "unknown"


def rate(stream: SeenStream) -> str:
    """Samples per second."""
    return "–" if stream.rate is None else f"{stream.rate:.4g}"


def _range(stream: SeenStream) -> tuple[str, str]:
    if stream.low is None or not stream.low.size:
        return "–", "–"
    return f"{stream.low.min():.4g}", f"{stream.high.max():.4g}"


def _problems(found: Inspection) -> list[str]:
    kinds = found.problems_by_kind()
    if not kinds:
        return ["  no problems found"]
    lines = [f"  problems: {len(found.problems):,}"]
    for kind, problems in kinds.items():
        lines.append(f"    {len(problems):>6,}  {kind}")
        lines += [f"            {p.episode}: {p.text}" for p in problems[:_EXAMPLES]]
        if len(problems) > _EXAMPLES:
            lines.append(f"            ... and {len(problems) - _EXAMPLES:,} more")
    return lines


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
