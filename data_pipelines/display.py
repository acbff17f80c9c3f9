"""How a video is to be shown: what a frame says about rotation, colours and pixels.

A container or a codec may say that frames are to be rotated, that their colours mean something else
than usual, or that their pixels are not square. Rotation is applied, as players and FFmpeg do. What
would give other pictures than a player's, and cannot be put right, is refused or is a finding.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type

_SLANT = 0.0175  # radians by which a rotation may miss a multiple of 90 degrees (FFmpeg: 1 degree)
_SQUARE = 0.01  # by which the ratio of a pixel's sides may differ from 1; scaling rounds it
# Code points of ITU-T H.273.
_HDR = {16: "PQ", 18: "HLG"}
_WIDE = {9: "BT.2020", 11: "DCI-P3", 12: "Display P3"}


class Orientation(NamedTuple):
    """How a stored frame becomes the one that is shown: transposed, then mirrored."""

    transposed: bool
    rows: bool  # whether the order of the rows is reversed
    columns: bool

    def apply(self, frame: np.ndarray) -> np.ndarray:
        """A view [h, w, c] of a stored frame as it is shown."""
        frame = frame.swapaxes(0, 1) if self.transposed else frame
        return frame[:: -1 if self.rows else 1, :: -1 if self.columns else 1]


def orientation(frame: av.VideoFrame) -> Orientation:
    """The orientation by the display matrix, which decoders attach to every frame.

    Raises:
        ValueError: if it is not a multiple of 90 degrees, mirrored or not, or the container and the
            encoded frames differ.
    """
    data = frame.side_data
    entries = (data[number] for number in range(len(data)))
    found = {bytes(entry)[:20] for entry in entries if entry.type == Type.DISPLAYMATRIX}
    if not found:
        return Orientation(False, False, False)
    if len(found) > 1:
        raise ValueError(
            "its container and its encoded frames give different rotations; encode it again in the "
            "orientation in which it is shown"
        )
    # A point (x, y) is shown at (a x + c y, b x + d y); the translation is irrelevant.
    a, b, _, c, d = struct.unpack("=5i", found.pop())
    straight, crossed = max(abs(a), abs(d)), max(abs(b), abs(c))
    if crossed <= straight * _SLANT:  # also if the matrix says nothing, as all is zero
        return Orientation(False, rows=d < 0, columns=a < 0)
    if straight <= crossed * _SLANT:
        return Orientation(True, rows=b < 0, columns=c < 0)
    angle = -np.degrees(np.arctan2(b, a))
    raise ValueError(
        f"it must be rotated by {angle:.4g} degrees for display, which is not a multiple of 90; "
        "encode it again in the orientation in which it is shown"
    )


class Display(NamedTuple):
    """How a video is shown."""

    height: int  # pixels, after the rotation
    width: int
    findings: tuple[str, ...]  # see `Episode.findings`


def display(frame: av.VideoFrame, stream: av.VideoStream) -> Display:
    """How a video is shown, by its first frame; ValueError if it cannot be shown rightly."""
    kind = frame.format
    colours = [component for component in kind.components if not component.is_alpha]
    deep = max((component.bits for component in colours), default=8)
    if (len(colours) == 1 and deep > 8) or deep > 16:
        raise ValueError(
            f"its frames are {kind.name}, {len(colours)} channel(s) of {deep} bits, such as depth, "
            "where 8-bit grey or colours are expected; convert it"
        )
    try:
        rgb = frame.reformat(format="rgb24")
    except av.FFmpegError as error:
        raise ValueError(
            f"its colours cannot be converted to RGB ({kind.name}, colour matrix "
            f"{int(frame.colorspace)} of H.273: {error.strerror}); encode it again with BT.709"
        ) from error
    height, width = rgb.height, rgb.width
    if orientation(frame).transposed:
        height, width = width, height
    return Display(height, width, tuple(_findings(frame, stream)))


def _findings(frame: av.VideoFrame, stream: av.VideoStream) -> Iterator[str]:
    transfer, primaries = int(frame.color_trc), int(frame.color_primaries)
    if transfer in _HDR:
        yield (
            f"video is HDR ({_HDR[transfer]}) and is used without tone mapping, so that it looks "
            "pale; convert it to BT.709"
        )
    elif primaries in _WIDE:
        yield (
            f"video has the wide colours of {_WIDE[primaries]}, which are used like BT.709, so "
            "that they look pale; convert it to BT.709"
        )
    # Of VP8 and VP9, FFmpeg decodes the colours only.
    hidden = stream.metadata.get("alpha_mode") == "1"
    if hidden or any(component.is_alpha for component in frame.format.components):
        yield "video has transparent parts; the colours stored there are used"
    if frame.interlaced_frame:
        yield (
            "video is interlaced and is used without deinterlacing, so that each picture shows "
            "two moments; deinterlace it, for example with ffmpeg's filter bwdif"
        )
    if "frame_cropping" in getattr(stream.codec_context, "coded_side_data", ()):  # from PyAV 19
        yield (
            "video is to be cropped, as its container says, and is used whole; crop it when it is "
            "encoded"
        )
    shape = stream.sample_aspect_ratio
    if shape and abs(shape - 1) > _SQUARE:
        yield (
            f"video has pixels that are not square ({shape.numerator}:{shape.denominator}), used "
            "as if they were, so that it looks stretched; scale it to square pixels"
        )
