"""Cutting an episode into windows: its frames, resized and tiled, and its vectors.

`cameras.py` says how cameras' frames become pictures, `windows.py` defines a window's instants,
`vectors.py` its vectors.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from data_pipelines import findings
from data_pipelines.augment import Augment, kept_size, window_name
from data_pipelines.cameras import View, camera_rows, cameras, dataset_views, view_cameras
from data_pipelines.clip import VIDEO
from data_pipelines.episode import Episode
from data_pipelines.findings import BLACK, Asked
from data_pipelines.frames import resize_area
from data_pipelines.representations import Part
from data_pipelines.vectors import StreamMismatch, bases, dims, parse, read, streams
from data_pipelines.windows import (
    WindowSpec,
    anchors,
    nearest_indices,
    request_times,
)

_DECODE_FRAMES = 4  # at a time: still in the processor's cache when they are resized


class Shown(NamedTuple):
    """What the windows of an episode show of a view."""

    frames: np.ndarray  # uint8 [n, h, w, 3], resized, several cameras tiled into one
    clips: np.ndarray  # each window's indices into `frames`, int64 [k, any]

    def window(self, index: int) -> np.ndarray:
        """The pictures of a window: uint8 [any, h, w, 3]."""
        return self.frames[self.clips[index]]


@dataclass(frozen=True)
class Variants:
    """What the further variants of an episode's windows are made from; see `augment.py`."""

    augment: Augment
    dataset: str
    episode: str
    views: dict[str, View]
    # View -> camera -> its frames as decoded, uint8 [n, any h, any w, 3], beside `Shown.frames`.
    frames: dict[str, dict[str, np.ndarray]]

    def pictures(
        self, view: str, frames: np.ndarray, anchor: int, variant: int
    ) -> np.ndarray | None:
        """Those of a view at indices into `Shown.frames`; None of a view without a camera."""
        if view not in self.frames:
            return None
        draws = {
            name: self.augment.draw(variant, window_name(self.dataset, self.episode, anchor, name))
            for name in self.frames[view]
        }
        shown = {name: pictures[frames] for name, pictures in self.frames[view].items()}
        return self.views[view].picture(shown, draws)


@dataclass(frozen=True)
class EpisodeWindows:
    """All windows of one episode."""

    video: Shown  # observed and future frames
    views: dict[str, Shown]  # observed frames of every other view
    # anchor int64 [k] (nanoseconds), and where the dataset has them actions float32 [k, H, A] and
    # proprio float32 [k, P, D], not normalised, with actions_padded bool [k, H] and proprio_padded
    # bool [k, P], true where an edge value was repeated.
    columns: dict[str, np.ndarray]

    # Each window's instruction, an index into those of the episode, int64 [k].
    texts: np.ndarray
    sectioned: bool = False  # whether the task changes during the episode
    findings: tuple[str, ...] = ()  # as of `Episode`, about the windows
    variants: Variants | None = None  # None: there is variant 0 alone

    def pictures(self, index: int, variant: int = 0) -> dict[str, np.ndarray]:
        """The pictures of a window in a variant by view, uint8 [any, h, w, 3]."""
        shown = {VIDEO: self.video, **self.views}
        if variant == 0:
            return {name: one.window(index) for name, one in shown.items()}
        at = int(self.columns["anchor"][index])
        made = {}
        for name, one in shown.items():
            varied = self.variants.pictures(name, one.clips[index], at, variant)
            made[name] = one.window(index) if varied is None else varied
        return made

    def digest(self) -> str:
        """Hash of the content; of the texts only where they are not the episode's own in turn."""
        state = hashlib.blake2b(digest_size=16)
        texts = (self.texts,) if self.sectioned else ()
        views = [array for name in sorted(self.views) for array in self.views[name]]
        for array in (*self.video, *self.columns.values(), *texts, *views):
            state.update(np.ascontiguousarray(array))
        return state.hexdigest()


