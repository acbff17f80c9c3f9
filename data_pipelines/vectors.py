"""A policy's vectors (actions, proprioception): how a config describes, makes and inverts them.

`dataset.action` and `dataset.proprio` in a config describe a vector: "" (nothing), the name of one
stream (its values), or a tuple of parts, which are concatenated in order:

    dict(stream="action", columns=(0, 1, 2))         values; `columns` of the flattened stream
    dict(stream="joints", represent="delta", base="joint_state")   minus the base at the anchor
    dict(stream="grip", represent="gripper", closed=0.0, open=0.08)     0 is closed, 1 is open
    dict(stream="rot", represent="rotation", rotation="rotvec")    6-D: two rows of the matrix
    dict(stream="eef", represent="pose")                           position 3, rotation 6-D
    dict(stream="eef", represent="relative_pose", base="eef")      inv(base at anchor) @ pose
    dict(pad=7)                        zeros, not learned, such as for an arm this robot lacks

Further keys of a part, where they apply:

    columns        of the flattened stream, for any representation
    base_columns   of the base; default: `columns`
    rotation       how a rotation is stored: matrix, quaternion_xyzw, quaternion_wxyz, rotvec or
                   euler_xyz (fixed axes, radians). A pose without it is a 4x4 matrix; with it,
                   3 numbers of position followed by the rotation.
    stream, base   of a pose may be two names, (position, rotation), each with its own timestamps
    binary         True: a gripper is either closed or open, split at the middle
    interpolation  between stored values: nearest (default), previous; linear (numbers),
                   quaternion (slerp of a rotation), pose (linear position and slerp of a pose)
    wrap           (low, high) of numbers and deltas that are angles and jump from high to low, such
                   as (-3.14159265, 3.14159265) or (0, 360): a delta goes the short way round
    shift          seconds, added to the window's (-0.05: the value 50 ms earlier)
    normalize      VARIANCE (default) or another `Mode`; 6-D rotations are never normalised

Usage (all functions are pure):

    parts = parse(dataset.action, "action")             checks everything that needs no data
    values, padded = read(parts, episode.streams, anchors, dim, horizon=15, fps=5.0, shift=0.2)
    Normalizer(..., {"actions": modes(parts, dim)})     one mode per dimension
    loss * mask(parts, dim)                             False for padding
    commands = restore(parts, chunk, {name: now[name] for name in bases(parts)})
    proprio = vector(parts, history, now, dim)          like `read`, from a robot's values
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from data_pipelines.episode import Stream
from data_pipelines.representations import (
    POSITION,
    REPRESENTATIONS,
    ROTATION_WIDTHS,
    Mode,
    Part,
    Representation,
)
from data_pipelines.windows import WindowSpec, read_window


class StreamMismatch(ValueError):
    """The config does not fit the dataset; unlike a broken file, this stops a job."""


def parse(description: str | Sequence[Mapping[str, Any]], what: str = "vector") -> tuple[Part, ...]:
    """Parses a config's `action` or `proprio` (named by `what` in errors) into parts."""
    if isinstance(description, str):
        return (Part((description,)),) if description else ()
    # Lists come from JSON; a ConfigDict is no Mapping but has `items`.
    is_sequence = isinstance(description, tuple | list)
    if not is_sequence or not all(hasattr(part, "items") for part in description):
        raise ValueError(
            f"{what} must be a stream's name or a tuple of parts such as dict(stream='action'), "
            f"got {description!r}"
        )
    return tuple(
        _parse_part(dict(part.items()), f"part {i} of {what}") for i, part in enumerate(description)
    )


def streams(parts: Sequence[Part]) -> tuple[str, ...]:
    """The streams in the vector, without those it is only relative to."""
    return tuple(dict.fromkeys(name for part in parts for name in part.streams))


def bases(parts: Sequence[Part]) -> tuple[str, ...]:
    """The streams whose present values the vector is relative to (input of `restore`)."""
    return tuple(dict.fromkeys(name for part in parts for name in part.bases))


