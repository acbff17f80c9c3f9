"""Cameras: which ones a model sees, and how their frames become the pictures that it sees.

A *view* is one picture, tiled from the frames of one camera or of several. `dataset.video` in a
config names the cameras of the view that a model predicts: see `camera_rows`. Its first camera is
the clock of all. `clip.views` names and sizes the views that are only observed, and `dataset.views`
their cameras in the same way, or "" for black pictures. Data, policies, servers and simulators take
the arrangement from here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from data_pipelines.augment import WHOLE, Augment, Variation
from data_pipelines.clip import VIDEO

Rows = tuple[tuple[str, ...], ...]  # camera names, see `camera_rows`


@dataclass(frozen=True)
class View:
    """One picture that a model sees.

    Attributes:
        name: "video" for the one that it predicts.
        rows: the cameras (see `camera_rows`); () if they are not known.
        height, width: of the picture, pixels.
        crop: the share of each camera's height and width that is shown, around the centre.
    """

    name: str
    rows: Rows
    height: int
    width: int
    crop: float = 1.0

    @property
    def cameras(self) -> tuple[str, ...]:
        """Its distinct cameras, the clock first; () if they are not known."""
        return cameras(self.rows)

    def picture(
        self,
        frames: Mapping[str, np.ndarray],
        variations: Mapping[str, Variation] = MappingProxyType({}),
    ) -> np.ndarray:
        """Tiles its cameras' frames, uint8 [t, any h, any w, 3] each: uint8 [t, height, width, 3].

        Args:
            frames: by camera, of these and others. Of cameras that are not known there is one, of
                any name.
            variations: by camera; one without shows its centre crop.
        """
        plain = Variation(self.crop)
        if not self.rows:
            return plain.picture(next(iter(frames.values())), self.height, self.width)
        chosen = {name: variations.get(name, plain) for name in self.cameras}
        return tile(self.rows, frames, self.height, self.width, chosen)


def dataset_views(dataset: Any, clip: Any) -> tuple[View, ...]:
    """The views of a model on a dataset, "video" first, then the observed ones by name.

    Args:
        dataset: its section of a config: `video`, `views` and `augment`.
        clip: height, width and `views`.

    Raises:
        ValueError: the dataset does not say which cameras a view shows.
    """
    rows = camera_rows(dataset.video) if "video" in dataset else ()
    crop = Augment.of(dataset).crop
    views = [View(VIDEO, rows, clip.height, clip.width, crop)]
    sizes, shown = clip.get("views") or {}, dataset.get("views") or {}
    for name in sorted(sizes):
        if name not in shown:
            raise ValueError(
                f"the model sees the view {name!r} (clip.views), but views.{name} of the dataset "
                'does not say which camera shows it; set it to one, or to "" for black pictures'
            )
        rows = view_rows(shown[name], f"views.{name}")
        views.append(View(name, rows, sizes[name].height, sizes[name].width, crop))
    return tuple(views)


def view_rows(
    cameras: str | Sequence[str] | Sequence[Sequence[str]], setting: str = "views"
) -> Rows:
    """As `camera_rows`, of an observed view, which may also be black ("")."""
    return (("",),) if cameras == "" else camera_rows(cameras, setting)


def view_cameras(views: Sequence[View]) -> tuple[str, ...]:
    """The distinct cameras of all views, the clock first; () if they are not known."""
    return tuple(dict.fromkeys(name for view in views for name in view.cameras))


def arrange(
    views: Sequence[View],
    frames: Mapping[str, np.ndarray] | np.ndarray,
    *,
    arranged: bool = False,
) -> dict[str, np.ndarray]:
    """The picture of every view.

    Args:
        views: of a model.
        frames: camera -> uint8 [t, any h, any w, 3], of exactly the cameras of `views`; an array
            alone is that of the only camera.
        arranged: `frames` are finished pictures by view, uint8 [t, height, width, 3].

    Returns:
        view -> uint8 [t, height, width, 3].

    Raises:
        ValueError: a camera is missing or not one of these, or its frames are no pictures.
    """
    names = tuple(view.name for view in views) if arranged else view_cameras(views)
    kind = "view" if arranged else "camera"
    known = ", ".join(map(repr, names))
    if not isinstance(frames, Mapping):
        if len(names) > 1:
            raise ValueError(
                f"The model sees the {kind}s {known}, but got the pictures of one {kind} that is "
                f"not named: give those of each by its name, {{{names[0]!r}: ..., ...}}."
            )
        frames = {names[0] if names else "": frames}
    if not names and len(frames) != 1:
        raise ValueError(f"The model sees one camera, but got pictures of {[*frames]}.")
    if missing := [name for name in names if name not in frames]:
        raise ValueError(
            f"The model sees the {kind}s {known}, but there are no pictures of "
            f"{', '.join(map(repr, missing))}, only of {', '.join(map(repr, frames)) or 'none'}."
        )
    if names and (more := [name for name in frames if name not in names]):
        raise ValueError(
            f"The model sees the {kind}s {known}, but got pictures of {', '.join(map(repr, more))}"
            ", too: leave these out."
        )
    for name, pictures in frames.items():
        shape, dtype = np.shape(pictures), getattr(pictures, "dtype", type(pictures).__name__)
        if len(shape) != 4 or shape[-1] != 3 or not min(shape) or dtype != np.uint8:
            raise ValueError(
                f"The pictures of {name!r} must be uint8 [t, h, w, 3], got {dtype} {[*shape]}."
            )
    lengths = {name: len(pictures) for name, pictures in frames.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"The {kind}s must have equally many pictures, got {lengths}.")
    if not arranged:
        return {view.name: view.picture(frames) for view in views}
    for view in views:
        if (size := frames[view.name].shape[1:3]) != (view.height, view.width):
            raise ValueError(
                f"The finished pictures of the view {view.name!r} are {size[0]}x{size[1]}, but the "
                f"model sees {view.height}x{view.width}."
            )
    return dict(frames)


# The arrangement of one picture.


def camera_rows(
    video: str | Sequence[str] | Sequence[Sequence[str]], setting: str = "video"
) -> Rows:
    """The rows of cameras, top to bottom, that `dataset.video` in a config describes.

    Args:
        video: a stream; several, which fill a near-square grid row by row; or rows of streams,
            whose cameras share the width equally. "" is a black cell.
        setting: the name of `video`, for the error.
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
            f"{setting} must be a stream's name, several, or rows of them, such as "
            f"(('front', 'side'), ('wrist',)), got {video!r}"
        )
    return rows