def cut_episode(
    episode: Episode,
    dataset: ConfigDict,
    clip: ConfigDict,
    policy_io: ConfigDict,
    anchor_fps: float | None = None,
    *,
    variants: bool = False,
) -> EpisodeWindows:
    """Decodes an episode's video once, in order, and cuts it into windows.

    Args:
        episode: the episode.
        dataset: `video` and `views` (see `cameras.py`), `action` and `proprio` (see `vectors.py`),
            `augment` (see `augment.py`).
        clip: height, width, observed_frames, future_frames, fps, views.
        policy_io: `action {horizon, fps, shift, dim}` and `proprio {horizon, fps, dim}`.
        anchor_fps: windows per second of video; None makes one per frame.
        variants: also keep the frames that variants of `dataset.augment` are made from, which take
            memory until the episode's windows are read.

    Raises:
        StreamMismatch: the config does not fit the dataset, which stops a job.
        ValueError: the episode cannot be cut, and is skipped.
    """
    columns = cut_numbers(episode, dataset, policy_io, anchor_fps, clip)
    at = columns["anchor"]
    video, *others = dataset_views(dataset, clip)
    clock = video.cameras[0]
    observed = WindowSpec(clock, clip.observed_frames, clip.fps, look="past")
    future = WindowSpec(clock, clip.future_frames, clip.fps, shift=1 / clip.fps)
    before = request_times(observed, at)
    times = np.concatenate([before, request_times(future, at)], axis=1)
    augment = Augment.of(dataset)
    reader = _Reader(episode, keep=variants and augment.variants > 1)
    shown = reader.shown(video, times)
    views = {view.name: reader.shown(view, before) for view in others}
    asked = [Asked(name, wanted, clip.fps) for name, wanted in reader.wanted.items()]
    texts = texts_at(episode, at)
    kept = None
    if reader.keep:
        by_name = {view.name: view for view in (video, *others)}
        kept = Variants(augment, dataset.name, episode.id, by_name, reader.kept)
    given = [(episode.instructions or ("",))[i].strip() for i in np.unique(texts)]
    return EpisodeWindows(
        shown,
        views,
        columns,
        texts,
        sectioned=bool(episode.sections),
        findings=(
            *(f"{name} is black throughout an episode" for name in reader.black),
            *findings.in_texts(given),
            *findings.in_times(episode, dataset, policy_io, at, asked),
            *findings.in_numbers(episode, dataset),
        ),
        variants=kept,
    )


