"""Cutting an episode into windows: its frames, resized and tiled, and its vectors.

`dataset.video` in a config names the cameras: see `camera_rows`. `windows.py` defines a window's
instants, `vectors.py` its vectors.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.episode import NANOSECONDS, Episode
from data_pipelines.frames import resize_area
from data_pipelines.representations import seams
from data_pipelines.vectors import StreamMismatch, bases, dims, parse, read, streams
from data_pipelines.windows import (
    WindowSpec,
    anchors,
    in_pause,
    is_outside,
    nearest_indices,
    request_times,
    usual_steps,
)

Rows = tuple[tuple[str, ...], ...]  # camera names, see `camera_rows`

_SLOW = 1.5  # times 1/fps between a camera's frames
_DECODE_FRAMES = 4  # at a time: still in the processor's cache when they are resized


@dataclass(frozen=True)
class EpisodeWindows:
    """All windows of one episode."""

    frames: np.ndarray  # uint8 [n, h, w, 3], resized, several cameras tiled into one
    clips: np.ndarray  # each window's indices into `frames`, int64 [k, observed + future]
    # anchor int64 [k] (nanoseconds), and where the dataset has them actions float32 [k, H, A] and
    # proprio float32 [k, P, D], not normalised, with actions_padded bool [k, H] and proprio_padded
    # bool [k, P], true where an edge value was repeated.
    columns: dict[str, np.ndarray]

    # Each window's instruction, an index into those of the episode, int64 [k].
    texts: np.ndarray
    sectioned: bool = False  # whether the task changes during the episode
    findings: tuple[str, ...] = ()  # as of `Episode`, about the windows

    def digest(self) -> str:
        """Hash of the content; of the texts only where they are not the episode's own in turn."""
        state = hashlib.blake2b(digest_size=16)
        texts = (self.texts,) if self.sectioned else ()
        for array in (self.frames, self.clips, *self.columns.values(), *texts):
            state.update(np.ascontiguousarray(array))
        return state.hexdigest()


def cut_episode(
    episode: Episode,
    dataset: ConfigDict,
    clip: ConfigDict,
    policy_io: ConfigDict,
    anchor_fps: float | None = None,
) -> EpisodeWindows:
    """Decodes an episode's video once, in order, and cuts it into windows.

    Args:
        episode: the episode.
        dataset: `video` (see `camera_rows`), `action` and `proprio` (see `vectors.py`).
        clip: height, width, observed_frames, future_frames, fps.
        policy_io: `action {horizon, fps, shift, dim}` and `proprio {horizon, fps, dim}`.
        anchor_fps: windows per second of video; None makes one per frame.

    Raises:
        StreamMismatch: the config does not fit the dataset, which stops a job.
        ValueError: the episode cannot be cut, and is skipped.
    """
    columns = cut_numbers(episode, dataset, policy_io, anchor_fps)
    rows, at = camera_rows(dataset.video), columns["anchor"]
    names = cameras(rows)
    observed = WindowSpec(names[0], clip.observed_frames, clip.fps, look="past")
    future = WindowSpec(names[0], clip.future_frames, clip.fps, shift=1 / clip.fps)
    times = np.concatenate([request_times(observed, at), request_times(future, at)], axis=1)
    shown = [nearest_indices(episode.streams[name].timestamps, times) for name in names]
    # A tiled frame is a combination of the cameras' frames; each is made once, in decoding order.
    used, clips = np.unique(
        np.stack(shown, -1).reshape(-1, len(names)), axis=0, return_inverse=True
    )
    frames = np.empty((len(used), clip.height, clip.width, 3), np.uint8)
    sizes: dict[str, tuple[int, ...]] = {}  # of each camera's pictures
    for start in range(0, len(used), _DECODE_FRAMES):
        part = used[start : start + _DECODE_FRAMES]
        pictures = {name: episode.streams[name].values.read(i) for name, i in zip(names, part.T)}
        for name, some in pictures.items():
            if sizes.setdefault(name, some.shape[1:3]) != some.shape[1:3]:
                both = f"{list(sizes[name])} and {list(some.shape[1:3])}"
                raise ValueError(f"{name} has pictures of different sizes, {both}")
        frames[start : start + len(part)] = tile(rows, pictures, clip.height, clip.width)
    asked = [(name, times, clip.fps) for name in names]
    return EpisodeWindows(
        frames,
        clips.reshape(times.shape),
        columns,
        texts_at(episode, at),
        sectioned=bool(episode.sections),
        findings=(*_gaps(episode, dataset, policy_io, at, asked), *_misfits(episode, dataset)),
    )


def check_finite(columns: Mapping[str, np.ndarray]) -> None:
    """ValueError if the numbers of an episode's windows are not all finite."""
    for name, column in columns.items():
        if not np.all(np.isfinite(column)):
            raise ValueError(f"{name} hold numbers that are not finite (NaN or infinity)")


