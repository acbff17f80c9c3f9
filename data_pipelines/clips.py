"""One episode cut into clips: resized frames, which frames each window shows, and its numbers."""

import hashlib
from dataclasses import dataclass

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.episode import Episode
from data_pipelines.transforms import resize_area
from data_pipelines.windows import WindowSpec, anchors, nearest_indices, read_window, request_times

_DECODE_FRAMES = 64  # frames decoded at a time, so that full-size frames never pile up


class StreamMismatch(ValueError):
    """The config does not fit the dataset; unlike a broken file this stops the job."""


@dataclass(frozen=True)
class EpisodeWindows:
    """All windows of one episode.

    Attributes:
        frames: the frames in use, resized, uint8 [n, h, w, 3].
        clips: which frames each window shows, int64 [k, observed + future].
        columns: k rows each: anchor int64 (nanoseconds), and where the dataset has them actions
            float32 [k, H, A] and proprio float32 [k, P, D], raw units.
    """

    frames: np.ndarray
    clips: np.ndarray
    columns: dict[str, np.ndarray]

    def digest(self) -> str:
        """Hash of the content, for fingerprints."""
        state = hashlib.blake2b(digest_size=16)
        for array in (self.frames, self.clips, *self.columns.values()):
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
        dataset: names its streams: `video`, and `action` and `proprio` ("" where absent).
        clip: height, width, observed_frames, future_frames, fps.
        policy_io: `action {horizon, fps, shift, dim}` and `proprio {horizon, fps, dim}`; an
            `interpolation` in either replaces the nearest value (see `WindowSpec`).
        anchor_fps: windows per second of video; None makes one per frame.

    Raises:
        StreamMismatch: if the config names streams or dimensions that the episode lacks.
        ValueError: if the episode is too short to be cut.
    """
    names = [name for name in (dataset.video, dataset.action, dataset.proprio) if name]
    missing = [name for name in names if name not in episode.streams]
    if missing:
        raise StreamMismatch(
            f"dataset {dataset.name!r}: the config names the streams {missing}, but episode "
            f"{episode.id!r} has {sorted(episode.streams)}"
        )
    short = [name for name in names if len(episode.streams[name].timestamps) <= 2]
    if short:
        raise ValueError(f"two or fewer samples in {short}")
    video = episode.streams[dataset.video]
    acting = [episode.streams[dataset.action].timestamps] if dataset.action else []
    at = anchors(video.timestamps, acting, anchor_fps)
    if len(at) == 0:
        raise ValueError("the video and the actions do not overlap in time")

    columns = {"anchor": at}
    if dataset.action:
        columns["actions"] = _numbers(episode, dataset.action, policy_io.action, "future", at)
    if dataset.proprio:
        columns["proprio"] = _numbers(episode, dataset.proprio, policy_io.proprio, "past", at)

    observed = WindowSpec(dataset.video, clip.observed_frames, clip.fps, look="past")
    future = WindowSpec(dataset.video, clip.future_frames, clip.fps, shift=1 / clip.fps)
    times = np.concatenate([request_times(observed, at), request_times(future, at)], axis=1)
    used, clips = np.unique(nearest_indices(video.timestamps, times), return_inverse=True)
    parts = [used[i : i + _DECODE_FRAMES] for i in range(0, len(used), _DECODE_FRAMES)]
    frames = [resize_area(video.values.read(part), clip.height, clip.width) for part in parts]
    return EpisodeWindows(np.concatenate(frames), clips.reshape(times.shape), columns)


def _numbers(episode: Episode, name: str, io: ConfigDict, look: str, at: np.ndarray) -> np.ndarray:
    interpolation = io.get("interpolation", "nearest")
    spec = WindowSpec(name, io.horizon, io.fps, io.get("shift", 0.0), interpolation, look)
    values, _ = read_window(episode.streams[name], spec, at)
    values = values.reshape(len(at), io.horizon, -1).astype(np.float32)
    if values.shape[-1] != io.dim:
        raise StreamMismatch(
            f"dataset {episode.source!r}: stream {name!r} of episode {episode.id!r} has "
            f"{values.shape[-1]} dimensions, but policy_io says {io.dim}"
        )
    return values
