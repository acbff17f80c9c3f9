"""Pictures of an RLDS episode as frames: kept encoded until they are asked for."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image


class EncodedFrames:
    """A `FrameReader` over JPEG, PNG or other pictures inside a record.

    Args:
        record: the bytes that hold them all, shared by the cameras of an episode.
        places: the first byte of each picture and the one past its end.
        where: for messages.
    """

    def __init__(self, record: bytes, places: Sequence[tuple[int, int]], where: str):
        self._record = record
        self._places = places
        self._where = where

    def __len__(self) -> int:
        return len(self._places)

    def encoded(self, index: int) -> bytes:
        """One picture as it is stored."""
        return self._record[slice(*self._places[index])]

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Frames at `indices` (any order, repeats allowed): uint8 [k, h, w, 3].

        Raises:
            ValueError: if a picture is damaged, or not as large as the others.
        """
        indices = _checked(indices, len(self), self._where)
        frames = {i: self._decode(i) for i in sorted(set(indices))}
        if len(sizes := {frame.shape for frame in frames.values()}) > 1:
            raise ValueError(f"{self._where}: the pictures have different sizes, {sorted(sizes)}")
        return np.stack([frames[i] for i in indices])

    def _decode(self, index: int) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(self.encoded(index))) as picture:
                return np.asarray(picture.convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{self._where}: picture {index} cannot be read ({error}); copy the file again"
            ) from error


class ArrayFrames:
    """A `FrameReader` over pictures that are stored as numbers, uint8 [n, h, w, 3]."""

    def __init__(self, frames: np.ndarray):
        self._frames = frames

    def __len__(self) -> int:
        return len(self._frames)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Frames at `indices` (any order, repeats allowed): uint8 [k, h, w, 3]."""
        return self._frames[_checked(indices, len(self), "pictures")]


def _checked(indices: Sequence[int], length: int, where: str) -> list[int]:
    indices = [int(i) for i in indices]
    if not indices:
        raise ValueError(f"{where}: no frame indices were given")
    if bad := [i for i in indices if not 0 <= i < length]:
        raise IndexError(f"{where}: frame {bad[0]} asked for, but there are {length}")
    return indices
