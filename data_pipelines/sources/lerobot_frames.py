"""When the rows of a LeRobot episode were recorded, and which frames of a video belong to them.

Each fact has several sources in a dataset: times the column `timestamp`, `frame_index` and `fps`;
frames the ranges in the list of episodes, the frames of the file and the rows. They are compared.
What rounding explains is settled silently, what the other sources settle is a finding, and
anything else an error of the episode.
"""

from dataclasses import dataclass

import numpy as np

from data_pipelines.episode import NANOSECONDS
from data_pipelines.windows import nearest_indices

_TOLERANCE_S = 1e-4  # LeRobot's own, between a row's timestamp and frame_index / fps
_JITTER = 0.1  # by which the median gap of the rows may differ from 1 / fps
_SURPLUS = (
    "the video has more frames than rows; timestamp says which are those of the rows, and nothing "
    "confirms it"
)
_OWN_CLOCK = "timestamp is not frame_index / fps; timestamp was taken"
_UNITS = {1e3: "milliseconds", 1e6: "microseconds", 1e9: "nanoseconds"}


@dataclass(frozen=True)
class RowTimes:
    """The times of an episode's rows."""

    times: np.ndarray  # int64 nanoseconds [n], increasing, from about 0
    offset: float  # seconds of the first row before half a frame or more was taken off
    findings: tuple[str, ...]


def row_times(
    stored: np.ndarray | None, index: np.ndarray | None, rows: int, fps: float
) -> RowTimes:
    """The times of the rows: frame_index / fps, unless the timestamps say something else.

    Args:
        stored: the column `timestamp` [n] in its own dtype.
        index: the column `frame_index` [n].
        rows: n.
        fps: of meta/info.json.

    Raises:
        ValueError: if the timestamps are not finite, do not increase, or do not fit `fps`.
    """
    numbered = index is not None and bool((np.diff(index) > 0).all())
    if not numbered and stored is None:
        raise ValueError("its rows have neither timestamp nor an increasing frame_index")
    regular = (index if numbered else np.arange(rows)) / fps
    if stored is None:
        findings = ("the rows have no timestamp; frame_index / fps was taken",)
        seconds = regular
    else:
        seconds, findings = _compare(stored, regular, fps)
    if not numbered:
        findings += ("frame_index is missing or does not increase; timestamp was taken",)
    offset = float(seconds[0])
    if abs(offset) < 0.5 / fps:
        offset = 0.0
    times = np.round((seconds - offset) * NANOSECONDS).astype(np.int64)
    return RowTimes(times, offset, findings)