def dims(parts: Sequence[Part], dim: int) -> tuple[int, ...]:
    """The width of each part in a vector of `dim` numbers; one may be inferred from the rest."""
    widths = [_width(part) for part in parts]  # None: only the data can tell
    unknown = [i for i, width in enumerate(widths) if width is None]
    rest = dim - sum(width for width in widths if width is not None)
    if len(unknown) > 1:
        names = [parts[i].streams[0] for i in unknown]
        raise ValueError(f"the widths of the parts {names} are unknown; all but one need `columns`")
    if rest < len(unknown) or (rest and not unknown):
        known = ", ".join(f"{'/'.join(p.streams) or 'pad'} {w}" for p, w in zip(parts, widths))
        raise ValueError(
            f"policy_io says {dim} dimensions, but the parts have {known.replace('None', '1+')}: "
            "change their `columns`, or `dim` of policy_io"
        )
    return tuple(rest if width is None else width for width in widths)


def modes(parts: Sequence[Part], dim: int) -> tuple[Mode, ...]:
    """The normalisation mode of each of the `dim` dimensions."""
    return tuple(
        part.normalize if mode is None else mode
        for part, width in zip(parts, dims(parts, dim))
        for mode in _fixed_modes(part) or (None,) * width  # None: the part's own mode
    )


def mask(parts: Sequence[Part], dim: int) -> np.ndarray:
    """bool [dim]: False for padding, which is not learned."""
    return np.repeat([not part.pad for part in parts], dims(parts, dim))


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
    """Cuts windows out of an episode's streams, as the policy sees them.

    Args:
        parts: the parts of the vector.
        episode: stream name -> stream.
        anchors: int64 nanoseconds [k]; bases are read at these instants.
        dim: width of the vector.
        horizon, fps, shift, look: see `WindowSpec`.

    Returns:
        float32 [k, horizon, dim], and a bool mask [k, horizon] that is true where the instant is
        outside any of the streams and an edge value was repeated.

    Raises:
        StreamMismatch: a stream is missing or has another shape than the parts say.
        ValueError: stored numbers are not rotations.
    """
    anchors = np.asarray(anchors, np.int64)
    stored = {name: stream.values for name, stream in episode.items()}
    padded = np.zeros((len(anchors), horizon), bool)

    def cut(part: Part, names, columns, width: int, spec: WindowSpec):
        # Load before cutting windows, because each value is in many windows.
        forms = _load(part, names, columns, stored, width)
        cuts = [
            read_window(Stream(episode[name].timestamps, form), spec, anchors)
            for name, form in zip(names, forms)
        ]
        values, outside = zip(*cuts)
        return _join(values), np.any(outside, axis=0)

    def express(part: Part, width: int) -> np.ndarray:
        nonlocal padded
        # Rotations are loaded as poses, whatever their stored form.
        between = "pose" if part.interpolation == "quaternion" else part.interpolation
        base = None
        if part.bases:
            now = WindowSpec("/".join(part.bases), 1, fps, 0.0, between, "past")
            base = cut(part, part.bases, part.base_columns, width, now)[0][:, 0]
        at = WindowSpec("/".join(part.streams), horizon, fps, shift + part.shift, between, look)
        values, outside = cut(part, part.streams, part.columns, width, at)
        padded |= outside
        return REPRESENTATIONS[part.represent].express(part, values, base)

    return _concatenate(parts, dim, padded.shape, express), padded


def vector(
    parts: Sequence[Part],
    values: Mapping[str, np.ndarray],
    base: Mapping[str, np.ndarray],
    dim: int,
) -> np.ndarray:
    """The vector float32 [h, dim] of given values, such as a robot's last states.

    Args:
        parts: the parts of the vector.
        values: h instants of each of `streams(parts)`, [h, ...] as the dataset stores them.
        base: the present value of each of `bases(parts)`, [...].
        dim: width of the vector.
    """

    def express(part: Part, width: int) -> np.ndarray:
        form = _join(_load(part, part.streams, part.columns, values, width))
        return REPRESENTATIONS[part.represent].express(part, form, _base_form(part, base, width))

    return _concatenate(parts, dim, (len(next(iter(values.values()))),), express)


