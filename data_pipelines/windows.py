"""Windows by time: the values of a stream around an anchor, whatever the stream's rate.

A window has `horizon` instants, 1/fps apart, that end at the anchor (observations) or start
`shift` seconds after it (actions, future frames). Each instant gets the nearest, previous or
interpolated value of the stream; instants outside the stream get the edge value and are marked as
padding. Semantics: `ChunkReader` of the release.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import scipy  # submodules are imported on first use
from numpy.lib.stride_tricks import sliding_window_view

from data_pipelines.episode import NANOSECONDS, Stream

if TYPE_CHECKING:
    from scipy.spatial.transform import Rotation

_NEIGHBOURS = 5  # steps on either side, for the step that is usual there

Interpolation = Literal["nearest", "previous", "linear", "pose", "quaternion"]


@dataclass(frozen=True)
class WindowSpec:
    """A request for part of one stream around an anchor."""

    stream: str  # its name in `Episode.streams`
    horizon: int  # number of instants
    fps: float  # instants per second
    shift: float = 0.0  # seconds added to every instant
    # Between two stored values. "pose" interpolates 4x4 matrices (translation linearly, rotation by
    # slerp), "quaternion" xyzw quaternions (slerp).
    interpolation: Interpolation = "nearest"
    # "past" windows end at the anchor, "future" windows start there (both plus shift).
    look: Literal["past", "future"] = "future"

    def __post_init__(self) -> None:
        if self.horizon < 1 or self.fps <= 0:
            raise ValueError(
                f"Window of stream {self.stream!r} has horizon {self.horizon} and fps {self.fps}; "
                "the horizon must be at least 1 and fps positive."
            )
        if self.interpolation not in get_args(Interpolation) or self.look not in ("past", "future"):
            raise ValueError(
                f"Window of stream {self.stream!r} has interpolation {self.interpolation!r} and "
                f"look {self.look!r}; choose from {get_args(Interpolation)}, ('past', 'future')."
            )


def anchors(
    video: np.ndarray,
    actions: Sequence[np.ndarray] = (),
    max_fps: float | None = None,
    ranges: Sequence[tuple[int, int]] | None = None,
) -> np.ndarray:
    """The instants at which an episode can be cut into windows.

    With action streams: every video timestamp between the latest first and the earliest last
    action timestamp (the release's window index, padded tails included). Without: every frame.
    The release's video-only stage draws anchors from `[0, n + step * (observed - 1))`; at frames,
    its indices equal those of a "nearest" window. Its few anchors past the last frame (windows that
    end in a still image) are left out.

    Args:
        video: int64 nanoseconds [n].
        actions: int64 nanoseconds of each action stream.
        max_fps: the most anchors per second; None keeps all.
        ranges: parts [start, end) in nanoseconds, in one of which an anchor must lie; None for
            everywhere.

    Returns:
        int64 nanoseconds [k]; empty when the streams do not overlap, or not within the ranges.
    """
    chosen = np.asarray(video, np.int64)
    if actions:
        first = max(times[0] for times in actions)
        last = min(times[-1] for times in actions)
        chosen = chosen[(chosen >= first) & (chosen <= last)]
    if ranges is not None:
        inside = [(chosen >= start) & (chosen < end) for start, end in ranges]
        chosen = chosen[np.any(inside, axis=0)] if inside else chosen[:0]
    if max_fps is None or len(chosen) == 0:
        return chosen
    # One anchor per period; a tenth of a period of slack absorbs jitter in the timestamps.
    period = np.floor((chosen - chosen[0]) * (max_fps / NANOSECONDS) + 0.1).astype(np.int64)
    return chosen[np.unique(period, return_index=True)[1]]


def request_times(spec: WindowSpec, anchor: np.ndarray | int) -> np.ndarray:
    """The instants of a window: int64 nanoseconds `[*anchor.shape, horizon]`."""
    duration = math.ceil((spec.horizon - 1) / spec.fps * NANOSECONDS)
    start = round(spec.shift * NANOSECONDS) - (duration if spec.look == "past" else 0)
    # Offsets are added as integers: float64 nanoseconds since 1970 are only exact to 256 ns.
    offsets = np.rint(np.linspace(start, start + duration, spec.horizon)).astype(np.int64)
    return np.asarray(anchor, np.int64)[..., None] + offsets


def nearest_indices(timestamps: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Index of the stored timestamp nearest to each instant; the earlier one on a tie."""
    after = np.searchsorted(timestamps, times).clip(1, max(len(timestamps) - 1, 1))
    after = np.minimum(after, len(timestamps) - 1)
    before = np.maximum(after - 1, 0)
    return np.where(times - timestamps[before] <= timestamps[after] - times, before, after)


def previous_indices(timestamps: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Index of the last stored timestamp at or before each instant; 0 before the first."""
    return np.maximum(np.searchsorted(timestamps, times, side="right") - 1, 0)


def usual_steps(timestamps: np.ndarray) -> np.ndarray:
    """The step that is usual around each step between two of n timestamps, float64 [n - 1].

    It is the median of the neighbours and not of the whole stream, whose rate may change.
    """
    steps = np.diff(timestamps)
    if len(steps) <= _NEIGHBOURS:
        return np.full(len(steps), np.median(steps) if len(steps) else 0.0)
    around = np.pad(steps, _NEIGHBOURS, "reflect")
    medians = np.median(sliding_window_view(around, 2 * _NEIGHBOURS + 1), axis=-1)
    # Where two steps alternate, so do the medians: the longer step is a usual one, too.
    return sliding_window_view(np.pad(medians, 1, "edge"), 3).max(axis=-1)


def in_pause(timestamps: np.ndarray, times: np.ndarray, fps: float) -> np.ndarray:
    """Where an instant within a stream is far from every stored value: bool [*times.shape].

    Far is more than half of 1/fps and as if three values in a row were lost.
    """
    if len(timestamps) < 2:
        return np.zeros(np.shape(times), bool)
    before = previous_indices(timestamps, times).clip(0, len(timestamps) - 2)
    distance = np.minimum(times - timestamps[before], timestamps[before + 1] - times)
    usual = usual_steps(timestamps)[before]
    return distance > np.maximum(1.5 * usual, NANOSECONDS / fps / 2)


def is_outside(timestamps: np.ndarray, times: np.ndarray, fps: float) -> np.ndarray:
    """Where an instant is far, as of `in_pause`, before a stream or after it: bool [*times.shape].

    A window's instants may be; its anchor is only if the stream begins late or ends early.
    """
    usual = usual_steps(timestamps)
    first, last = (usual[0], usual[-1]) if len(usual) else (0.0, 0.0)
    least = NANOSECONDS / fps / 2
    before, after = timestamps[0] - times, times - timestamps[-1]
    return (before > np.maximum(1.5 * first, least)) | (after > np.maximum(1.5 * last, least))


def read_window(
    stream: Stream, spec: WindowSpec, anchor: np.ndarray | int
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts the windows of one or many anchors out of a stream.

    Args:
        stream: values [n, ...], an array or a frame reader.
        spec: the window; its `stream` field is only used in error messages.
        anchor: int64 nanoseconds, any shape.

    Returns:
        values `[*anchor.shape, horizon, ...]`, and a bool mask `[*anchor.shape, horizon]` that is
        true where the instant is outside the stream and the edge value was repeated.
    """
    times = request_times(spec, anchor)
    stamps = np.asarray(stream.timestamps)
    padded = (times < stamps[0]) | (times > stamps[-1])
    if spec.interpolation == "nearest":
        values = _take(stream.values, nearest_indices(stamps, times))
    elif spec.interpolation == "previous":
        values = _take(stream.values, previous_indices(stamps, times))
    else:
        values = _interpolate(stamps, np.asarray(stream.values), times, spec)
    return values, padded


def _take(values, indices: np.ndarray) -> np.ndarray:
    if isinstance(values, np.ndarray):
        return values[indices]
    # Decoding is expensive: read each frame once, in order.
    unique, inverse = np.unique(indices, return_inverse=True)
    return values.read(unique)[inverse.reshape(indices.shape)]


def _interpolate(
    stamps: np.ndarray, values: np.ndarray, times: np.ndarray, spec: WindowSpec
) -> np.ndarray:
    expected = {"pose": (4, 4), "quaternion": (4,)}.get(spec.interpolation)
    if expected and values.shape[1:] != expected:
        raise ValueError(
            f"Stream {spec.stream!r} has values of shape {values.shape[1:]}, but interpolation "
            f"{spec.interpolation!r} needs {expected}."
        )
    dtype = values.dtype if np.issubdtype(values.dtype, np.floating) else np.float32
    times = np.clip(times, stamps[0], stamps[-1])
    before = np.minimum(previous_indices(stamps, times), max(len(stamps) - 2, 0))
    after = np.minimum(before + 1, len(stamps) - 1)
    gap = np.maximum(stamps[after] - stamps[before], 1)
    weight = (times - stamps[before]) / gap
    if spec.interpolation == "quaternion":
        stored = scipy.spatial.transform.Rotation.from_quat(values)
        turned = stored[before.ravel()] * _part_way(stored, before, weight)
        return turned.as_quat().reshape(*weight.shape, 4).astype(dtype)
    start, end = values[before].astype(np.float64), values[after].astype(np.float64)
    blend = weight.reshape(weight.shape + (1,) * (values.ndim - 1))
    mixed = start + blend * (end - start)
    if spec.interpolation == "pose":
        stored = scipy.spatial.transform.Rotation.from_matrix(values[:, :3, :3])
        turned = stored.as_matrix()[before.ravel()] @ _part_way(stored, before, weight).as_matrix()
        mixed[..., :3, :3] = turned.reshape(*weight.shape, 3, 3)
    return mixed.astype(dtype)


def _part_way(stored: "Rotation", before: np.ndarray, weight: np.ndarray) -> "Rotation":
    """The share `weight` of the rotation from the stored one `before` to the next (slerp)."""
    # Computed once per neighbouring pair, because an instant between them is in many windows.
    after = np.minimum(np.arange(len(stored)) + 1, len(stored) - 1)
    turn = (stored.inv() * stored[after]).as_rotvec()
    return type(stored).from_rotvec(turn[before.ravel()] * weight.reshape(-1, 1))
