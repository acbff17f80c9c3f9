"""One episode looked at: what is in it, and what is wrong with it."""

import re
from collections.abc import Sequence

import av
import numpy as np

from data_pipelines.episode import NANOSECONDS, Episode, Stream
from data_pipelines.inspection.found import Problem, Sample, SeenEpisode, SeenStream, rate_of
from data_pipelines.inspection.video import look_at_video

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
