"""What fits a policy in shape but perhaps not in meaning: said once per connection, and counted.

Nothing here refuses a query. A picture of another aspect, a state in other units or an unplugged
camera have the right shapes; the client and the server's log are told once, and /health counts the
queries.
"""

import logging
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from data_pipelines.cameras import View, view_cameras
from data_pipelines.normalize import Normalizer
from mvjax.policy.robot import last_word, same_aspect

log = logging.getLogger(__name__)

Totals = dict[str, dict[str, Any]]
"""Kind of notice -> queries and connections that it concerned, and the first sentence."""

# Height and width of common cameras, upright ones included.
_ASPECTS = tuple(
    aspect for h, w in ((3, 4), (9, 16), (10, 16), (2, 3), (4, 5)) for aspect in ((h, w), (w, h))
)
_LEAST = 0.01  # extent of a dimension; of one that is constant in training any noise is outside
_BARS = 0.05  # of a side; narrower black edges are not worth a sentence
_JPEG = 12  # what compression makes of black, about


class Notices:
    """The notices of one connection; `totals` are those of all connections of a server."""

    def __init__(self, totals: Totals, client: str) -> None:
        self._totals, self._client = totals, client
        self._counted, self._said, self._new = set[str](), set[str](), list[str]()

    def add(self, kind: str, sentence: str = "", camera: str = "") -> None:
        """Counts a query; its sentence, if any, is said if it is the first of its kind here.

        Args:
            kind, sentence: what was seen.
            camera: of several, the one that it concerns: each has kinds of its own.
        """
        if camera:
            kind = f"{kind}: {camera}"
            sentence = sentence and f"Camera {camera!r}: {sentence}"
        total = self._totals.setdefault(kind, {"queries": 0, "connections": 0, "first": ""})
        total["queries"] += 1
        total["connections"] += kind not in self._counted
        self._counted.add(kind)
        if sentence and kind not in self._said:
            self._said.add(kind)
            self._new.append(sentence)
            log.warning("client %s: %s", self._client, sentence)
            total["first"] = total["first"] or sentence

    def take(self) -> list[str]:
        """Returns the sentences that have not been said yet."""
        new, self._new = self._new, []
        return new


# Numbers.


@dataclass(frozen=True)
class Ranges:
    """What training saw of a vector: float32 [horizon, dim] each.

    Attributes:
        low, high: the extremes of the training data.
        clip_low, clip_high: the normalizer clamps to these; infinite where it does not.
        labels: of the dimensions.
    """

    low: np.ndarray
    high: np.ndarray
    clip_low: np.ndarray
    clip_high: np.ndarray
    labels: Sequence[str]

    @classmethod
    def of(cls, normalizer: Normalizer, key: str, labels: Sequence[str]) -> "Ranges | None":
        """The ranges of "proprio" or "actions"; None if the normalizer has no statistics."""
        if key not in normalizer.affines:
            return None
        affine, statistics = normalizer.affines[key], normalizer.statistics[key]
        bounds = (affine.shift + c / affine.scale for c in (affine.clamp_min, affine.clamp_max))
        extremes = (np.asarray(statistics[name], np.float32) for name in ("min", "max"))
        return cls(*extremes, *bounds, labels)

    def clips(self, values: np.ndarray) -> bool:
        """Returns whether the normalizer changes values [horizon, dim] by more than a rounding."""
        room = 1e-5 * (1 + np.abs(values))
        return bool(((values < self.clip_low - room) | (values > self.clip_high + room)).any())

    def differ(self, one: np.ndarray, other: np.ndarray) -> bool:
        """Returns whether two values [dim] are apart by a twentieth of what training saw."""
        extent = self.high.max(axis=0) - self.low.min(axis=0)
        return bool((np.abs(one - other) > 0.05 * np.maximum(extent, _LEAST)).any())

    def beyond(self, values: np.ndarray, margin: float) -> str:
        """Returns the dimensions outside the training data, in words; "" if there is none.

        Args:
            values: [horizon, dim].
            margin: how far beyond the extremes is still inside, as a share of their distance.
        """
        low, high = (np.broadcast_to(bound, values.shape) for bound in (self.low, self.high))
        # Of all time steps: at the first one, relative actions hardly differ from zero.
        room = margin * np.maximum(high.max(axis=0) - low.min(axis=0), _LEAST)
        room = room + 1e-3 * np.maximum(np.abs(low), np.abs(high)) + 1e-6
        excess = np.maximum(low - values, values - high) - room
        dims = (excess > 0).any(axis=0)
        if not dims.any():
            return ""
        step, dim = np.unravel_index(np.argmax(excess), values.shape)
        return (
            f"{dims.sum()} of {len(dims)} numbers, most of all {self.labels[dim]} with "
            f"{values[step, dim]:.4g} (training: {low[step, dim]:.4g} to {high[step, dim]:.4g})"
        )


