"""Frames and pictures: the base of every reader of stored frames, decoding, resizing.

A camera of an `Episode` is a `FrameReader`. Readers derive from `Frames`, those whose frames are
JPEG or PNG pictures from `Pictures`. They keep names and numbers only, so that they can be pickled;
open files stay in a pool, which pickling empties.
"""

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


class Frames(ABC):
    """Base of the `FrameReader`s: a subclass reads frames in increasing order, each once.

    Args:
        where: the file or folder, for messages.
        length: the number of frames.
    """

    def __init__(self, where: object, length: int):
        self.where = where
        self._length = length

    def __len__(self) -> int:
        return self._length

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Frames at `indices` (any order, repeats allowed): uint8 [k, h, w, 3].

        Raises:
            IndexError: for a frame that does not exist.
            ValueError: for no indices, or frames that are damaged or differ in size.
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


class Pictures(Frames):
    """Base of the readers of frames that are stored as JPEG or PNG pictures."""

    upright = False  # whether pictures are turned as their EXIF tag says

    @abstractmethod
    def encoded(self, number: int) -> bytes | Path:
        """A picture as it is stored, or the file that holds it."""

    def name(self, number: int) -> str:
        """Of a picture, for messages."""
        return f"{self.where}: picture {number}"

    def _read(self, numbers: list[int]) -> np.ndarray:
        frames = [decode_picture(self.encoded(n), self.name(n), self.upright) for n in numbers]
        if len(sizes := {frame.shape for frame in frames}) > 1:
            raise ValueError(f"{self.where}: the pictures have different sizes, {sorted(sizes)}")
        return np.stack(frames)


def decode_picture(picture: bytes | Path, where: object, upright: bool = False) -> np.ndarray:
    """Decodes a picture of any kind that Pillow knows: uint8 [h, w, 3].

    Args:
        picture: the encoded bytes, or the file.
        where: for messages.
        upright: turn it as its EXIF tag says.

    Raises:
        ValueError: if it is damaged, or has more than 8 bits, which Pillow would cut off.
    """
    try:
        with Image.open(picture if isinstance(picture, Path) else io.BytesIO(picture)) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError("it has more than 8 bits; depth is not read")
            return np.asarray((ImageOps.exif_transpose(image) if upright else image).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's
        raise ValueError(f"{where}: not a readable picture ({error}); copy it again") from error


def cover(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scales frames until they cover the size, without aliasing, and cuts out the centre.

    Source: Cosmos-Predict2, which treats its conditioning pictures so.

    Args:
        frames: uint8 [t, h, w, 3].
        height, width: of the output, pixels.

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


def resize_area(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes frames without aliasing.

    Where both sides shrink by whole factors every output pixel is the rounded mean of its box;
    otherwise Pillow's antialiased bilinear filter is used, which is the release's resize.

    Args:
        frames: uint8 [t, h, w, 3].
        height: output height, pixels.
        width: output width, pixels.

    Returns:
        uint8 [t, height, width, 3]; the input itself when it already has that size.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(
            f"Frames are {frames.dtype} {frames.shape}; resize_area expects uint8 [t, h, w, 3]."
        )
    _, h, w, _ = frames.shape
    if (h, w) == (height, width):
        return frames
    if h % height or w % width:
        images = [
            Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR)
            for frame in frames
        ]
        return np.stack([np.asarray(image) for image in images])
    rows, columns = h // height, w // width
    area = rows * columns
    # Adding whole strided planes is several times faster than reducing over tiny axes.
    total = np.full(
        (len(frames), height, width, 3), area // 2, np.uint32 if area > 256 else np.uint16
    )
    for row in range(rows):
        for column in range(columns):
            total += frames[:, row::rows, column::columns]
    return (total // area).astype(np.uint8)
