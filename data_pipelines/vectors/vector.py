"""From an episode's streams to the vectors of a policy (actions, proprioception), and back.

All functions are pure. `vectors.parts` says what a vector can be made of, and how a config says it.

In use:

    from data_pipelines.vectors.parts import bases, dims, mask, modes, parse, streams

    parts = parse(dataset.action, "action")             all that can be checked without data is
    values, padded = read(parts, episode.streams, anchors, dim, horizon=15, fps=5.0, shift=0.2)
    Normalizer(..., {"actions": modes(parts, dim)})     one mode per dimension
    loss * mask(parts, dim)                             False where padded
    commands = restore(parts, chunk, {name: now[name] for name in bases(parts)})
    proprio = vector(parts, history, now, dim)          as `read`, from a robot's values
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from data_pipelines.episode import Stream
from data_pipelines.transforms import ROTATION_WIDTHS
from data_pipelines.vectors.parts import dims
from data_pipelines.vectors.representations import (
    REPRESENTATIONS,
    Part,
    load_position,
    load_rotation,
    store_position,
    store_rotation,
    stored_width,
)
from data_pipelines.windows import WindowSpec, read_window


class StreamMismatch(ValueError):
    """The config does not fit the dataset; unlike a broken file this stops a job."""


def read(
    parts: Sequence[Part],
    episode: Mapping[str, Stream],
    anchors: np.ndarray,
    dim: int,
    *,
    horizon: int,
    fps: float,
    shift: float = 0.0,
    look: Literal["past", "future"] = "future",
) -> tuple[np.ndarray, np.ndarray]:
    """Windows of an episode, as the policy sees them.

    Args:
        parts: what the vector is made of.
        episode: its streams.
        anchors: int64 [k], nanoseconds; bases are read there.
        dim: width of the vector.
        horizon, fps, shift, look: of the window, see `WindowSpec`.

    Returns:
        float32 [k, horizon, dim], and a bool mask [k, horizon] that is true where the instant lies
        outside any of the streams, so that an edge value was repeated.

    Raises:
        StreamMismatch: if a stream is missing or has other shapes than the parts say.
        ValueError: if stored numbers are no rotations.
    """
    anchors = np.asarray(anchors, np.int64)
    stored = {name: stream.values for name, stream in episode.items()}
    padded = np.zeros((len(anchors), horizon), bool)
    vectors = []
    for part, width in zip(parts, dims(parts, dim)):
        if part.pad:
            vectors.append(np.zeros((*padded.shape, width)))
            continue
        between = "pose" if part.interpolation == "quaternion" else part.interpolation
        base = None
        if part.bases:
            now = WindowSpec("/".join(part.bases), 1, fps, 0.0, between, "past")
            forms = _load(part, part.bases, part.base_columns, stored, width)
            base, _ = _cut(episode, part.bases, forms, now, anchors)
            base = base[:, 0]
        at = WindowSpec("/".join(part.streams), horizon, fps, shift + part.shift, between, look)
        # Loaded before windows are cut, because a value is in many windows.
        forms = _load(part, part.streams, part.columns, stored, width)
        values, outside = _cut(episode, part.streams, forms, at, anchors)
        vectors.append(REPRESENTATIONS[part.represent].express(part, values, base))
        padded |= outside
    return np.concatenate(vectors, axis=-1).astype(np.float32), padded


def vector(
    parts: Sequence[Part],
    values: Mapping[str, np.ndarray],
    base: Mapping[str, np.ndarray],
    dim: int,
) -> np.ndarray:
    """The vector of values at hand, such as a robot's last states.

    Args:
        parts: what the vector is made of.
        values: h instants of each of `streams(parts)`, [h, ...] as the dataset stores them.
        base: the present value of each of `bases(parts)`, [...].
        dim: width of the vector.

    Returns:
        float32 [h, dim].
    """
    length = len(next(iter(values.values())))
    vectors = []
    for part, width in zip(parts, dims(parts, dim)):
        if part.pad:
            vectors.append(np.zeros((length, width)))
            continue
        form = _join(_load(part, part.streams, part.columns, values, width))
        express = REPRESENTATIONS[part.represent].express
        vectors.append(express(part, form, _base_form(part, base, width)))
    return np.concatenate(vectors, axis=-1).astype(np.float32)


def restore(
    parts: Sequence[Part], chunk: np.ndarray, base: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The inverse of `vector`: a policy's chunk in the dataset's own convention.

    Args:
        parts: what the vector is made of.
        chunk: [h, dim], not normalised.
        base: the present value of each of `bases(parts)`, [...] as the dataset stores it.

    Returns:
        For each of `streams(parts)` float64 [h, 4, 4] (poses), [h, 3, 3] (matrices) or [h, w]. A
        stream of which parts take columns has the columns up to the last one taken; those that no
        part takes are NaN.

    Raises:
        ValueError: if two parts say different things about one number of a stream.
    """
    chunk = np.asarray(chunk, np.float64)
    widths = dims(parts, chunk.shape[-1])
    found: dict[str, list] = {}
    for part, width, end in zip(parts, widths, np.cumsum(widths)):
        if part.pad:
            continue
        representation = REPRESENTATIONS[part.represent]
        numbers = chunk[..., end - width : end]
        form = representation.recover(part, numbers, _base_form(part, base, width))
        store = (representation.store,)
        if len(part.streams) == 2:
            store = (store_position, store_rotation)
        for name, back in zip(part.streams, store):
            found.setdefault(name, []).append((part.columns, back(part, form)))
    return {name: _assemble(name, pieces) for name, pieces in found.items()}


