"""The location of a video, and the index of its frames, for which only the first is decoded.

FFmpeg lists frames packet by packet and reads the whole file for that, which is slow for long
videos on a network disk. An MP4 also lists them in its own tables (ISO/IEC 14496-12), about the
last megabyte of the file. For long videos those are used, if FFmpeg agrees at both ends.
"""

import io
import re
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.codec.context import Flags
from av.stream import Disposition

from data_pipelines.display import display
from data_pipelines.episode import reason

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".m4v", ".avi")

_DURATION = re.compile(r"(\d+):(\d{2}):(\d{2}(?:\.\d+)?)")
_LONG = 2000  # frames; the tables are used for longer videos
_COMPARED = 50  # packets at the beginning
_REORDERED = 16  # frames; no codec moves one over more others
_SLACK_FRAMES = 3  # by which a tagged duration may exceed the end of the last frame


@dataclass(frozen=True)
class FileRange:
    """A video inside another file, such as a member of a tar; it is decoded in place."""

    path: Path
    offset: int  # bytes
    size: int
    name: str  # of the video, for messages

    def __str__(self) -> str:
        return f"{self.path}/{self.name}"


VideoPlace = Path | FileRange


@dataclass(frozen=True)
class VideoIndex:
    """Every frame of a file that is shown, in display order, in the stream's time base."""

    pts: array  # int64; a long video has 100,000s of frames
    keyframes: array  # their pts, also of those that an edit list hides
    time_base: Fraction
    height: int = 0  # as shown, pixels
    width: int = 0
    codec: str = ""
    findings: tuple[str, ...] = ()  # see `Episode.findings`
    clock: str = "pts"  # or "dts", if the container stores no presentation times
    zero: Fraction = Fraction(0)  # where players begin to count, seconds


def open_video(place: VideoPlace, **options: str) -> av.container.InputContainer:
    """Opens a video file, or a range of bytes through FFmpeg's `subfile` protocol."""
    # Absolute, as FFmpeg takes a relative name like "http:x" in a list of clips for a protocol.
    name = str(place.absolute() if isinstance(place, Path) else place.path.absolute())
    if isinstance(place, FileRange):
        name = f"subfile,,start,{place.offset},end,{place.offset + place.size},,:{name}"
    container = av.open(name, options=options)
    for context in filter(None, (stream.codec_context for stream in container.streams.video)):
        context.thread_count = 1  # the loader's own threads fill the cores
        context.flags |= Flags.unaligned  # crop the left exactly, too
    return container


def video_streams(container: av.container.InputContainer) -> list[av.VideoStream]:
    """The video streams of a file without its cover pictures."""
    return [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]


def unreadable(place: VideoPlace, error: object) -> str:
    """The message about a video that cannot be read."""
    file = place.path if isinstance(place, FileRange) else place
    return f"{place}: not a readable video ({reason(file, error)}); copy or encode it again"


def read_index(place: VideoPlace) -> VideoIndex:
    """The frame index of a video.

    Raises:
        ValueError: if it is missing, truncated or not a video, or cannot be shown rightly.
    """
    try:
        with open_video(place) as container:
            if not video_streams(container):
                raise ValueError(unreadable(place, "it has no video stream"))
            stream = video_streams(container)[0]
            if stream.codec_context is None:
                raise ValueError(unreadable(place, "it is damaged, or its codec is not supported"))
            index = index_of_tables(place, stream) if stream.frames > _LONG else None
            if index:
                return _with_display(place, index, stream)
        with open_video(place) as container:  # again, to read from the beginning
            stream = video_streams(container)[0]
            return _with_display(place, index_of_packets(place, stream), stream)
    except (av.FFmpegError, OSError) as error:
        raise ValueError(unreadable(place, error)) from error