# Pictures.


@dataclass(frozen=True)
class Trained:
    """What training says of the pictures of one camera.

    Attributes:
        seen: height and width at which the policy sees them.
        size: height and width of the training pictures, or of their aspect; None: not known.
        exact: `size` is that of the training pictures (`--camera_size`), not only of their aspect.
    """

    seen: tuple[int, int]
    size: tuple[int, int] | None
    exact: bool = False


def trained_pictures(
    views: Sequence[View], sizes: Mapping[str, tuple[int, int]]
) -> dict[str, Trained]:
    """What training says of every camera of a policy; of one that is not known, by the name "".

    A camera that fills a view has its aspect, unless `sizes` says otherwise. A cell of a tiled view
    says nothing of the aspect: training stretched the pictures to fill it.

    Args:
        views: of the policy.
        sizes: camera -> height and width of its training pictures.
    """
    trained = {}
    for camera in view_cameras(views) or ("",):
        whole = [size for v in views if (size := (v.height, v.width)) in _cells(v, camera)]
        seen = max((cell for view in views for cell in _cells(view, camera)), key=math.prod)
        size = sizes.get(camera, whole[0] if whole else None)
        trained[camera] = Trained(seen, size, exact=camera in sizes)
    return trained


def camera_sizes(text: str, cameras: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Returns camera -> height and width in "480x640" (of all) or "front=480x640,wrist=240x320".

    Args:
        text: of the flag --camera_size; "": of none. A camera is named in full or by its last word.
        cameras: of the policy; () if they are not known.

    Raises:
        ValueError: the text is not of this form, or names a camera that is none of these, several
            of them, or one that it named before.
    """
    sizes: dict[str, tuple[int, int]] = {}
    for entry in text.split(",") if text else ():
        found = re.fullmatch(r"(?:(.+)=)?([1-9]\d{0,4})x([1-9]\d{0,4})", entry)
        if found is None or (found[1] is None and entry != text):
            raise ValueError(
                "--camera_size must be HEIGHTxWIDTH such as 480x640, or that of single cameras "
                f"such as front=480x640,wrist=240x320, got {text!r}."
            )
        name, size = found[1], (int(found[2]), int(found[3]))
        if name is None:
            return dict.fromkeys(cameras or ("",), size)
        meant = [camera for camera in cameras if camera == name]
        meant = meant or [camera for camera in cameras if last_word(camera) == name]
        if len(meant) != 1 or meant[0] in sizes:
            raise ValueError(
                f"--camera_size must name one camera of the policy once, but got {name!r} in "
                f"{text!r}; it has {', '.join(map(repr, cameras)) or 'one without a name'}."
            )
        sizes[meant[0]] = size
    return sizes


def _cells(view: View, camera: str) -> list[tuple[int, int]]:
    """Height and width of the cells in which a view shows a camera."""
    rows = view.rows or ((camera,),)
    return [(view.height // len(rows), view.width // len(row)) for row in rows if camera in row]


class Camera:
    """The pictures of one camera of a connection beside those of training.

    openpi's clients put black bars around their pictures to make them square (`resize_with_pad`),
    which training did not see. Bars are removed if they are exactly those that a picture of the
    trained aspect would have got, zero in all pictures of the connection. A dark scene has no such
    bars: somewhere beside them a row would have to begin that is not black.

    Args:
        trained: what training says of them; where their aspect is not known, no bars are removed.
        name: of the camera, where there are several.
    """

    def __init__(self, trained: Trained, name: str = "") -> None:
        self._seen, self._size, self._known = trained.seen, trained.size, trained.exact
        self._name = name
        self._shape: tuple[int, int] | None = None
        self._edges: list[int] | None = None  # black pixels before and after the content so far

    def __call__(self, pictures: np.ndarray, notices: Notices) -> np.ndarray:
        """Returns pictures [t, h, w, 3] without bars; the same if there are none."""
        add, shape = partial(notices.add, camera=self._name), pictures.shape[1:3]
        if shape != self._shape:
            self._shape, self._edges = shape, None
        if 4 * max(shape) < min(self._seen):
            add("picture_small", self._small())
        newest = pictures[-1]
        if not newest.any():
            add("picture_black", "The picture is black; is the camera covered?")
        elif newest.max() == 1:  # floats of 0 to 1 that became integers
            add(
                "picture_black",
                "The picture has no value above 1 of 255: were colours from 0 to 1 not multiplied "
                "by 255?",
            )
        elif (newest[0] == newest[0, 0]).all() and (newest == newest[0, 0]).all():
            add("picture_black", "The picture is of one colour throughout; does the camera work?")
        if not pictures.any():  # says nothing about bars
            return pictures
        first = self._edges is None
        if self._size is None or same_aspect(shape, self._size):
            if first and not self._known:
                self._note_unexplained_bars(pictures, add)
            self._edges = [0, 0]
            return pictures
        axis, lengths = self._contents()
        most = (shape[axis] - min(lengths)) // 2 + 3
        found = _black_edges(pictures, axis, most)
        self._edges = found if self._edges is None else [*map(min, self._edges, found)]
        bars = self._edges
        content = shape[axis] - sum(bars)
        fits = any(abs(content - length) <= 1 for length in lengths)  # rounded down by openpi
        if fits and bars == _split(sum(bars)):
            add("letterboxed", self._letterboxed(axis, bars))
            inside = slice(bars[0], shape[axis] - bars[1])
            return pictures[:, inside] if axis == 0 else pictures[:, :, inside]
        add("picture_aspect", self._other_aspect())
        if first:
            self._note_unexplained_bars(pictures, add)
        return pictures

    def _contents(self) -> tuple[int, list[int]]:
        """The axis (0: rows) that would have bars, and possible lengths of what is between them."""
        h, w = self._shape
        sizes = [self._size]
        if not self._known:  # a clip's sides are multiples of 16: 176x320 stands for 16:9
            sizes += [aspect for aspect in _ASPECTS if same_aspect(aspect, self._size)]
        if w * self._size[0] < self._size[1] * h:  # wider than the picture: bars above and below
            return 0, [int(height * w / width) for height, width in sizes]
        return 1, [int(width * h / height) for height, width in sizes]

    def _letterboxed(self, axis: int, bars: list[int]) -> str:
        (h, w), (height, width) = self._shape, self._size
        what, share = ("rows", "columns")[axis], sum(bars) / self._shape[axis]
        return (
            f"The pictures of {h}x{w} have {bars[0]} black {what} before and {bars[1]} after the "
            f"content ({share:.0%}), as openpi's resize_with_pad adds to the aspect of {height}x"
            f"{width}: they are cut off, as training did not have them."
        )

    def _small(self) -> str:
        (h, w), (height, width) = self._shape, self._seen
        return f"The pictures are {h}x{w}, but the policy sees {height}x{width}: they are blurred."

    def _other_aspect(self) -> str:
        (h, w), (height, width) = self._shape, self._size
        beginning = f"The pictures are {h}x{w}, of another aspect than "
        if self._known:
            return f"{beginning}those of training, {height}x{width}: they are stretched."
        return (
            f"{beginning}what the policy sees, {height}x{width}: they are stretched, which is "
            "right only if those of training were, too (--camera_size tells the server their size)."
        )

    def _note_unexplained_bars(self, pictures: np.ndarray, add: Callable[..., None]) -> None:
        for axis, what in ((0, "rows"), (1, "columns")):
            size = pictures.shape[1 + axis]
            first, last = edges = _black_edges(pictures, axis, size, nearly=_JPEG)
            if abs(first - last) < 2 and _BARS * size < first < size / 2:
                one = f"{self._name}=" if self._name else ""
                exact = edges == _black_edges(pictures, axis, size)
                add(
                    "black_bars",
                    f"The first {first} and the last {last} {what} of the picture are "
                    f"{'' if exact else 'nearly '}black. If training did not have such bars, "
                    + (
                        f"start the server with --camera_size={one}HEIGHTxWIDTH of the training "
                        "pictures, which cuts off those of openpi's resize_with_pad."
                        if exact
                        else "send the pictures without them: only bars of zeros are cut off, and "
                        "these may have been through a lossy codec such as JPEG."
                    ),
                )


def _split(bars: int) -> list[int]:
    """The two bars as `resize_with_pad` makes them: the first one is rounded down."""
    return [bars // 2, bars - bars // 2]


def _black_edges(pictures: np.ndarray, axis: int, most: int, nearly: int = 0) -> list[int]:
    """How many rows (axis 0) or columns at both ends are at most `nearly` in all pictures."""
    moved = np.moveaxis(pictures, 1 + axis, 0)
    most = min(most, len(moved))

    def run(part: np.ndarray) -> int:
        used = part.reshape(len(part), -1).max(axis=1) > nearly
        return int(np.argmax(used)) if used.any() else len(part)

    return [run(moved[:most]), run(moved[::-1][:most])]


def unread_pictures(message: Mapping[str, Any], read: Collection[tuple[str, ...]]) -> list[str]:
    """Returns the names of the pictures in a message that are at none of the nested keys `read`."""

    def pictures(value: Mapping[str, Any], above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for key, entry in value.items():
            if isinstance(entry, Mapping):
                yield from pictures(entry, (*above, str(key)))
            elif isinstance(entry, np.ndarray) and entry.dtype == np.uint8 and entry.ndim >= 3:
                yield (*above, str(key))

    return ["/".join(keys) for keys in pictures(message, ()) if keys not in read]