def _compare(
    stored: np.ndarray, regular: np.ndarray, fps: float
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Seconds, and findings."""
    values, period = stored.astype(np.float64), 1 / fps
    if not np.isfinite(values).all():
        raise ValueError("timestamp holds NaN or infinity; record the episode again")
    # The distance between two numbers of this size: 128 s for seconds since 1970 in float32.
    digit = float(np.spacing(np.abs(stored).max())) if stored.dtype.kind == "f" else 1.0
    if np.abs(values - regular).max() < max(_TOLERANCE_S, digit) and digit < period / 2:
        return regular, ()
    passed, even, steps = values - values[0], regular - regular[0], np.diff(values)
    for unit in (1.0, *_UNITS):
        allowed = max(_TOLERANCE_S, 2 * digit / unit)
        if np.abs(passed / unit - even).max() >= allowed:
            continue
        if digit / unit >= period / 2:
            coarse = f"timestamp is too coarse in {stored.dtype} to tell the rows apart"
            return even, (f"{coarse}; frame_index / fps was taken",)
        if unit == 1 and abs(values[0]) < period / 2:
            return values, ()
        return even + values[0] / unit, _in_unit(unit)
    if (late := np.flatnonzero(steps <= 0)).size:
        i = int(late[0])
        raise ValueError(
            f"timestamps must strictly increase, but row {i} has {values[i]:.9g} and the next one "
            f"{values[i + 1]:.9g}; record the episode again"
        )
    gap = float(np.median(steps)) if len(steps) else period
    for unit in (1.0, *_UNITS):
        if abs(gap / unit - period) <= max(_JITTER * period, digit / unit):
            return values / unit, _in_unit(unit) or (_OWN_CLOCK,)
    raise ValueError(
        f"the timestamps of its rows are {gap:.6g} s apart, but fps of meta/info.json is {fps:g}, "
        f"which is {period:.6g} s; correct one of them"
    )


def _in_unit(unit: float) -> tuple[str, ...]:
    if unit == 1:
        return ()
    return (f"timestamp is in {_UNITS[unit]}, as fps of meta/info.json shows; it was divided",)


@dataclass(frozen=True)
class Part:
    """The frames of a video file from an episode's first one up to the next episode's."""

    first: int
    stop: int
    moved: bool  # they were counted, because the listed ranges do not fit the file
    loose: bool  # the file goes on after its last episode
    fault: bool  # nothing says which frames are the episode's


def locate(
    times: np.ndarray, starts: np.ndarray, ends: np.ndarray, lengths: np.ndarray, fps: float
) -> list[Part]:
    """The frames of every episode in one video file of version 3.

    Each starts at the frame that is nearest to its `from_timestamp`. This fits if every frame is
    within half a frame, and no episode reaches into the next or beyond the end. Otherwise:

    1. If there are as many frames as rows and the order of the episodes is certain, the frames are
       counted off: a writer whose durations are a frame too long, or that did not begin at 0 again
       in a new file.
    2. If the ranges meet and cover the file, single episodes have more rows than frames.
    3. Else the episodes are right for which counting and the ranges agree.

    Args:
        times: seconds of the file's frames, increasing.
        starts, ends: `from_timestamp` and `to_timestamp` of its episodes; `ends` may be NaN.
        lengths: their rows.
        fps: of the rows.
    """
    order = np.argsort(starts, kind="stable")
    starts, ends, lengths = starts[order], ends[order], lengths[order]
    period, count = 1 / fps, len(times)
    first = nearest_indices(times, starts)
    gap = float(np.median(np.diff(times))) if count > 1 else period
    ratio = max(period / gap, 1.0)  # frames per row
    ratio = round(ratio) if abs(ratio - round(ratio)) < _JITTER else ratio
    slots = lengths * ratio
    counted = np.rint(np.cumsum(slots) - slots).astype(np.int64)
    stop = np.append(first[1:], count)
    # The last row of an episode needs one frame only.
    short = stop - first < slots - ratio + 1 - _JITTER
    misfits = short.copy()
    misfits[1:] |= short[:-1]  # of two that overlap, either may be the wrong one
    misfits |= np.abs(times[first] - starts) > period / 2
    moved = np.zeros(len(order), bool)
    if misfits.any():
        half = period / 2
        shift = starts - times[np.minimum(counted, count - 1)]
        # Every range begins within half an episode of where the one before lets it begin.
        apart, steps = np.diff(starts) > half, np.abs(np.diff(shift)) < lengths[:-1] * half
        ordered = apart.all() and steps.all()
        # From the first frame over every end and the next start to the end of the last frame.
        borders = np.concatenate([times[:1], ends]) - np.concatenate([starts, times[-1:] + gap])
        covered = (np.abs(borders) <= half).all()
        # Ranges that cover the file and are not as long as the rows: one lost a frame that another
        # has too many.
        equal = not (np.abs(ends - starts - lengths * period) > half).any()
        uncounted = first != counted
        if count == slots.sum() and ordered and (equal or not covered):
            first, stop, moved = counted, np.append(counted[1:], count), uncounted
            misfits = np.zeros_like(moved)
        elif covered:
            misfits = short
        else:
            misfits |= uncounted
    surplus = stop - first - slots
    loose = np.full(
        len(order), len(order) > 1 and surplus[-1] > max(surplus[:-1].max(), 0) + _JITTER
    )
    columns = (first, stop, moved, loose, misfits)
    return [Part(*values) for values in zip(*(c[np.argsort(order)].tolist() for c in columns))]


@dataclass(frozen=True)
class Choice:
    """The frames of one episode."""

    first: int
    stop: int
    by_number: bool  # their times are those of the rows, not their own
    findings: tuple[str, ...] = ()


def choose(times: np.ndarray, rows: RowTimes, fps: float) -> Choice:
    """The frames that were recorded with the rows; a LeRobot dataset has one per row.

    Args:
        times: seconds of the frames that may belong to the episode, increasing.
        rows: their rows.
        fps: of the rows.

    Raises:
        ValueError: if there are too few frames, or they cannot be assigned.
    """
    count, period = len(rows.times), 1 / fps
    if len(times) < count:
        raise ValueError(f"it has {len(times)} of the {count} frames; copy or encode it again")
    passed = times - times[0]
    expected = (rows.times - rows.times[0]) / NANOSECONDS
    together = bool(np.abs(passed[:count] - expected).max() < period / 2)
    # A wall clock and a constant rate drift apart, but frame k was stored with row k.
    drifts = "the times of the video differ from those of the rows; frames were matched by number"
    if len(times) == count:
        return Choice(0, count, not together, () if together else (drifts,))
    # Rows that start later than the video are a part of it; a clock that the video cannot have,
    # such as the time of day, says nothing about that.
    offset = rows.offset if 0 <= rows.offset < passed[-1] else 0.0
    for begin in (offset, 0.0):  # 0: the rows of a later episode that did not begin at 0 again
        instants = expected + begin
        near = nearest_indices(passed, instants)
        if np.abs(passed[near] - instants).max() < period / 2 and (np.diff(near) > 0).all():
            # The video may have a higher rate than the rows: up to the end of the last row.
            gap = float(np.median(np.diff(passed)))
            stop = int(np.searchsorted(passed, instants[-1] + period - gap / 2))
            stop = max(stop, int(near[-1]) + 1)
            surplus = near[0] > 0 or stop < len(times)
            return Choice(int(near[0]), stop, False, (_SURPLUS,) if surplus else ())
    steady = np.abs(
        np.concatenate([np.diff(times), np.diff(rows.times) / NANOSECONDS]) / period - 1
    )
    if offset or steady.max(initial=0) > _JITTER:
        raise ValueError(
            f"it has {len(times)} frames for {count} rows, and their times do not agree; encode it "
            "again"
        )
    return Choice(0, count, True, (_SURPLUS, drifts))