class _Reader:
    """Reads the pictures of an episode's views; notes the cameras that are always black.

    With `keep` it also keeps the frames that they are made from.
    """

    def __init__(self, episode: Episode, keep: bool = False):
        self._episode, self._sizes, self._seen = episode, {}, set[str]()
        self.keep = keep
        self.kept: dict[str, dict[str, np.ndarray]] = {}  # view -> camera -> frames
        self.wanted: dict[str, np.ndarray] = {}  # camera -> the first view's times

    @property
    def black(self) -> list[str]:
        """The cameras that have shown nothing but black."""
        return [name for name in self.wanted if name not in self._seen]

    def shown(self, view: View, times: np.ndarray) -> Shown:
        """A view at `times` [k, any]."""
        names = view.cameras
        if not names:
            black = np.zeros((1, view.height, view.width, 3), np.uint8)
            return Shown(black, np.zeros(times.shape, np.int64))
        streams = [self._episode.streams[name] for name in names]
        for name in names:
            self.wanted.setdefault(name, times)
        nearest = [nearest_indices(stream.timestamps, times) for stream in streams]
        # A picture is a combination of the cameras' frames; each is made once, in decoding order.
        used, clips = np.unique(
            np.stack(nearest, -1).reshape(-1, len(names)), axis=0, return_inverse=True
        )
        frames = np.empty((len(used), view.height, view.width, 3), np.uint8)
        for start in range(0, len(used), _DECODE_FRAMES):
            part = used[start : start + _DECODE_FRAMES]
            pictures = {name: s.values.read(i) for name, s, i in zip(names, streams, part.T)}
            for name, some in pictures.items():
                self._note(name, some)
            frames[start : start + len(part)] = view.picture(pictures)
            if self.keep:
                self._keep(view, pictures, start, len(used))
        return Shown(frames, clips.reshape(times.shape))

    def _keep(self, view: View, pictures: Mapping[str, np.ndarray], start: int, n: int) -> None:
        """Keeps frames number `start` and following of `n`, as small as their variants permit."""
        kept = self.kept.setdefault(view.name, {})
        for name, some in pictures.items():
            size = kept_size(some.shape[1:3], view.crop, (view.height, view.width))
            if name not in kept:
                kept[name] = np.empty((n, *size, 3), np.uint8)
            kept[name][start : start + len(some)] = resize_area(some, *size)

    def _note(self, camera: str, pictures: np.ndarray) -> None:
        size = pictures.shape[1:3]
        if self._sizes.setdefault(camera, size) != size:
            both = f"{list(self._sizes[camera])} and {list(size)}"
            raise ValueError(f"{camera} has pictures of different sizes, {both}")
        if camera not in self._seen and pictures.mean() >= BLACK:
            self._seen.add(camera)


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
    episode: Episode,
    dataset: ConfigDict,
    policy_io: ConfigDict,
    anchor_fps: float | None = None,
    clip: ConfigDict | None = None,
) -> dict[str, np.ndarray]:
    """The `columns` of `cut_episode` from the same arguments; no frame is decoded.

    Without `clip` only the cameras of the predicted view need to be there.
    """
    try:  # a fault of the config is the same for every episode, so it must stop the job
        names = cameras(camera_rows(dataset.video))
        if clip is not None:
            names = view_cameras(dataset_views(dataset, clip))
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
        raise ValueError(
            f"config.datasets.{dataset.name}.{_setting(dataset, absent)} asks for the cameras "
            f"{absent}, but there are only {list(episode.cameras)}"
        )
    if short := [name for name in used if len(episode.streams[name].timestamps) <= 2]:
        raise ValueError(f"two or fewer samples in {short}")
    acting = [episode.streams[name].timestamps for name in streams(action)]
    at = anchors(episode.streams[names[0]].timestamps, acting, anchor_fps, episode.ranges)
    if len(at) == 0:
        where = "" if episode.ranges is None else " within the ranges that are to be used"
        raise ValueError(f"the video and the actions do not overlap in time{where}")
    for name in used:
        times = episode.streams[name].timestamps
        if at[-1] < times[0] or at[0] > times[-1]:
            raise ValueError(f"the video and {name} do not overlap in time")

    try:
        check_names([*action, *proprio], episode.names)
    except ValueError as error:
        raise StreamMismatch(f"dataset {dataset.name!r}: {error}") from None
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


def _setting(dataset: ConfigDict, absent: Sequence[str]) -> str:
    """The setting that asks for cameras: "video" or "views"."""
    return "video" if set(absent) & set(cameras(camera_rows(dataset.video))) else "views"


def check_names(parts: Sequence[Part], names: Mapping[str, Sequence[str]]) -> None:
    """ValueError if the data name the columns of a part otherwise than the config uses them.

    Args:
        parts: of a vector.
        names: stream -> what its numbers are called; see `Episode.names`.
    """

    def taken(stream: str, columns: Sequence[int] | None) -> Sequence[str]:
        known = names.get(stream, ())
        if columns is None or max(columns) >= len(known):
            return known if columns is None else ()
        return [known[i] for i in columns]

    for part in parts:
        sides = [(s, taken(s, part.columns)) for s in part.streams]
        others = [(s, taken(s, part.base_columns)) for s in part.bases]
        for (stream, ours), (base, theirs) in zip(sides, others):
            for mine, other in zip(ours, theirs):
                if mine != other and mine in names[base]:
                    raise ValueError(
                        f"{mine!r} of {stream} would be relative to {other!r} of {base}, which has "
                        f"{mine!r} in column {list(names[base]).index(mine)}; set base_columns, or "
                        "correct the names"
                    )
        kind, _, order = part.rotation.partition("_")
        for stream, called in (*sides[-1:], *others[-1:]) if kind == "quaternion" else ():
            said = "".join(name[-1:].lower() for name in called[-4:])
            if sorted(said) == sorted(order) and said != order:
                raise ValueError(
                    f"the quaternion of {stream} is {list(called[-4:])} by its names, but the "
                    f"config says {part.rotation}; correct one of them"
                )
