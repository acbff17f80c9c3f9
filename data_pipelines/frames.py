"""Frames: the base of every reader of stored frames, image decoding, resizing.

A camera of an `Episode` is a `FrameReader`. Readers derive from `Frames`; those that store each
frame as a JPEG or PNG derive from `ImageFrames`. A reader can be pickled: it holds names and
numbers, and the pool with the open files is emptied by pickling.
"""

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data_pipelines.episode import reason


class Frames(ABC):
    """Base of the `FrameReader`s; a subclass reads increasing frame numbers without repeats.

    Args:
        where: the file or folder, for messages.
        length: the number of frames.
    """

    findings: tuple[str, ...] = ()  # become those of the `Episode`

    def __init__(self, where: object, length: int):
        self.where = where
        self._length = length

    def __len__(self) -> int:
        return self._length

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Frames at `indices` (any order, repeats allowed): uint8 [k, h, w, 3].

        Raises:
            IndexError: if a frame does not exist.
            ValueError: if no indices are given, or frames are damaged or differ in size.
        """
        indices = np.asarray(indices, np.int64)
        if not len(indices):
            raise ValueError(f"{self.where}: no frame indices were given")
        bad = indices[(indices < 0) | (indices >= len(self))]
        if len(bad):
            raise IndexError(f"{self.where}: frame {bad[0]} asked for, but there are {len(self)}")
        unique, places = np.unique(indices, return_inverse=True)
        frames = self._read(unique.tolist())
        return frames if np.array_equal(unique, indices) else frames[places]

    @abstractmethod
    def _read(self, numbers: list[int]) -> np.ndarray:
        """Frames at increasing numbers, all of which exist: uint8 [k, h, w, 3]."""


class ImageFrames(Frames):
    """Base of the readers whose frames are stored as JPEG or PNG images."""

    @abstractmethod
    def encoded(self, number: int) -> bytes | Path:
        """One image as it is stored, or the file that holds it."""

    def name(self, number: int) -> str:
        """The name of one image, for messages."""
        return f"{self.where}: image {number}"

    def _read(self, numbers: list[int]) -> np.ndarray:
        frames = [decode_image(self.encoded(n), self.name(n)) for n in numbers]
        if len(sizes := {frame.shape for frame in frames}) > 1:
            raise ValueError(f"{self.where}: the images have different sizes, {sorted(sizes)}")
        return np.stack(frames)


def decode_image(image: bytes | Path, where: object) -> np.ndarray:
    """Decodes an image of any kind that Pillow knows: uint8 [h, w, 3], see `to_rgb`.

    Args:
        image: the encoded bytes, or the file.
        where: the file, for messages.

    Raises:
        ValueError: if it is damaged, an animation, or not an opaque picture of 8 bits.
    """
    try:
        with Image.open(image if isinstance(image, Path) else io.BytesIO(image)) as opened:
            count = moments(opened)
            frame = to_rgb(opened) if count == 1 else None
    except NotOpaqueColour as error:
        raise ValueError(f"{where}: {error}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's
        if isinstance(image, Path) and (placeholder := reason(image, "")):
            raise ValueError(f"{where}: {placeholder}") from None
        raise ValueError(f"{where}: not a readable image ({error}); copy it again") from error
    if frame is None:
        raise ValueError(f"{where}: an animation of {count} frames; store one image per frame")
    return frame


_ANIMATED = ("GIF", "WEBP", "PNG")  # formats whose further pictures are later, not alternatives


def moments(picture: Image.Image) -> int:
    """The number of frames of an animation, 1 for any other picture."""
    return getattr(picture, "n_frames", 1) if picture.format in _ANIMATED else 1


class NotOpaqueColour(ValueError):
    """A picture whose values are not opaque colours of 8 bits."""


def to_rgb(picture: Image.Image) -> np.ndarray:
    """A picture as viewers show it, upright by its EXIF tag: uint8 [h, w, 3].

    Colours of 16 bits are rounded down to 8.

    Raises:
        NotOpaqueColour: for one channel of more than 8 bits, which Pillow would clip to white, and
            for parts that are transparent, as nothing says what is to be seen behind them.
        OSError: or another error of Pillow, if it is damaged.
    """
    if picture.mode.startswith(("I", "F")):
        raise NotOpaqueColour(
            f"one channel of more than 8 bits (Pillow's mode {picture.mode}), such as depth, where "
            "8-bit grey or colours are expected; convert it"
        )
    if "A" in picture.getbands() or "transparency" in picture.info:
        least, most = picture.convert("RGBA").getchannel("A").getextrema()
        if least != most:  # one value for all says nothing
            raise NotOpaqueColour("parts are transparent; save it with a background")
    return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))


def cover(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scales frames until they cover height x width, then crops the centre.

    Cosmos-Predict2 prepares its conditioning images this way.

    Args:
        frames: uint8 [t, h, w, 3].
        height, width: output size, pixels.

    Returns:
        uint8 [t, height, width, 3].
    """
    h, w = frames.shape[1:3]
    if height * w >= width * h:  # the height decides; the width is rounded up
        scaled = height, -(-w * height // h)
    else:
        scaled = -(-h * width // w), width
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    return resize_area(frames, *scaled)[:, top : top + height, left : left + width]


def side_by_side(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures in one row, for people to look at.

    Args:
        pictures: uint8 [any h, any w, 3] each.

    Returns:
        uint8 [h, w, 3], as high as the highest of them. Each keeps its aspect, but for a pixel: its
        width is even, as videos need it.
    """
    height = max(map(len, pictures))
    widths = [2 * round(p.shape[1] * height / len(p) / 2) for p in pictures]
    row = [resize_area(p[None], height, width)[0] for p, width in zip(pictures, widths)]
    return np.concatenate(row, axis=1)


def resize_area(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes frames without aliasing.

    If both sides shrink by whole factors, every output pixel is the rounded mean of its box;
    otherwise Pillow's antialiased bilinear filter is used, as in the release.

    Args:
        frames: uint8 [t, h, w, 3].
        height, width: output size, pixels.

    Returns:
        uint8 [t, height, width, 3]; the input itself if it already has that size.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(
            f"Frames are {frames.dtype} {frames.shape}; resize_area expects uint8 [t, h, w, 3]."
        )
    h, w = frames.shape[1:3]
    if (h, w) == (height, width):
        return frames
    if h % height or w % width:
        size, bilinear = (width, height), Image.Resampling.BILINEAR
        return np.stack([np.asarray(Image.fromarray(f).resize(size, bilinear)) for f in frames])
    rows, columns = h // height, w // width
    area = rows * columns
    kind = np.uint32 if area > 256 else np.uint16  # uint16 holds the sum of up to 256 pixels
    # Adding whole strided planes is several times faster than reducing over tiny axes.
    total = np.full((len(frames), height, width, 3), area // 2, kind)
    for row in range(rows):
        for column in range(columns):
            total += frames[:, row::rows, column::columns]
    return (total // area).astype(np.uint8)