def cameras(rows: Rows) -> tuple[str, ...]:
    """The distinct streams of `rows`; the first one's timestamps are the clock of all."""
    return tuple(dict.fromkeys(name for row in rows for name in row if name))


def tile(
    rows: Rows,
    frames: Mapping[str, np.ndarray],
    height: int,
    width: int,
    variations: Mapping[str, Variation] = MappingProxyType({}),
) -> np.ndarray:
    """Tiles the cameras' frames, each resized by area to fill its cell.

    Args:
        rows: from `camera_rows`.
        frames: camera -> uint8 [t, any h, any w, 3].
        height, width: size of the tiled frame, pixels.
        variations: camera -> what else is done to its frames.

    Returns:
        uint8 [t, height, width, 3]; a single camera's own array if it has that size.
    """
    if len(rows) == len(rows[0]) == 1 and rows[0][0]:
        (name,) = rows[0]
        return variations.get(name, WHOLE).picture(frames[name], height, width)
    whole = np.zeros((len(next(iter(frames.values()))), height, width, 3), np.uint8)
    for names, top, bottom in zip(rows, *_edges(height, len(rows))):
        for name, left, right in zip(names, *_edges(width, len(names))):
            if name:
                shown = variations.get(name, WHOLE)
                cell = shown.picture(frames[name], bottom - top, right - left)
                whole[:, top:bottom, left:right] = cell
    return whole


def _edges(length: int, parts: int) -> tuple[list[int], list[int]]:
    """Starts and ends of `parts` intervals of pixels, equal to within one pixel."""
    edges = [round(i * length / parts) for i in range(parts + 1)]
    return edges[:-1], edges[1:]
