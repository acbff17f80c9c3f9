"""The times of a video's frames from an MP4's own tables (ISO/IEC 14496-12), in one short read.

FFmpeg tells times packet by packet, for which the whole file is read: hours of film on a network
disk. The tables are the last megabyte or so of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

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
