"""One video of one or of several cameras: which frames belong together, and how they are tiled."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipelines.transforms import resize_area

Rows = tuple[tuple[str, ...], ...]


def camera_rows(video: str | Sequence[str] | Sequence[Sequence[str]]) -> Rows:
    """The rows of cameras that `dataset.video` in a config describes.

    Args:
        video: a stream; several, which fill a near-square grid row by row; or rows of streams. ""
            is a black cell.

    Returns:
        Rows from the top; in a row, cameras from the left share the width equally.

    Raises:
        ValueError: if it is no such description.
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
            f"video must be a stream's name, several, or rows of them, such as 'front' or "
            f"(('front', 'side'), ('wrist',)); got {video!r}"
        )
    return rows


def cameras(rows: Rows) -> tuple[str, ...]:
    """The distinct streams of `rows`; the first is the clock of the others."""
    return tuple(dict.fromkeys(name for row in rows for name in row if name))


def tile(rows: Rows, frames: Mapping[str, np.ndarray], height: int, width: int) -> np.ndarray:
    """One frame of all cameras, each resized without aliasing to fill its cell.

    Args:
        rows: as `camera_rows` gives them.
        frames: camera -> uint8 [t, any h, any w, 3].
        height, width: of the tiled frame, pixels.

    Returns:
        uint8 [t, height, width, 3]; a single camera's frames themselves if they have that size.
    """
    if len(cameras(rows)) == 1 and len(rows) == len(rows[0]) == 1:
        return resize_area(frames[rows[0][0]], height, width)
    count = len(frames[cameras(rows)[0]])
    whole = np.zeros((count, height, width, 3), np.uint8)
    for names, top, bottom in zip(rows, *_edges(height, len(rows))):
        for name, left, right in zip(names, *_edges(width, len(names))):
            if name:
                cell = resize_area(frames[name], bottom - top, right - left)
                whole[:, top:bottom, left:right] = cell
    return whole


def _edges(length: int, parts: int) -> tuple[list[int], list[int]]:
    """Starts and ends of `parts` stretches of pixels, equal to within one."""
    edges = [round(i * length / parts) for i in range(parts + 1)]
    return edges[:-1], edges[1:]
