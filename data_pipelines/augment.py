"""Augmentation: crops, small rotations and colours, drawn when pictures are encoded.

Latents are encoded once, so pictures cannot be changed while training. With `dataset.augment` an
encoding job makes several *variants* of every window instead, and each epoch of training reads
another one. Variant 0 is the centre crop, neither turned nor coloured: it is what a policy makes of
the pictures of its cameras, and what validation and evaluation show.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from data_pipelines.frames import resize_area

_MIDDLE = 127.5  # the grey that a contrast leaves as it is
# RGB to luma and two colour differences (YIQ, NTSC 1953).
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


@dataclass(frozen=True)
class Augment:
    """How the pictures of a dataset are augmented: its section `augment`.

    Attributes:
        variants: of every window; 1 switches the section off.
        crop: share of the height and of the width that a picture keeps, above 0, at most 1.
        rotation: largest angle to either side, degrees.
        brightness, contrast, saturation: the factor of each is from 1 - x to 1 + x.
        hue: largest turn of the colour circle to either side, as a share of it.
    """

    variants: int
    crop: float = 1.0
    rotation: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    @classmethod
    def of(cls, dataset: Any) -> "Augment":
        """That of a dataset's section of a config; `OFF` if it has none or one variant.

        Raises:
            ValueError: the section lacks `variants`, has other names, or asks for variants that
                are all alike.
        """
        section = dict(dataset.get("augment") or {})
        if not section:
            return OFF
        names = [field.name for field in fields(cls)]
        where = f"datasets.{dataset.get('name', '...')}.augment"
        if "variants" not in section or not set(section) <= set(names):
            raise ValueError(
                f"{where} must have variants (a number; 1 is off) and any of "
                f"{', '.join(names[1:])}, got {', '.join(section)}."
            )
        if section["variants"] == 1:
            return OFF
        augment = cls(**section)
        if augment == cls(augment.variants):
            raise ValueError(
                f"{where} asks for {augment.variants} variants, but neither for a crop below 1 nor "
                f"for any of {', '.join(names[2:])}: they would all be alike."
            )
        return augment

    def settings(self) -> dict[str, Any]:
        """What the records store of it: every value; {} if it is off."""
        return {} if self == OFF else asdict(self)

    def draw(self, variant: int, name: str) -> "Variation":
        """The variation of a camera's pictures in a variant of a window.

        Args:
            variant: 0 is the centre crop alone.
            name: of the dataset, the episode, the window and the camera. Nothing else decides the
                draw, so it is the same in any order and in any number of processes.
        """
        if variant == 0:
            return Variation(self.crop)
        digest = hashlib.blake2b(f"{name}/{variant}".encode(), digest_size=8).digest()
        # All are always drawn: a setting that is added does not change the others' draws.
        left, top, *others = np.random.default_rng(int.from_bytes(digest, "big")).random(7)
        turn, bright, strong, colourful, hue = (2 * np.array(others) - 1).tolist()
        return Variation(
            self.crop,
            float(left),
            float(top),
            turn * self.rotation,
            _colours(
                1 + bright * self.brightness,
                1 + strong * self.contrast,
                1 + colourful * self.saturation,
                hue * self.hue,
            ),
        )


OFF = Augment(1)


@dataclass(frozen=True)
class Variation:
    """What is done to the pictures of one camera: the same to all frames of a window.

    Attributes:
        crop: share of the height and of the width that is kept.
        left, top: where the crop lies, from 0 (at the left, at the top) to 1.
        degrees: by which the crop is turned about its centre, clockwise.
        colours: [3, 4] by rows, an affine map of the colours 0 to 255; () changes none.
    """

    crop: float = 1.0
    left: float = 0.5
    top: float = 0.5
    degrees: float = 0.0
    colours: tuple[float, ...] = ()

    def picture(self, frames: np.ndarray, height: int, width: int) -> np.ndarray:
        """The pictures of a camera as they are shown: uint8 [t, height, width, 3].

        Crop, rotation and size are one resampling. Beyond its edges a picture is mirrored, so a
        turned crop has no black corners. A whole picture is resized by `resize_area`.

        Args:
            frames: uint8 [t, any h, any w, 3].
            height, width: of the result, pixels.
        """
        shown = frames
        if self.degrees:
            shown = self._turned(frames, height, width)
        elif self.crop < 1:
            left, top, size = self._corner(frames)
            box = (left, top, left + size[1], top + size[0])
            bilinear = Image.Resampling.BILINEAR
            shown = _each(shown, lambda one: one.resize((width, height), bilinear, box))
        shown = resize_area(shown, height, width)
        if self.colours:
            shown = _each(shown, lambda one: one.convert("RGB", self.colours))
        return shown

    def _corner(self, frames: np.ndarray) -> tuple[float, float, tuple[float, float]]:
        """Left and top of the crop, and its height and width; pixels of the frames."""
        height, width = frames.shape[1:3]
        size = self.crop * height, self.crop * width
        return self.left * (width - size[1]), self.top * (height - size[0]), size

    def _turned(self, frames: np.ndarray, height: int, width: int) -> np.ndarray:
        """The turned crop, larger than height x width by whole factors where it would alias."""
        left, top, (h, w) = self._corner(frames)
        rows, columns = height * math.ceil(h / height), width * math.ceil(w / width)
        angle = math.radians(self.degrees)
        cos, sin = math.cos(angle), math.sin(angle)
        # From pixels (x, y) of the result to those of a frame; both centres are the crop's.
        a, b, d, e = cos * w / columns, sin * h / rows, -sin * w / columns, cos * h / rows
        c = left + w / 2 - (a * columns + b * rows) / 2
        f = top + h / 2 - (d * columns + e * rows) / 2
        across, down = (abs(cos) * w + abs(sin) * h) / 2, (abs(sin) * w + abs(cos) * h) / 2
        pad_x = _beyond(left + w / 2, across, frames.shape[2])
        pad_y = _beyond(top + h / 2, down, frames.shape[1])
        if pad_x or pad_y:
            around = ((0, 0), (pad_y, pad_y), (pad_x, pad_x), (0, 0))
            frames = np.pad(frames, around, mode="symmetric")
        data = (a, b, c + pad_x, d, e, f + pad_y)
        affine, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
        return _each(frames, lambda one: one.transform((columns, rows), affine, data, bilinear))


WHOLE = Variation()


def window_name(dataset: str, episode: str, anchor: int, camera: str) -> str:
    """The name by which the pictures of a camera in a window are drawn; see `Augment.draw`."""
    return f"{dataset}/{episode}/{anchor}/{camera}"


def kept_size(size: tuple[int, int], crop: float, shown: tuple[int, int]) -> tuple[int, int]:
    """The size at which frames are kept for their variants: not smaller than what they show.

    Args:
        size: height and width of the frames.
        crop: share of them that is shown.
        shown: height and width at which it is.
    """
    factor = min(int(crop * one / other) for one, other in zip(size, shown))
    return (size[0] // factor, size[1] // factor) if factor > 1 else size


def without_augment(dataset: ConfigDict) -> ConfigDict:
    """A dataset's section without `augment`."""
    if "augment" not in dataset:
        return dataset
    return ConfigDict({name: value for name, value in dataset.items() if name != "augment"})


def _colours(
    brightness: float, contrast: float, saturation: float, hue: float
) -> tuple[float, ...]:
    """The map of colours [3, 4] by rows: hue and saturation, then contrast, then brightness."""
    if (brightness, contrast, saturation, hue) == (1, 1, 1, 0):
        return ()
    angle = 2 * math.pi * hue
    cos, sin = saturation * math.cos(angle), saturation * math.sin(angle)
    turned = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    matrix = brightness * contrast * np.linalg.inv(_YIQ) @ turned @ _YIQ
    offset = brightness * (1 - contrast) * _MIDDLE
    return tuple(np.column_stack([matrix, [offset] * 3]).ravel().tolist())


def _beyond(centre: float, reach: float, length: int) -> int:
    """By how many pixels centre ± reach leaves 0 to length."""
    return math.ceil(max(0, reach - centre, centre + reach - length))


def _each(frames: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    changed = (change(Image.fromarray(frame)) for frame in frames)
    first = np.asarray(next(changed))
    out = np.empty((len(frames), *first.shape), np.uint8)
    out[0] = first
    for i, picture in enumerate(changed, 1):
        out[i] = picture
    return out
