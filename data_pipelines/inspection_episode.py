"""One episode looked at: what is in it, and what is wrong with it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from data_pipelines.episode import NANOSECONDS, Episode, Stream

GAP_PERIODS = 1.5  # a longer step between neighbouring samples is a gap
_STILL = 4.0  # grey levels by which boxes of an unmoved picture differ, after compression
_BOX = 8  # pixels; the means of such boxes hide what compression does to single pixels
_BLACK = 4.0  # the mean grey level of a picture that shows nothing
_SAME_PERIODS = 1.5  # by so many periods of the slower one streams may begin or end apart
_THUMBNAIL = (240, 180)  # pixels, at most
_CURVE_POINTS = 200
_DECODE_FRAMES = 16  # at a time when every frame is decoded
_NUMERIC = "biuf"


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
    _check_instructions(seen)
    sample = Sample() if decode else None
    for name, stream in episode.streams.items():
        try:
            if name in episode.cameras:
                seen.streams[name] = _video(seen, name, stream, sample, thorough)
            else:
                seen.streams[name] = _numbers(seen, name, stream, sample)
        except Exception as error:
            seen.complain(_kind(error), f"{name}: {_text(error)}")
    _check_times(seen, episode)
    seen.seconds = max((_seconds(stream) for stream in episode.streams.values()), default=0.0)
    seen.sample = sample
    return seen


def _kind(error: Exception) -> str:
    """Sources say in words what is wrong; these are the words people count by."""
    text = str(error).lower()
    if isinstance(error, UnicodeDecodeError) or "utf-8" in text:
        return "text in another encoding"
    if isinstance(error, FileNotFoundError) or ("missing" in text and "frame at" not in text):
        return "missing file"
    if "strictly increase" in text:
        return "timestamps that do not increase"
    if "video" in text or isinstance(error, av.FFmpegError):
        return "unreadable video"
    return "unreadable episode"


def _text(error: Exception) -> str:
    words = " ".join(str(error).split())
    return words if isinstance(error, ValueError) and words else f"{type(error).__name__}: {words}"


def _check_instructions(seen: SeenEpisode) -> None:
    if not seen.instructions:
        seen.complain("no instruction", "it has no instruction")
    elif not all(text.strip() for text in seen.instructions):
        seen.complain("empty instruction", "an instruction is empty")
    elif any("\ufffd" in text for text in seen.instructions):
        seen.complain("text in another encoding", f"characters were lost: {seen.instructions}")


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
    shape, dtype, rate = values.shape[1:], str(values.dtype), _rate(stream)
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


def _video(
    seen: SeenEpisode, name: str, stream: Stream, sample: Sample | None, thorough: bool
) -> SeenStream:
    values, rate = stream.values, _rate(stream)
    read = (lambda at: values[at]) if isinstance(values, np.ndarray) else values.read
    path = getattr(values, "path", None)
    shape, codec = _facts(Path(path)) if path is not None else ((), "")
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
def _facts(path: Path) -> tuple[tuple[int, ...], str]:
    """Shape of the frames and name of the codec; empty where the file is none of its own kind."""
    try:
        with av.open(str(path)) as container:
            context: Any = container.streams.video[0].codec_context
            return (context.height, context.width, 3), context.name
    except (av.FFmpegError, IndexError):
        return (), ""


def _boxes(frame: np.ndarray) -> np.ndarray:
    grey = Image.fromarray(frame).convert("L")
    return np.asarray(grey.reduce(_BOX), np.int16)


def _small(frame: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(frame)
    picture.thumbnail(_THUMBNAIL)
    return np.asarray(picture)


def _rate(stream: Stream) -> float | None:
    times = stream.timestamps
    if len(times) < 2:
        return None
    return (len(times) - 1) * NANOSECONDS / int(times[-1] - times[0])


def _seconds(stream: Stream) -> float:
    """How long a stream lasts, its last sample included."""
    rate = _rate(stream)
    return len(stream.timestamps) / rate if rate else 0.0


def _shortened(numbers: np.ndarray, most: int = 8) -> str:
    listed = ", ".join(map(str, numbers[:most]))
    return f"{listed} and {len(numbers) - most} more" if len(numbers) > most else listed