def vector_streams(dataset: ConfigDict) -> tuple[str, ...]:
    """The streams that `dataset.action` and `dataset.proprio` read, bases last.

    Raises:
        ValueError: a description is wrong.
    """
    vectors = [parse(dataset[key], key) for key in ("action", "proprio")]
    found = [name for part in (streams, bases) for parts in vectors for name in part(parts)]
    return tuple(dict.fromkeys(found))


def _gaps(
    episode: Episode,
    dataset: ConfigDict,
    policy_io: ConfigDict,
    anchor: np.ndarray,
    asked: list[tuple[str, np.ndarray, float]],
) -> Iterator[str]:
    """A sentence for each stream that has no value near to where windows ask for one.

    `asked` holds the cameras, the instants that the windows ask of them, and their rate.
    """
    stamps = {name: stream.timestamps for name, stream in episode.streams.items()}
    for name, _, fps in asked:
        if np.median(usual_steps(stamps[name])) > _SLOW * NANOSECONDS / fps:
            yield f"{name} has fewer than clip.fps = {fps:g} frames per second: clips repeat them"
    for key, look in (("action", "future"), ("proprio", "past")):
        for part in parse(dataset[key], key):
            io = policy_io[key]
            if part.interpolation != "previous":  # a value that holds until the next one
                shift = io.get("shift", 0.0) + part.shift
                spec = WindowSpec(key, io.horizon, io.fps, shift, look=look)
                asked += [(name, request_times(spec, anchor), io.fps) for name in part.streams]
                asked += [(name, anchor, io.fps) for name in part.bases]
    paused = [name for name, times, fps in asked if in_pause(stamps[name], times, fps).any()]
    short = [name for name, _, fps in asked if is_outside(stamps[name], anchor, fps).any()]
    for name in dict.fromkeys(paused):
        yield (
            f"{name} pauses within an episode: what windows ask for in the pause is made of the "
            "values at its edges"
        )
    for name in dict.fromkeys(short):
        yield (
            f"{name} begins later than an episode or ends earlier: windows there repeat its first "
            "or last value as the present one"
        )


def _misfits(episode: Episode, dataset: ConfigDict) -> Iterator[str]:
    """A sentence for each stream whose numbers are not what its part of a vector takes them for.

    They jump between two values of one angle, or a gripper's leave the range that is said.
    """
    for key in ("action", "proprio"):
        for part in parse(dataset[key], key):
            if part.represent not in ("values", "delta", "gripper") or part.wrap is not None:
                continue
            for name in part.streams:
                values = np.asarray(episode.streams[name].values)
                flat = values.reshape(len(values), -1).astype(np.float64)
                columns = list(part.columns or range(flat.shape[1]))
                of, flat = f"{name}, columns {columns}" if part.columns else name, flat[:, columns]
                if part.represent == "gripper":
                    opening = (flat - part.closed) / (part.open - part.closed)
                    if (np.abs(opening - 0.5) > 0.5 + _BEYOND).mean() > _OFTEN:
                        yield (
                            f"{key}: {of} goes beyond closed = {part.closed:g} and open = "
                            f"{part.open:g}, to which it is clipped"
                        )
                    continue
                if part.represent == "values" and _are_lost_in_float32(flat):
                    yield (
                        f"{key}: {of} has numbers so large that float32, in which they are kept, "
                        "loses their changes; subtract a constant, or take them as a delta"
                    )
                if values.dtype.kind == "f":
                    for text in seams(flat):
                        yield f"{key}: of {of}, {_TIMES.sub('', text)}"


def _are_lost_in_float32(values: np.ndarray) -> bool:
    """Whether rounding [n, d] changes a large number about as much as a step does."""
    large = values[:, np.abs(values).max(axis=0) > _LARGE]
    with np.errstate(all="ignore"):  # whether numbers are finite is checked elsewhere
        error, steps = large - large.astype(np.float32), np.diff(large, axis=0)
        lost = np.mean(error**2, axis=0) > 0.1 * np.mean(steps**2, axis=0)
    return bool((lost & (steps != 0).any(axis=0)).any())


_LARGE = 2000.0  # smaller ones are rounded by less than 1e-4
_BEYOND, _OFTEN = 0.1, 0.01  # of a gripper's range; share of its values
_TIMES = re.compile(r" \(\d+ times\)")  # differs between episodes, which are to be counted


def texts_at(episode: Episode, anchor: np.ndarray) -> np.ndarray:
    """The instruction of each window, int64 [k]: an index into `episode.instructions`.

    It is one of those that belong to the window's anchor; several take turns.
    """
    if not episode.sections:
        return np.arange(len(anchor), dtype=np.int64) % max(len(episode.instructions), 1)
    number = {text: i for i, text in enumerate(episode.instructions)}
    choices = [episode.instructions_at(int(time)) for time in anchor]
    chosen = [number[texts[i % len(texts)]] for i, texts in enumerate(choices)]
    return np.asarray(chosen, np.int64)


