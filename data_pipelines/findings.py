"""What is odd about the streams that windows are made of, in sentences that are counted.

Nothing of this stops a job. Equal text means equal findings, so no sentence has a number that
differs between episodes.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.episode import NANOSECONDS, ODD_TEXT, Episode
from data_pipelines.representations import Part, seams
from data_pipelines.vectors import parse, streams
from data_pipelines.windows import WindowSpec, in_pause, is_outside, request_times, usual_steps

BLACK = 4.0  # mean grey level below which a picture is black
_SLOW = 1.5  # times 1/fps between a camera's frames
_SAME_RATE = 1.25  # ratio of two rates from which they differ
_BEYOND, _OFTEN = 0.1, 0.01  # of a gripper's range; share of its values
_LARGE = 2000.0  # float32 rounds smaller numbers by less than 1e-4
_COUNT = re.compile(r" \(\d+ times\)")  # differs between episodes


class Asked(NamedTuple):
    """The instants [k, n] in ns that the windows ask of a stream, and their rate per second."""

    stream: str
    times: np.ndarray
    fps: float


def in_texts(texts: Sequence[str]) -> Iterator[str]:
    """Findings of the instructions of an episode's windows."""
    if not all(texts):
        yield "there are windows without an instruction; they have the empty text"
    if any(map(ODD_TEXT.fullmatch, texts)):
        yield "instructions are Python's b'...', [...], None or nan; correct the texts"


def in_times(
    episode: Episode,
    dataset: ConfigDict,
    policy_io: ConfigDict,
    anchor: np.ndarray,
    cameras: Sequence[Asked],
) -> Iterator[str]:
    """A sentence for each stream that has no value near to where windows ask for one.

    `anchor` has the windows' present instants, int64 [k].
    """
    stamps = {name: stream.timestamps for name, stream in episode.streams.items()}
    for name, _, fps in cameras:
        if np.median(usual_steps(stamps[name])) > _SLOW * NANOSECONDS / fps:
            yield f"{name} has fewer than clip.fps = {fps:g} frames per second: clips repeat them"
    acting = parse(dataset.action, "action")
    plain = [p for p in acting if p.represent == "values" and p.interpolation != "linear"]
    for name in streams(plain):
        period = float(np.median(np.diff(stamps[name]))) / NANOSECONDS
        share = period * policy_io.action.fps
        if not 1 / _SAME_RATE < share < _SAME_RATE:
            than = f"values per second ({1 / period:.3g}) than policy_io.action.fps ("
            than += f"{policy_io.action.fps:g}), so"
            taken, lost = f"fewer {than} each is taken again", f"more {than} some are left out"
            yield (
                f"{name} has {taken if share > 1 else lost}: right for positions, but commands of "
                "how far to move then move another distance"
            )
    asked = list(cameras)
    for key, look in (("action", "future"), ("proprio", "past")):
        for part in parse(dataset[key], key):
            io = policy_io[key]
            if part.interpolation != "previous":  # a value that holds until the next one
                shift = io.get("shift", 0.0) + part.shift
                spec = WindowSpec(key, io.horizon, io.fps, shift, look=look)
                asked += [Asked(s, request_times(spec, anchor), io.fps) for s in part.streams]
                asked += [Asked(base, anchor, io.fps) for base in part.bases]
    for name in dict.fromkeys(
        s for s, times, fps in asked if in_pause(stamps[s], times, fps).any()
    ):
        yield (
            f"{name} pauses within an episode: what windows ask for in the pause is made of the "
            "values at its edges"
        )
    for name in dict.fromkeys(s for s, _, fps in asked if is_outside(stamps[s], anchor, fps).any()):
        yield (
            f"{name} begins later than an episode or ends earlier: windows there repeat its first "
            "or last value as the present one"
        )


def in_numbers(episode: Episode, dataset: ConfigDict) -> Iterator[str]:
    """A sentence for each stream whose numbers are not what its part of a vector takes them for.

    They jump between two values of one angle, a gripper's leave the range that is said, or float32
    cannot tell them apart.
    """
    for key in ("action", "proprio"):
        for part in parse(dataset[key], key):
            if part.represent in ("values", "delta", "gripper") and part.wrap is None:
                for name in part.streams:
                    values = np.asarray(episode.streams[name].values)
                    for text in _in_part(part, name, values):
                        yield f"{key}: {text}"


def _in_part(part: Part, name: str, values: np.ndarray) -> Iterator[str]:
    flat = values.reshape(len(values), -1).astype(np.float64)
    columns = list(part.columns or range(flat.shape[1]))
    of, flat = f"{name}, columns {columns}" if part.columns else name, flat[:, columns]
    if part.represent == "gripper":
        opening = (flat - part.closed) / (part.open - part.closed)
        if (np.abs(opening - 0.5) > 0.5 + _BEYOND).mean() > _OFTEN:
            yield (
                f"{of} goes beyond closed = {part.closed:g} and open = {part.open:g}, to which it "
                "is clipped"
            )
        return
    if part.represent == "values" and _are_lost_in_float32(flat):
        yield (
            f"{of} has numbers so large that float32, in which they are kept, loses their changes; "
            "subtract a constant, or take them as a delta"
        )
    if values.dtype.kind == "f":
        for text in seams(flat):
            yield f"of {of}, {_COUNT.sub('', text)}"


def _are_lost_in_float32(values: np.ndarray) -> bool:
    """Whether rounding [n, d] changes a large number about as much as a step does."""
    large = values[:, np.abs(values).max(axis=0) > _LARGE]
    with np.errstate(all="ignore"):  # whether numbers are finite is checked elsewhere
        error, steps = large - large.astype(np.float32), np.diff(large, axis=0)
        lost = np.mean(error**2, axis=0) > 0.1 * np.mean(steps**2, axis=0)
    return bool((lost & (steps != 0).any(axis=0)).any())
