"""A video kept as numbered pictures, `im_0.jpg`, `im_1.jpg`, ..."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


class JpegFolder:
    """A `FrameReader` over the pictures of a folder.

    Args:
        folder: holds `im_<number>.jpg`, from 0 on.
        skip: pictures at the beginning that are left out.

    Raises:
        ValueError: if one is missing in between.
    """

    def __init__(self, folder: Path, skip: int = 0):
        self.folder = folder
        self._skip = skip
        names = {file.name for file in folder.glob("im_*.jpg")}
        missing = next((i for i in range(len(names)) if f"im_{i}.jpg" not in names), None)
        if missing is not None:
            raise ValueError(f"{folder}: im_{missing}.jpg is missing; copy it again")
        self._length = max(len(names) - skip, 0)

    def __len__(self) -> int:
        return self._length

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Frames at `indices` (any order, repeats allowed): uint8 [k, h, w, 3]."""
        indices = [int(i) for i in indices]
        if not indices:
            raise ValueError(f"{self.folder}: no frame indices were given")
        bad = [i for i in indices if not 0 <= i < self._length]
        if bad:
            raise IndexError(f"{self.folder}: frame {bad[0]} asked for, but there are {len(self)}")
        frames = {i: self._picture(i + self._skip) for i in set(indices)}
        if len({frame.shape for frame in frames.values()}) > 1:
            raise ValueError(f"{self.folder}: the pictures have different sizes")
        return np.stack([frames[i] for i in indices])

    def _picture(self, number: int) -> np.ndarray:
        file = self.folder / f"im_{number}.jpg"
        try:
            with Image.open(file) as picture:
                return np.asarray(picture.convert("RGB"))
        except OSError as error:  # Pillow's for damage too
            raise ValueError(f"{file}: not a readable picture ({error}); copy it again") from error
