"""Where a video lies, and the list of its frames, taken from its packets (nothing is decoded)."""

import re
from array import array
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np

from data_pipelines.mp4_tables import read_tables
from data_pipelines.unreadable import reason

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi")

_DURATION = re.compile(r"(\d+):(\d{2}):(\d{2}(?:\.\d+)?)")
_LONG = 2000  # frames from which it is worth while not to read the whole file
_COMPARED = 50  # frames at the beginning, more than lie between two that are shown in turn
_SLACK_FRAMES = 3  # by which a tagged duration may exceed the last frame


@dataclass(frozen=True)
class FileRange:
    """A video inside another file, such as a member of a tar; decoded where it lies.

    Attributes:
        path: the file.
        offset, size: bytes.
        name: of the video, for messages.
    """

    path: Path
    offset: int
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.path}/{self.name}"

    def is_file(self) -> bool:
        """Whether the file that holds the video is there."""
        return self.path.is_file()


VideoPlace = Path | FileRange


@dataclass(frozen=True)
class VideoIndex:
    """Every frame of a file, in display order, in the stream's time base."""

    pts: array  # int64; a long video has 100,000s of frames
    keyframes: array  # their pts
    time_base: Fraction


def open_video(place: VideoPlace) -> av.container.InputContainer:
    """Open a video file, or a range of bytes through FFmpeg's own `subfile` protocol."""
    if isinstance(place, FileRange):
        end = place.offset + place.size
        return av.open(f"subfile,,start,{place.offset},end,{end},,:{place.path.absolute()}")
    return av.open(str(place))


def unreadable(place: VideoPlace, error: object) -> str:
    """The message about a video that cannot be read."""
    file = place.path if isinstance(place, FileRange) else place
    return f"{place}: not a readable video ({reason(file, error)}); copy or encode it again"


def read_index(place: VideoPlace) -> VideoIndex:
    """List the frames of a video.

    Raises:
        ValueError: if it is missing, no video, or cut off.
    """
    try:
        if not place.is_file():
            raise ValueError(f"{place}: the video is missing; copy or encode it again")
        with open_video(place) as container:
            if not container.streams.video:
                raise ValueError(unreadable(place, "it has no video stream"))
            stream = container.streams.video[0]
            if stream.frames <= _LONG:
                return index_of_packets(place, stream)
            if index := index_of_tables(place, stream):
                return index
        with open_video(place) as container:  # from the beginning
            return index_of_packets(place, container.streams.video[0])
    except (av.FFmpegError, OSError) as error:
        raise ValueError(unreadable(place, error)) from error


def index_of_packets(place: VideoPlace, stream: av.VideoStream) -> VideoIndex:
    """The frames as FFmpeg names them one by one; reads the whole file.

    Raises:
        ValueError: if it is cut off.
    """
    container, declared = stream.container, stream.frames
    packets = [
        (p.pts, p.is_keyframe, p.duration or 0)
        for p in container.demux(stream)
        if p.pts is not None and p.size
    ]
    if not packets or len(packets) < declared:
        raise ValueError(unreadable(place, f"{len(packets)} of {declared} frames are there"))
    pts = array("q", sorted(p for p, _, _ in packets))
    tagged = _DURATION.match(stream.metadata.get("DURATION", ""))
    if "matroska" in container.format.name and tagged:
        # These files do not say how many frames they should have.
        hours, minutes, seconds = tagged.groups()
        should_end = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        ends = float(max(p + duration for p, _, duration in packets) * stream.time_base)
        gap = float((pts[-1] - pts[0]) * stream.time_base) / max(len(pts) - 1, 1)
        if ends + _SLACK_FRAMES * gap < should_end:
            raise ValueError(unreadable(place, f"it ends at {ends:.2f} s of {should_end:.2f} s"))
    keyframes = array("q", sorted(p for p, key, _ in packets if key))
    if not keyframes:
        raise ValueError(unreadable(place, "no frame of it can be decoded without others"))
    return VideoIndex(pts, keyframes, stream.time_base)


def index_of_tables(place: VideoPlace, stream: av.VideoStream) -> VideoIndex | None:
    """The frames as an MP4 lists them, where FFmpeg agrees at both ends; None where it does not."""
    if isinstance(place, FileRange):
        file, offset, size = place.path, place.offset, place.size
    else:
        file, offset, size = place, 0, place.stat().st_size
    tables = read_tables(file, offset, size, stream.frames)
    container = stream.container
    first = [p.pts for p in islice(container.demux(stream), _COMPARED) if p.size]
    if tables is None or tables.time_base != stream.time_base or None in first or not first:
        return None
    pts = tables.pts + (first[0] - tables.pts[0])
    container.seek(int(pts[tables.keys[-1]]), stream=stream)
    last = [p.pts for p in container.demux(stream) if p.size]
    if not last or first != pts[: len(first)].tolist() or last != pts[-len(last) :].tolist():
        return None
    shown, keyframes = np.sort(pts).tobytes(), np.sort(pts[tables.keys]).tobytes()
    return VideoIndex(array("q", shown), array("q", keyframes), stream.time_base)