def restore(
    parts: Sequence[Part], chunk: np.ndarray, base: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The inverse of `vector`: a policy's chunk in the dataset's own convention.

    Args:
        parts: the parts of the vector.
        chunk: [h, dim], not normalised.
        base: the present value of each of `bases(parts)`, [...] as the dataset stores it.

    Returns:
        For each of `streams(parts)` float64 [h, 4, 4] (poses), [h, 3, 3] (matrices) or [h, w]. If
        parts take columns of a stream, w ends at the last one taken, and columns that no part takes
        are NaN.
    """
    chunk = np.asarray(chunk, np.float64)
    widths = dims(parts, chunk.shape[-1])
    found: dict[str, list] = {}
    for part, width, end in zip(parts, widths, np.cumsum(widths)):
        if part.pad:
            continue
        numbers, now = chunk[..., end - width : end], _base_form(part, base, width)
        form = REPRESENTATIONS[part.represent].recover(part, numbers, now)
        for name, stored in zip(part.streams, _stored(part, part.streams)):
            found.setdefault(name, []).append((part.columns, stored.store(part, form)))
    return {name: _assemble(name, pieces) for name, pieces in found.items()}


def _fixed_modes(part: Part) -> tuple[Mode | None, ...] | None:
    """The modes of a part of fixed width, else None. Padding is zeros, which need no scale."""
    return (Mode.IDENTITY,) * part.pad if part.pad else REPRESENTATIONS[part.represent].modes


def _width(part: Part) -> int | None:
    fixed = _fixed_modes(part)
    return len(fixed) if fixed else REPRESENTATIONS[part.represent].stored_width(part)


def _concatenate(
    parts: Sequence[Part], dim: int, lead: tuple[int, ...], express: Callable[[Part, int], Any]
) -> np.ndarray:
    """The vector float32 [*lead, dim] from `express(part, width)`; zeros for padding."""
    vectors = [
        np.zeros((*lead, width)) if part.pad else express(part, width)
        for part, width in zip(parts, dims(parts, dim))
    ]
    return np.concatenate(vectors, axis=-1).astype(np.float32)


def _stored(part: Part, names: Sequence[str]) -> tuple[Representation, ...]:
    """The representation of each of the streams: one, or position and rotation."""
    if len(names) == 2:
        return POSITION, REPRESENTATIONS["rotation"]
    return (REPRESENTATIONS[part.represent],)


def _load(part: Part, names, columns, values: Mapping[str, Any], width: int) -> list[np.ndarray]:
    """The forms of one stream, or of position and rotation."""
    forms = []
    for name, kind in zip(names, _stored(part, names)):
        wide = kind.stored_width(part) or width
        numbers = _numbers(values, name, columns, wide)
        if columns is None and (kind.modes or kind is POSITION):
            _check_shape(name, values[name].shape[1:], wide)
        forms.append(kind.load(part, numbers))
    return forms


def _check_shape(name: str, shape: tuple[int, ...], width: int) -> None:
    """StreamMismatch if as many numbers, but in another shape, are not a pose or rotation."""
    square = {9: (3, 3), 16: (4, 4)}.get(width)
    if tuple(size for size in shape if size != 1) not in ((width,), square):
        raise StreamMismatch(
            f"stream {name!r} has the shape {list(shape)}; its representation needs "
            f"{f'{list(square)} or ' if square else ''}[{width}]"
        )


def _join(forms: Sequence[np.ndarray]) -> np.ndarray:
    """The only form, or the pose of a position and a rotation."""
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


def _numbers(stored: Mapping[str, Any], name: str, columns, width: int) -> np.ndarray:
    """Values of a stream as float64 [n, width]."""
    if name not in stored:
        raise StreamMismatch(f"there is no stream {name!r}, only {sorted(stored)}")
    values = stored[name]
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
        raise StreamMismatch(f"stream {name!r} is a camera or text; a vector takes numbers")
    flat = values.reshape(len(values), -1).astype(np.float64)
    has = f"stream {name!r} has {flat.shape[1]} dimensions"
    if columns is not None:
        if max(columns) >= flat.shape[1]:
            raise StreamMismatch(f"{has}, so no column {max(columns)}; columns count from 0")
        flat = flat[:, columns]
    if flat.shape[1] != width:
        raise StreamMismatch(f"{has}, but policy_io says {width} (or its representation does)")
    return flat


def _assemble(name: str, pieces: list) -> np.ndarray:
    """Joins the (columns, values) that the parts hold of one stream."""
    if len(pieces) == 1 and pieces[0][0] is None:
        return pieces[0][1]
    taken = [column for columns, _ in pieces for column in columns or ()]
    if any(columns is None for columns, _ in pieces) or len(set(taken)) < len(taken):
        raise ValueError(
            f"several parts hold the same numbers of stream {name!r}, so a prediction is "
            "ambiguous; use each number once"
        )
    length = len(pieces[0][1])
    whole = np.full((length, max(taken) + 1), np.nan)
    for columns, values in pieces:
        whole[:, columns] = values.reshape(length, -1)
    return whole


# Parsing and checking a part of a config.


def _parse_part(given: dict[str, Any], where: str) -> Part:
    def check(fine: Any, problem: str) -> None:
        if not fine:
            raise ValueError(f"{where}, {given}: {problem}")

    given = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
    represent = "pad" if "pad" in given else given.get("represent", "values")
    known = ", ".join(REPRESENTATIONS)
    # In lists, not sets and dicts, because a config may hold an unhashable value.
    check(represent in list(_KEYS), f"represent must be one of {known}, got {represent!r}")
    required, optional = _KEYS[represent]
    unknown = [key for key in given if key not in (*required, *optional)]
    check(not unknown, f"{represent} has no {unknown}; it takes {[*required, *optional]}")
    lacking = [key for key in required if key not in given]
    check(not lacking, f"{represent} also needs {lacking}")
    for key, value in given.items():
        if key in _VALUES:
            fine, meaning = _VALUES[key]
            check(fine(value), f"{key} must be {meaning}, got {value!r}")
    if represent == "pad":
        return Part(pad=given["pad"])

    part = Part(
        streams=_names(given["stream"]),
        bases=_names(given.get("base", ())),
        base_columns=given.get("base_columns", given.get("columns")),
        normalize=Mode(given.get("normalize", Mode.VARIANCE)),
        **{key: value for key, value in given.items() if key not in _CHANGED},
    )
    ways = REPRESENTATIONS[represent].interpolations
    known = ", ".join(ways)
    check(part.interpolation in ways, f"interpolation of {represent} must be one of {known}")
    width = REPRESENTATIONS[represent].stored_width(part)
    for names, columns in ((part.streams, part.columns), (part.bases, part.base_columns)):
        in_two = represent in ("pose", "relative_pose") and part.rotation and columns is None
        check(
            len(names) < 2 or in_two,
            "two streams are the position and the rotation of a pose; they need `rotation` and "
            "take no columns",
        )
        check(
            columns is None or width in (None, len(columns)),
            f"{represent} {part.rotation} is stored in {width} numbers; name that many columns",
        )
    check(part.closed != part.open, "closed and open must differ")
    return part


def _names(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _are_names(value: Any) -> bool:
    names = _names(value)
    is_pair = not isinstance(value, tuple) or len(value) == 2
    return is_pair and all(isinstance(name, str) and name for name in names)


def _are_columns(value: Any) -> bool:
    are_whole = isinstance(value, tuple) and all(type(v) is int and v >= 0 for v in value)
    return are_whole and 0 < len(set(value)) == len(value)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


_CHANGED = ("stream", "base", "base_columns", "normalize")  # the others are fields of `Part`
_COMMON = ("represent", "columns", "interpolation", "shift")
# Required and optional keys of each representation.
_KEYS = {
    "values": (("stream",), (*_COMMON, "normalize", "wrap")),
    "delta": (("stream", "base"), (*_COMMON, "base_columns", "normalize", "wrap")),
    "gripper": (("stream", "closed", "open"), (*_COMMON, "binary", "normalize")),
    "rotation": (("stream", "rotation"), _COMMON),
    "pose": (("stream",), (*_COMMON, "rotation", "normalize")),
    "relative_pose": (("stream", "base"), (*_COMMON, "rotation", "base_columns", "normalize")),
    "pad": (("pad",), ()),
}
_STREAMS = (_are_names, "a stream's name, or two names: position and rotation")
_COLUMNS = (_are_columns, "different whole numbers from 0, such as (0, 1, 2)")
# A check of each key's value, and what the value must be. `represent` and `interpolation`, whose
# choices depend on each other, are checked above.
_VALUES = {
    **dict.fromkeys(("stream", "base"), _STREAMS),
    **dict.fromkeys(("columns", "base_columns"), _COLUMNS),
    **dict.fromkeys(("closed", "open", "shift"), (_is_number, "a number")),
    "rotation": (lambda v: v in list(ROTATION_WIDTHS), f"one of {', '.join(ROTATION_WIDTHS)}"),
    "binary": (lambda v: isinstance(v, bool), "True or False"),
    "wrap": (
        lambda v: isinstance(v, tuple) and len(v) == 2 and all(map(_is_number, v)) and v[0] < v[1],
        "the smallest and the largest angle, such as (-3.14159265, 3.14159265)",
    ),
    "normalize": (lambda v: v in list(Mode), f"one of {', '.join(Mode)}"),
    "pad": (lambda v: _are_columns((v,)) and v > 0, "a whole number of dimensions"),
}
