"""Where a video lies, and the list of its frames, taken from its packets (nothing is decoded)."""

import re
from array import array
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi")

_DURATION = re.compile(r"(\d+):(\d{2}):(\d{2}(?:\.\d+)?)")
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


def unreadable(place: VideoPlace, reason: object) -> str:
    """The message about a video that cannot be read."""
    return f"{place}: not a readable video ({reason}); copy or encode it again"


def read_index(place: VideoPlace) -> VideoIndex:
    """List the frames of a video.

    Raises:
        ValueError: if it is missing, no video, or cut off.
    """
    if not place.is_file():
        raise ValueError(f"{place}: the video is missing; copy or encode it again")
    try:
        with open_video(place) as container:
            if not container.streams.video:
                raise ValueError(unreadable(place, "it has no video stream"))
            stream = container.streams.video[0]
            packets = [
                (p.pts, p.is_keyframe, p.duration or 0)
                for p in container.demux(stream)
                if p.pts is not None and p.size
            ]
            declared, time_base = stream.frames, stream.time_base
            tagged = _DURATION.match(stream.metadata.get("DURATION", ""))
            is_matroska = "matroska" in container.format.name
    except av.FFmpegError as error:
        raise ValueError(unreadable(place, error)) from error
    if not packets or len(packets) < declared:
        raise ValueError(unreadable(place, f"{len(packets)} of {declared} frames are there"))
    pts = array("q", sorted(p for p, _, _ in packets))
    if is_matroska and tagged:  # these files do not say how many frames they should have
        hours, minutes, seconds = tagged.groups()
        should_end = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        ends = float(max(p + duration for p, _, duration in packets) * time_base)
        gap = float((pts[-1] - pts[0]) * time_base) / max(len(pts) - 1, 1)
        if ends + _SLACK_FRAMES * gap < should_end:
            raise ValueError(unreadable(place, f"it ends at {ends:.2f} s of {should_end:.2f} s"))
    return VideoIndex(pts, array("q", sorted(p for p, key, _ in packets if key)), time_base)