def cut_numbers(
    episode: Episode, dataset: ConfigDict, policy_io: ConfigDict, anchor_fps: float | None = None
) -> dict[str, np.ndarray]:
    """The `columns` of `cut_episode` from the same arguments; no frame is decoded."""
    try:  # a fault of the config is the same for every episode, so it must stop the job
        names = cameras(camera_rows(dataset.video))
        action, proprio = parse(dataset.action, "action"), parse(dataset.proprio, "proprio")
        for parts, io in ((action, policy_io.action), (proprio, policy_io.proprio)):
            if parts:
                dims(parts, io.dim)
    except ValueError as error:
        raise StreamMismatch(f"dataset {dataset.name!r}: {error}") from None
    if episode.unknown_rate:
        raise StreamMismatch(f"dataset {dataset.name!r}: {episode.unknown_rate}")
    used = dict.fromkeys([*names, *vector_streams(dataset)])
    # What the source could not use concerns this episode alone, and only if it is asked for.
    if broken := [f"{n} ({why})" for n, why in episode.left_out.items() if n in used]:
        raise ValueError(f"the config asks for streams that cannot be used: {'; '.join(broken)}")
    if missing := [n for n in used if n not in episode.streams and n not in names]:
        raise StreamMismatch(
            f"dataset {dataset.name!r}: the config names the streams {missing}, but episode "
            f"{episode.id!r} has {sorted(episode.streams)}"
        )
    # Some episodes of a dataset have fewer cameras, so this concerns the episode alone.
    if absent := [name for name in names if name not in episode.cameras]:
        raise ValueError(f"no cameras {absent} (config.datasets...video), only {episode.cameras}")
    if short := [name for name in used if len(episode.streams[name].timestamps) <= 2]:
        raise ValueError(f"two or fewer samples in {short}")
    acting = [episode.streams[name].timestamps for name in streams(action)]
    at = anchors(episode.streams[names[0]].timestamps, acting, anchor_fps)
    if len(at) == 0:
        raise ValueError("the video and the actions do not overlap in time")
    for name in used:
        times = episode.streams[name].timestamps
        if at[-1] < times[0] or at[0] > times[-1]:
            raise ValueError(f"the video and {name} do not overlap in time")

    columns = {"anchor": at}
    for key, parts, io, look in (
        ("actions", action, policy_io.action, "future"),
        ("proprio", proprio, policy_io.proprio, "past"),
    ):
        if parts:
            window = dict(horizon=io.horizon, fps=io.fps, shift=io.get("shift", 0.0), look=look)
            try:
                values, padded = read(parts, episode.streams, at, io.dim, **window)
            except StreamMismatch as error:
                where = f"dataset {dataset.name!r}, episode {episode.id!r}"
                raise StreamMismatch(f"{where}: {error}") from None
            columns |= {key: values, f"{key}_padded": padded}
    return columns


# Several cameras tiled into one video.


def camera_rows(video: str | Sequence[str] | Sequence[Sequence[str]]) -> Rows:
    """The rows of cameras, top to bottom, that `dataset.video` in a config describes.

    Args:
        video: a stream; several, which fill a near-square grid row by row; or rows of streams,
            whose cameras share the width equally. "" is a black cell.
    """
    if isinstance(video, str):
        rows = ((video,),)
    elif all(isinstance(name, str) for name in video):
        wide = math.ceil(math.sqrt(len(video)))
        full = (*video, *[""] * (-len(video) % max(wide, 1)))
        rows = tuple(full[i : i + wide] for i in range(0, len(full), max(wide, 1)))
    else:
        rows = tuple((row,) if isinstance(row, str) else tuple(row) for row in video)
    names = [name for row in rows for name in row]
    if not any(names) or not all(rows) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            "video must be a stream's name, several, or rows of them, such as "
            f"(('front', 'side'), ('wrist',)), got {video!r}"
        )
    return rows


def cameras(rows: Rows) -> tuple[str, ...]:
    """The distinct streams of `rows`; the first one's timestamps are the clock of all."""
    return tuple(dict.fromkeys(name for row in rows for name in row if name))


def tile(rows: Rows, frames: Mapping[str, np.ndarray], height: int, width: int) -> np.ndarray:
    """Tiles the cameras' frames, each resized by area to fill its cell.

    Args:
        rows: from `camera_rows`.
        frames: camera -> uint8 [t, any h, any w, 3].
        height, width: size of the tiled frame, pixels.

    Returns:
        uint8 [t, height, width, 3]; a single camera's own array if it has that size.
    """
    if len(rows) == len(rows[0]) == 1:
        return resize_area(frames[rows[0][0]], height, width)
    whole = np.zeros((len(frames[cameras(rows)[0]]), height, width, 3), np.uint8)
    for names, top, bottom in zip(rows, *_edges(height, len(rows))):
        for name, left, right in zip(names, *_edges(width, len(names))):
            if name:
                cell = resize_area(frames[name], bottom - top, right - left)
                whole[:, top:bottom, left:right] = cell
    return whole


def _edges(length: int, parts: int) -> tuple[list[int], list[int]]:
    """Starts and ends of `parts` intervals of pixels, equal to within one pixel."""
    edges = [round(i * length / parts) for i in range(parts + 1)]
    return edges[:-1], edges[1:]