def _with_display(place: VideoPlace, index: VideoIndex, stream: av.VideoStream) -> VideoIndex:
    """The index with what the first frame says about showing the video."""
    context = stream.codec_context
    stream.container.seek(index.keyframes[0], stream=stream)
    first = next(stream.container.decode(stream), None)
    if first is None:  # FFmpeg cannot seek everywhere in every container, such as MPEG-TS
        with open_video(place) as container:
            first = next(container.decode(video_streams(container)[0]), None)
    if first is None:
        raise ValueError(unreadable(place, "no frame can be decoded"))
    late = np.flatnonzero(np.diff(index.pts) <= 0)
    if len(late):
        seconds = float(index.pts[late[0]] * index.time_base)
        raise ValueError(unreadable(place, f"it has two frames at {seconds:.3f} s"))
    if index.clock == "dts" and context.has_b_frames:
        raise ValueError(
            f"{place}: an AVI does not store the order in which B-frames of {context.name} are "
            "shown, and this one has some; encode it again as an MP4"
        )
    try:
        height, width, findings = display(first, stream)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if len(video_streams(stream.container)) > 1:
        findings += ("video file has several video streams; the first was taken",)
    starts = [s.start_time * s.time_base for s in stream.container.streams if s.start_time]
    # The clock of these broadcasts begins anywhere, with FFmpeg at 1.4 s.
    zero = min(starts, default=Fraction(0)) if _is("mpegts", stream) or _is("mpeg", stream) else 0
    return replace(
        index,
        height=height,
        width=width,
        codec=context.name,
        findings=findings,
        zero=Fraction(zero),
    )


