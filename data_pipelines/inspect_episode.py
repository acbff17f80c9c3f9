"""One episode as `inspect.py` sees it: its streams, and what is wrong with it.

Every error becomes a problem of the episode.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any, NamedTuple

import av
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from data_pipelines.augment import Augment, window_name
from data_pipelines.cameras import dataset_views
from data_pipelines.cutting import check_finite, cut_numbers
from data_pipelines.episode import NANOSECONDS, ODD_TEXT, Episode, Stream
from data_pipelines.findings import BLACK
from data_pipelines.frames import side_by_side
from data_pipelines.pickles import PickleRefused
from data_pipelines.representations import seams
from data_pipelines.shards import StoredTexts
from data_pipelines.video import VideoFile
from data_pipelines.windows import nearest_indices, usual_steps

_CURVE_POINTS = 200
_THUMBNAIL = (240, 180)  # maximum size, pixels
_GAP_PERIODS = 1.5  # a longer step between samples is a gap
_SAME_PERIODS = 1.5  # streams may begin or end this many periods of the slower one apart
_BOX = 8  # pixels; averaging boxes removes compression noise
_STILL = 4.0  # grey levels by which the boxes of a still picture may differ after compression
_DECODED_FRAMES = 16  # in memory at a time
_VARIANTS = 8  # of a window, on the page
_WIDEST = 64  # dimensions of a stream that may be an action or a state
# Streams that no policy takes, and that are rarely other than 0.
_BOOKKEEPING = re.compile(
    r"\b(next|rewards?|discounts?|dones?|success|terminat\w+|truncat\w+|is_\w+|\w*index|timestamps?)\b"
)


@dataclass(frozen=True)
class Problem:
    """A problem of an episode, or of the whole dataset."""

    kind: str
    episode: str
    text: str


class Wanted(NamedTuple):
    """What a configuration asks of a dataset."""

    dataset: ConfigDict  # `video`, `views`, `action` and `proprio`, as of `cutting.cut_episode`
    policy_io: ConfigDict
    clip: ConfigDict
    anchor_fps: float | None = None
    texts: StoredTexts | None = None  # where the dataset itself stores the embeddings


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


def inspect_episode(
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
    summary.problems += check_instructions(summary.id, summary.instructions)
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
        summary.add_problem("no stream that can be used", listed(why) or "it has none")
    _check_times(summary, episode)
    if wanted is not None:
        _check_wanted(summary, episode, wanted)
    summary.seconds = max(map(_seconds, episode.streams.values()), default=0.0)
    return summary


def _check_wanted(summary: EpisodeSummary, episode: Episode, wanted: Wanted) -> None:
    """Cuts the numbers of an episode as the encoding job would."""
    if episode.unwanted:
        return
    try:
        if wanted.texts:
            wanted.texts.check(episode)
        windows = wanted.policy_io, wanted.anchor_fps, wanted.clip
        columns = cut_numbers(episode, wanted.dataset, *windows)
        check_finite(columns)
    except ValueError as error:
        summary.add_problem("skipped by the encoding job", _text(error))
        return
    if summary.sampled:
        with suppress(Exception):  # frames that cannot be read are a problem already
            _add_variants(summary, episode, wanted, columns["anchor"])


def _add_variants(
    summary: EpisodeSummary, episode: Episode, wanted: Wanted, anchors: np.ndarray
) -> None:
    """Adds the variants of the present picture of the middle window, for every view."""
    augment, anchor = Augment.of(wanted.dataset), int(anchors[len(anchors) // 2])
    for view in dataset_views(wanted.dataset, wanted.clip) if augment.variants > 1 else ():
        frames = {}
        for name in view.cameras:
            stream = episode.streams[name]
            at = nearest_indices(stream.timestamps, np.array([anchor]))
            frames[name] = np.asarray(stream.values.read(at))
        shown = []
        for variant in range(min(augment.variants, _VARIANTS) if frames else 0):
            window = wanted.dataset.name, episode.id, anchor
            draws = {name: augment.draw(variant, window_name(*window, name)) for name in frames}
            picture = Image.fromarray(view.picture(frames, draws)[0])
            picture.thumbnail(_THUMBNAIL)
            shown.append(np.asarray(picture))
        if shown:
            title = f"{view.name}: variants 0 to {len(shown) - 1} of a window"
            summary.pictures[title] = [side_by_side(shown)]


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


def check_instructions(episode: str, texts: Sequence[str]) -> Iterator[Problem]:
    """What is wrong with an episode's instructions."""
    empty = sum(not text.strip() for text in texts)
    if empty == len(texts):
        yield Problem("no instruction", episode, "training uses the empty text")
        return
    if empty:
        yield Problem("empty instruction", episode, f"{empty} of {len(texts)}")
    if odd := [text for text in texts if ODD_TEXT.fullmatch(text.strip())]:
        yield Problem(
            "instruction that is no sentence",
            episode,
            f"as Python writes bytes, a list or nothing: {odd}",
        )
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
            f"{listed(dimensions)}, first in sample {int(np.argmax(~finite.all(axis=1)))}",
        )
    if summary.sampled and flat.shape[1]:
        keep = spread(len(flat), _CURVE_POINTS)
        times = (stream.timestamps[keep] - stream.timestamps[0]) / NANOSECONDS
        summary.curves[name] = (times, flat[keep].astype(np.float64))
    if 0 < flat.shape[1] <= _WIDEST and not _BOOKKEEPING.search(name):
        summary.numbers[name] = flat.astype(np.float32)
        for text in seams(flat.astype(np.float64)):
            if values.dtype.kind == "f" or "2π" not in text:  # a mode of 0 or 6 is no angle
                summary.add_problem("jump between two values of one angle", f"{name}: {text}")
    return StreamSummary(shape, dtype, rate, *finite_range(flat))


def finite_range(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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
    if wanted and brightness < BLACK:
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
    cameras = [name for name in names if name in episode.cameras]
    numbers = [name for name in names if name not in episode.cameras]
    for first, second in (*product(episode.cameras, numbers), *combinations(cameras, 2)):
        pair = episode.streams[first].timestamps, episode.streams[second].timestamps
        if min(map(len, pair)) < 3:
            continue
        periods = [usual_steps(times) for times in pair]
        if any(
            abs(int(pair[0][end]) - int(pair[1][end]))
            > _SAME_PERIODS * max(p[end] for p in periods)
            for end in (0, -1)
        ):
            both = second in cameras
            here, there = (
                f"from {t[0] / NANOSECONDS:.3f} to {t[-1] / NANOSECONDS:.3f} s ({len(t)} {what})"
                for t, what in zip(pair, ("frames", "frames" if both else "samples"))
            )
            kind = "videos" if both else "video and numbers"
            text = f"{first} {here}, {second} {there}"
            summary.add_problem(f"{kind} of different length", text)


def spread(total: int, count: int) -> np.ndarray:
    """`count` of `total` indices, evenly spread, with the first and the last."""
    return np.unique(np.linspace(0, total - 1, min(total, count)).round().astype(int))


def listed(values: Sequence[object], most: int = 8) -> str:
    """The first values, and how many there are besides."""
    shown = ", ".join(map(str, values[:most]))
    return f"{shown} and {len(values) - most} more" if len(values) > most else shown
