"""Where a video lies, and the list of its frames, taken from its packets (nothing is decoded)."""

import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np

from data_pipelines.episode import reason

# The times of a video's frames from an MP4's own tables (ISO/IEC 14496-12), in one short read.
#
# FFmpeg tells times packet by packet, for which the whole file is read: hours of film on a network
# disk. The tables are the last megabyte or so of it.


_HEADER = 16  # bytes of a box's size, type and, for large ones, 64-bit size


@dataclass(frozen=True)
class FrameTables:
    """The frames of a track, in the order in which they are stored.

    Attributes:
        pts: int64 [n], when each is shown, up to one constant for all (an edit list's).
        keys: int64 [k], which of them can be decoded without others.
        time_base: seconds per unit.
    """

    pts: np.ndarray
    keys: np.ndarray
    time_base: Fraction


def read_tables(path: Path, offset: int, size: int, count: int) -> FrameTables | None:
    """The frames of the only video track.

    Args:
        path: the file.
        offset, size: bytes of the video in it.
        count: how many frames it has, 1 or more.

    Returns:
        None if there are no such tables of so many frames: another container, a fragmented MP4,
        several video tracks, an edit list that does more than move the beginning, or damage.
    """
    moov = _movie(path, offset, size)
    boxes = dict(_boxes(moov))
    tracks = [dict(_boxes(content)) for name, content in _boxes(moov) if name == b"trak"]
    videos = [track for track in tracks if _handler(track) == b"vide"]
    if b"mvex" in boxes or len(videos) != 1 or _edits(videos[0]) > 1:
        return None
    media = dict(_boxes(videos[0][b"mdia"]))
    tables = dict(_boxes(dict(_boxes(media.get(b"minf", b""))).get(b"stbl", b"")))
    head = media.get(b"mdhd", b"")
    scale = int.from_bytes(head[20:24] if head[:1] == b"\1" else head[12:16], "big")
    durations = _runs(tables.get(b"stts", b""), count)
    delays = _runs(tables[b"ctts"], count) if b"ctts" in tables else np.zeros(count, np.int64)
    keys = np.arange(count)
    if b"stss" in tables:
        keys = _numbers(tables[b"stss"], ">u4").astype(np.int64) - 1
    ordered = len(keys) and keys[0] >= 0 and keys[-1] < count and (np.diff(keys) > 0).all()
    if durations is None or delays is None or not ordered or not scale:
        return None
    return FrameTables(np.cumsum(durations) - durations + delays, keys, Fraction(1, scale))


def _movie(path: Path, offset: int, size: int) -> bytes:
    """The content of the box that describes the whole; b"" if there is none."""
    at, end = offset, offset + size
    with path.open("rb", buffering=0) as file:
        while at + 8 <= end:
            file.seek(at)
            head = file.read(_HEADER)
            length, start = _length(head, end - at)
            if length < start or at + length > end:
                return b""
            if head[4:8] == b"moov":
                file.seek(at + start)
                return file.read(length - start)
            at += length
    return b""


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and content of each box, up to one that is damaged."""
    at = 0
    while at + 8 <= len(data):
        head = data[at : at + _HEADER]
        length, start = _length(head, len(data) - at)
        if length < start or at + length > len(data):
            return
        yield head[4:8], data[at + start : at + length]
        at += length


def _length(head: bytes, rest: int) -> tuple[int, int]:
    """How long a box is, and where in it its content begins."""
    length = int.from_bytes(head[:4], "big")
    if length == 1:
        return int.from_bytes(head[8:16], "big"), 16
    return length or rest, 8


def _handler(track: dict[bytes, bytes]) -> bytes:
    return dict(_boxes(track.get(b"mdia", b""))).get(b"hdlr", b"")[8:12]


def _edits(track: dict[bytes, bytes]) -> int:
    """How many parts of the track are shown."""
    content = dict(_boxes(track.get(b"edts", b""))).get(b"elst", b"")
    size = 8 if content[:1] == b"\1" else 4
    entries = _numbers(content, [("length", f">i{size}"), ("time", f">i{size}"), ("rate", ">i4")])
    return int((entries["time"] != -1).sum())  # -1 is a pause before the beginning


def _runs(table: bytes, count: int) -> np.ndarray | None:
    """The values of a table of (how many, value), written out: int64 [count]."""
    runs = _numbers(table, [("count", ">u4"), ("value", ">i4")])
    if int(runs["count"].sum(dtype=np.int64)) != count:
        return None
    return np.repeat(runs["value"].astype(np.int64), runs["count"])


def _numbers(table: bytes, kind: str | list[tuple[str, str]]) -> np.ndarray:
    """The entries of a table, which begins with its version and their number."""
    kind = np.dtype(kind)
    count = min(int.from_bytes(table[4:8], "big"), (len(table) - 8) // kind.itemsize)
    return np.frombuffer(table[8 : 8 + count * kind.itemsize], kind)


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