# In an AVI, which stores decoding times only. FFmpeg works out the order of older codecs.
_UNORDERED = ("h264", "hevc")
_EBML = (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67")  # Matroska's header, and its segment
_MPEG4_FRAME = b"\0\0\1\xb6"  # the start code of a frame in MPEG-4 part 2


def _is(container: str, stream: av.VideoStream) -> bool:
    return container in stream.container.format.name.split(",")


def index_of_packets(place: VideoPlace, stream: av.VideoStream) -> VideoIndex:
    """The index by FFmpeg, which reads the whole file; ValueError if it is truncated."""
    clock = "pts"
    if _is("avi", stream) and stream.codec_context.name in _UNORDERED:
        clock = "dts"
    mpeg4 = stream.codec_context.name == "mpeg4"
    packets = []
    for packet in stream.container.demux(stream):
        if packet.size:
            time = getattr(packet, clock)
            if time is None or (mpeg4 and bytes(packet).count(_MPEG4_FRAME) > 1):
                raise ValueError(
                    f"{place}: it does not store when each frame is shown, as some packets hold "
                    "several (DivX's packed B-frames) or have no time; encode it again as an MP4"
                )
            hidden = packet.is_discard or _never_shown(packet)
            packets.append((time, packet.is_keyframe, hidden, packet.duration or 0))
    shown = array("q", sorted(pts for pts, _, hidden, _ in packets if not hidden))
    ends = max((pts + duration for pts, _, _, duration in packets), default=0)
    _check_whole(place, stream, len(packets), shown, ends)
    keyframes = array("q", sorted(pts for pts, key, _, _ in packets if key))
    if not keyframes:
        raise ValueError(unreadable(place, "it has no keyframe"))
    first = next(pts for pts, key, _, _ in packets if key)
    if shown[0] < first:  # a cut may have removed the frames that these depend on
        with open_video(place) as container:
            times = (frame.pts for frame in container.decode(video_streams(container)[0]))
            start = next((time for time in times if time is not None), first)
        shown = shown[bisect_left(shown, min(start, first)) :]
    return VideoIndex(shown, keyframes, stream.time_base, clock=clock)


def _never_shown(packet: av.Packet) -> bool:
    """Whether it holds a frame that others refer to only, by its header in VP8 (RFC 6386, 9.1).

    Later codecs put such a frame into one packet with one that is shown.
    """
    return packet.stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 0x10


def _check_whole(
    place: VideoPlace, stream: av.VideoStream, found: int, shown: array, ends: int
) -> None:
    """ValueError if a file is truncated, which the containers tell in different ways.

    `found` is the number of packets, and `ends` the time at which the last of them ends.
    """
    declared = stream.frames
    if (_is("avi", stream) or _is("matroska", stream)) and _is_short(place):
        raise ValueError(unreadable(place, f"it is truncated after {found} frames"))
    if _is("avi", stream):
        # It declares empty chunks, too, which repeat the last frame; its index does not. Without
        # those that are lost to damage, all later frames would be too early.
        indexed = sum(entry.size > 0 for entry in stream.index_entries)
        if found < indexed:
            raise ValueError(unreadable(place, f"it has {found} of {indexed} frames"))
    elif found < declared:  # or an edit list ends before the last of them
        with open_video(place, ignore_editlist="1") as container:
            found = sum(p.size > 0 for p in container.demux(video_streams(container)[0]))
        if found < declared:
            raise ValueError(unreadable(place, f"it has {found} of {declared} frames"))
    if not shown:
        raise ValueError(unreadable(place, "it has no frames"))
    tagged = _DURATION.match(stream.metadata.get("DURATION", ""))
    if _is("matroska", stream) and tagged:
        # Matroska files do not declare a number of frames, but muxers tag the duration.
        hours, minutes, seconds = tagged.groups()
        should_end = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        slack = _SLACK_FRAMES * float(np.median(np.diff(shown))) if len(shown) > 1 else 0.0
        if float((ends + slack) * stream.time_base) < should_end:
            there = float(ends * stream.time_base)
            raise ValueError(unreadable(place, f"it ends at {there:.2f} s of {should_end:.2f} s"))


def _is_short(place: VideoPlace) -> bool:
    """Whether an AVI or Matroska file ends before its last RIFF chunk or its segment does."""
    inside = isinstance(place, FileRange)
    path, at, size = (place.path, place.offset, place.size) if inside else (place, 0, None)
    with path.open("rb") as file:
        end = at + (path.stat().st_size if size is None else size)
        while at + 8 <= end:
            file.seek(at)
            head = file.read(12)
            if head[:4] == b"RIFF" and head[4:8] != b"\xff" * 4:  # not written into a pipe
                at += 8 + int.from_bytes(head[4:8], "little")
                continue
            if head[:4] not in _EBML:
                break
            # The leading zero bits of the length say how many bytes it has; all ones is unknown.
            width = 9 - head[4].bit_length()
            length = int.from_bytes(head[4 : 4 + width], "big") - (1 << 7 * width)
            if width > 8 or length == (1 << 7 * width) - 1:
                break
            at += 4 + width + length
    return at > end


def index_of_tables(place: VideoPlace, stream: av.VideoStream) -> VideoIndex | None:
    """The index by the tables of an MP4; None if there are none or FFmpeg does not agree."""
    file, offset = (place.path, place.offset) if isinstance(place, FileRange) else (place, 0)
    size = place.size if isinstance(place, FileRange) else place.stat().st_size
    tables = _read_tables(file, offset, offset + size, stream.frames)
    container = stream.container
    packets = [p for p in islice(container.demux(stream), _COMPARED) if p.size]
    first = [p.pts for p in packets]
    if tables is None or None in first or not first:
        return None
    shown = [p.pts for p in packets if not p.is_discard]
    # The first that is shown must be among them, and not before a keyframe on which it depends.
    if len(shown) <= _REORDERED or min(shown) < first[0]:
        return None
    pts, keys, time_base = tables
    if time_base != stream.time_base:
        return None
    pts += first[0] - pts[0]  # an edit list shifts all frames by one constant
    container.seek(int(pts[keys[-1]]), stream=stream)
    packets = [p for p in container.demux(stream) if p.size]
    last = [p.pts for p in packets]
    if not last or first != pts[: len(first)].tolist() or last != pts[-len(last) :].tolist():
        return None
    if max((p.pts for p in packets if not p.is_discard), default=None) != pts.max():
        return None  # frames at the end are hidden
    frames = np.sort(pts[pts >= min(shown)]).tobytes()
    return VideoIndex(array("q", frames), array("q", np.sort(pts[keys]).tobytes()), time_base)


def _read_tables(
    path: Path, start: int, end: int, count: int
) -> tuple[np.ndarray, np.ndarray, Fraction] | None:
    """The `count` frames of the only video track, in the order in which they are stored.

    Returns:
        The presentation times (int64 [n], up to one constant), the numbers of the keyframes, and
        the time base. None for another container, a fragmented MP4, several video tracks, an edit
        list that does more than move the beginning, or damage.
    """
    with path.open("rb", buffering=0) as file:
        moov = next((box for box in _spans(file, start, end) if box[0] == b"moov"), None)
        if moov is None:
            return None
        file.seek(moov[1])
        boxes = _boxes(file.read(moov[2] - moov[1]))
    tracks = [content for name, content in boxes if name == b"trak"]
    videos = [t for t in tracks if _find(t, b"mdia", b"hdlr")[8:12] == b"vide"]
    if b"mvex" in dict(boxes) or len(videos) != 1:  # fragments have tables of their own
        return None
    edits = _find(videos[0], b"edts", b"elst")
    wide = 8 if edits[:1] == b"\1" else 4
    edits = _numbers(edits, [("length", f">i{wide}"), ("time", f">i{wide}"), ("rate", ">i4")])
    if (edits["time"] != -1).sum() > 1:  # -1 is a pause before the beginning
        return None
    head = _find(videos[0], b"mdia", b"mdhd")  # version 1 has 64-bit dates before the scale
    scale = int.from_bytes(head[20:24] if head[:1] == b"\1" else head[12:16], "big")
    # Frames are stored in decoding order. The presentation time of each is the sum of the durations
    # before it, plus its own delay where frames are reordered.
    tables = dict(_boxes(_find(videos[0], b"mdia", b"minf", b"stbl")))
    durations = _runs(tables.get(b"stts", b""), count)
    delays = _runs(tables[b"ctts"], count) if b"ctts" in tables else np.zeros(count, np.int64)
    keys = np.arange(count)  # without a table every frame is a keyframe
    if b"stss" in tables:
        keys = _numbers(tables[b"stss"], ">u4").astype(np.int64) - 1
    ordered = len(keys) and keys[0] >= 0 and keys[-1] < count and (np.diff(keys) > 0).all()
    if durations is None or delays is None or not ordered or not scale:
        return None
    return np.cumsum(durations) - durations + delays, keys, Fraction(1, scale)


def _find(data: bytes, *names: bytes) -> bytes:
    """The content of the box at a path of names; b"" if there is none."""
    for name in names:
        data = dict(_boxes(data)).get(name, b"")
    return data


def _boxes(data: bytes) -> list[tuple[bytes, bytes]]:
    """Type and content of each box."""
    return [(name, data[a:b]) for name, a, b in _spans(io.BytesIO(data), 0, len(data))]


def _spans(file: BinaryIO, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Type, content start and content end of each box, up to the first damaged one."""
    while at + 8 <= end:
        file.seek(at)
        head = file.read(16)
        # The size has 32 bits; 1 means that 64 bits follow the type, 0 that the box is the last.
        length, start = int.from_bytes(head[:4], "big") or end - at, 8
        if length == 1:
            length, start = int.from_bytes(head[8:16], "big"), 16
        if length < start or at + length > end:
            return
        yield head[4:8], at + start, at + length
        at += length


def _runs(table: bytes, count: int) -> np.ndarray | None:
    """A run-length encoded table, decoded: int64 [count]; None if it has another length."""
    runs = _numbers(table, [("count", ">u4"), ("value", ">i4")])
    if int(runs["count"].sum(dtype=np.int64)) != count:
        return None
    return np.repeat(runs["value"].astype(np.int64), runs["count"])


def _numbers(table: bytes, kind: str | list[tuple[str, str]]) -> np.ndarray:
    """The entries of a table, which follow its version (4 bytes) and their number (4 bytes)."""
    kind = np.dtype(kind)
    count = min(int.from_bytes(table[4:8], "big"), (len(table) - 8) // kind.itemsize)
    return np.frombuffer(table[8 : 8 + count * kind.itemsize], kind)
