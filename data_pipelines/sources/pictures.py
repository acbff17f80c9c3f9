"""Pictures that are stored as arrays: which axis is which, and RGB out of them."""

import numpy as np

from data_pipelines.frames import Frames

_CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
_SMALLEST = 8  # pixels; smaller arrays without channels are numbers
_DEPTH = 64  # pixels; arrays of numbers that are larger on both sides are maps, such as depth
JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"


def axes(dtype: np.dtype, shape: tuple[int, ...]) -> str:
    """How an array [n, ...] holds pictures: "hwc", "chw" or "hw"; "" if it holds numbers.

    Raises:
        ValueError: if it holds neither surely; the text says why.
    """
    each = list(shape[1:])
    if dtype == np.uint8 and len(each) == 3:
        last, first = each[2] in _CHANNELS, each[0] in _CHANNELS
        if each[2] == 3 or (last and not first):
            return "hwc"
        if first and not last:
            return "chw"
        raise ValueError(f"pictures of shape {each}: it is not clear which axis holds the colours")
    if dtype == np.uint8 and len(each) == 2 and min(each) >= _SMALLEST:
        return "hw"
    if len(each) >= 3:
        raise ValueError(
            f"{dtype.name} {each}: depth, or pictures whose range is not known; a camera is uint8 "
            "[h, w, 3]"
        )
    if len(each) == 2 and min(each) >= _DEPTH:
        raise ValueError(f"{dtype.name} {each}: a map, such as depth; these are not read")
    return ""


def rgb(frames: np.ndarray, order: str) -> np.ndarray:
    """Pictures with these `axes` as [n, h, w, 3].

    Grey is repeated. A fourth channel is dropped, as IsaacLab does for the RGBA of its renderer.
    """
    if order == "chw":
        frames = np.moveaxis(frames, 1, -1)
    elif order == "hw":
        frames = frames[..., None]
    return np.repeat(frames, 3, -1) if frames.shape[-1] == 1 else frames[..., :3]


def is_encoded(image: bytes) -> bool:
    """Whether these bytes begin as a JPEG, PNG or WebP does."""
    return image.startswith((JPEG, PNG)) or (image[:4], image[8:12]) == (b"RIFF", b"WEBP")


def encoded_fault(image: bytes) -> str:
    """Why these bytes are not a picture that can be decoded, by their beginning; "" if they are."""
    if image.startswith(PNG):
        bits, colours = image[24:25], image[25:26]  # of the header chunk; 0 and 4 are grey
        deep = bits > b"\x08" and colours in (b"\0", b"\4")
        return "grey pictures of more than 8 bits, such as depth" if deep else ""
    if is_encoded(image):
        return ""
    return "bytes that are no JPEG, PNG or WebP" if image else "its first picture is empty"


class ArrayFrames(Frames):
    """Frames that are held in memory, with these `axes`."""

    def __init__(self, where: object, frames: np.ndarray, order: str = "hwc"):
        super().__init__(where, len(frames))
        self._frames, self._order = frames, order

    def _read(self, numbers: list[int]) -> np.ndarray:
        return rgb(self._frames[numbers], self._order)