def _load(part, names, columns, stored, width) -> list[np.ndarray]:
    """The forms of one stream, or of position and rotation."""
    if len(names) == 2:
        position = _numbers(stored, names[0], None, 3)
        rotation = _numbers(stored, names[1], None, ROTATION_WIDTHS[part.rotation])
        return [load_position(part, position), load_rotation(part, rotation)]
    numbers = _numbers(stored, names[0], columns, stored_width(part) or width)
    return [REPRESENTATIONS[part.represent].load(part, numbers)]


def _numbers(stored: Mapping[str, Any], name: str, columns, width: int) -> np.ndarray:
    """Values of a stream as float64 [n, width]."""
    if name not in stored:
        raise StreamMismatch(f"there is no stream {name!r}, only {sorted(stored)}")
    values = stored[name]
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
        raise StreamMismatch(f"stream {name!r} is a camera or text; a vector takes numbers")
    flat = values.reshape(len(values), -1).astype(np.float64)
    if columns is not None:
        if max(columns) >= flat.shape[1]:
            raise StreamMismatch(
                f"stream {name!r} has {flat.shape[1]} dimensions, so no column {max(columns)}; "
                "columns count from 0"
            )
        flat = flat[:, columns]
    if flat.shape[1] != width:
        raise StreamMismatch(
            f"stream {name!r} has {flat.shape[1]} dimensions, but policy_io says {width} (after "
            "the other parts, or by its representation)"
        )
    return flat


def _cut(episode, names, forms, spec, anchors) -> tuple[np.ndarray, np.ndarray]:
    cuts = [
        read_window(Stream(episode[name].timestamps, form), spec, anchors)
        for name, form in zip(names, forms)
    ]
    return _join([values for values, _ in cuts]), np.any([padded for _, padded in cuts], axis=0)


def _join(forms: list[np.ndarray]) -> np.ndarray:
    if len(forms) == 1:
        return forms[0]
    poses = forms[1].copy()
    poses[..., :3, 3] = forms[0][..., :3, 3]
    return poses


def _base_form(part: Part, base: Mapping[str, np.ndarray], width: int) -> np.ndarray | None:
    if not part.bases:
        return None
    one = {name: np.asarray(value)[None] for name, value in base.items()}
    return _join(_load(part, part.bases, part.base_columns, one, width))[0]


def _assemble(name: str, pieces: list) -> np.ndarray:
    """One stream from what its parts say about it."""
    if len(pieces) == 1 and pieces[0][0] is None:
        return pieces[0][1]
    taken = [column for columns, _ in pieces for column in columns or ()]
    if any(columns is None for columns, _ in pieces) or len(set(taken)) < len(taken):
        raise ValueError(
            f"several parts hold the same numbers of stream {name!r}, so a prediction has no one "
            "meaning; an action takes each number once"
        )
    length = len(pieces[0][1])
    whole = np.full((length, max(taken) + 1), np.nan)
    for columns, values in pieces:
        whole[:, columns] = values.reshape(length, -1)
    return whole
