"""WebDataset: tar shards of samples; the files of a sample share a key.

    <path>/*.tar with    <key>.mp4    <key>.txt
                    or   <key>.mp4    <key>.json    {"caption": "..."}

Nothing is unpacked. One pass over the headers of a tar finds its samples; a video is then decoded
in place. Videos named `<key>.<camera>.mp4` become one stream per camera; `<key>.mp4` is the stream
"video". Other members, and a camera that cannot be read beside one that can, are in
`Episode.left_out`.
"""

import json
import logging
import os
import re
import tarfile
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

from data_pipelines.episode import Episode, LazyEpisodes, reason
from data_pipelines.sources.files import decode_text, repeat_marks
from data_pipelines.video import VideoFile, VideoPool
from data_pipelines.video_index import VIDEO_SUFFIXES, FileRange

log = logging.getLogger(__name__)

STREAM = "video"
COMPRESSED = (".tar.gz", ".tar.zst", ".tar.xz", ".tar.bz2", ".tgz")


def recognises(path: Path) -> bool:
    """Whether this is a tar, or a folder with some."""
    names = (entry.name for entry in path.iterdir()) if path.is_dir() else (path.name,)
    return any(name.lower().endswith((".tar", *COMPRESSED)) for name in names)


def open_webdataset(
    path: Path, *, name: str, embodiment: str, shards: str = "*.tar", caption: str = "caption"
) -> Sequence[Episode]:
    """Opens tar shards; videos and texts are read when an episode is accessed.

    A sample without a text or a video, the sample at which a shard is truncated, and a shard that
    cannot be read at all are errors of one episode each.

    Args:
        path: a tar, or the folder of the shards.
        name, embodiment: see `formats`.
        shards: pattern of the files to read, such as "train-*.tar".
        caption: the field of a sample's .json with its caption or list of captions; a .txt takes
            precedence.

    Raises:
        ValueError: if there are no shards, no shard can be read, or no sample has a video.
    """
    path = Path(path)
    files = [path] if path.is_file() else _shard_files(path, shards)
    found = [_index(file) for file in files]
    kinds = sum((shard.kinds for shard in found), Counter())
    if not any(map(_camera, kinds)):
        if not kinds and 0 in found[0].faults:
            raise ValueError(found[0].faults[0])
        raise ValueError(
            f"{path} has no samples with videos ({', '.join(VIDEO_SUFFIXES)}), only {sorted(kinds)}"
        )
    ends = list(accumulate(len(shard.starts) for shard in found))
    load = partial(_load, name, embodiment, VideoPool(), found, ends, caption)
    return LazyEpisodes(ends[-1], load)


def _shard_files(path: Path, pattern: str) -> list[Path]:
    files = []
    for name in sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(".")):
        # A compressed shard is listed, too, so that it is refused by name, not skipped silently.
        suffix = next((end for end in COMPRESSED if name.lower().endswith(end)), None)
        if fnmatch(f"{name[: -len(suffix)]}.tar" if suffix else name, pattern):
            files.append(path / name)
    if not files:
        raise ValueError(f"{path} is not a folder of tar shards: no file is named {pattern}")
    deeper = [e.name for e in path.iterdir() if e.is_dir() and any(e.glob("*.tar"))]
    if deeper:
        log.warning("%s: folders with shards are not read: %s", path, ", ".join(sorted(deeper)))
    if gaps := _gaps([file.name for file in files]):
        some = ", ".join(map(str, gaps[:_NAMED])) + (" and more" if len(gaps) > _NAMED else "")
        log.warning("%s: no shard has the number %s; are all of them there?", path, some)
    return files


def _gaps(names: list[str]) -> list[int]:
    """The numbers that are missing between those of shards named alike."""
    found: dict[tuple[str, str], set[int]] = {}
    for name in names:
        if parts := _NUMBERED.fullmatch(name):
            found.setdefault((parts[1], parts[3]), set()).add(int(parts[2]))
    return sorted(
        number
        for numbers in found.values()
        if max(numbers) - min(numbers) < 2 * len(numbers)  # or they are dates, say
        for number in range(min(numbers), max(numbers))
        if number not in numbers
    )


# WebDataset's rule: the key ends at the first dot of the file's name and includes its folders.
_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")
_NUMBERED = re.compile(r"(.*?)(\d+)(\D*)")  # the last number in a shard's name
_NAMED = 5  # numbers in a message
_LONGEST_PADDING = 1 << 20  # bytes of zeros at the end; tar writes 10,240 unless told otherwise
# How a compressed file begins, and what uncompresses it.
_MAGICS = {b"\x1f\x8b": "gunzip", b"(\xb5/\xfd": "unzstd", b"\xfd7zXZ": "unxz", b"BZh": "bunzip2"}


@dataclass
class Shard:
    """The samples of one tar, in its order; their headers are read again on access."""

    path: Path
    starts: array = field(default_factory=lambda: array("q"))  # offset of each sample, bytes
    kinds: Counter[str] = field(default_factory=Counter)  # of suffixes: "mp4", "cam0.mp4"
    marks: dict[int, str] = field(default_factory=dict)  # see `repeat_marks`
    faults: dict[int, str] = field(default_factory=dict)  # sample -> why it cannot be read
    apart: frozenset[str] = frozenset()  # keys whose files do not lie together

    def sample(self, number: int) -> tuple[str, dict[str, tarfile.TarInfo]]:
        """A sample's key, and its members by suffix; ValueError for a fault."""
        if number in self.faults:
            raise ValueError(self.faults[number])
        first, members = "", {}
        with self.path.open("rb") as file:
            for key, kind, member in _walk(file, self.starts[number]):
                if key != (first := first or key):
                    break
                if kind in members:
                    raise ValueError(f"{self.path}/{first} has two members {kind}; rename one")
                members[kind] = member
        return first, members


def _index(path: Path) -> Shard:
    """Finds the samples of a tar; a fault of the tar is attributed to its last sample."""
    shard, keys = Shard(path), []
    try:
        with path.open("rb") as file:
            start = file.read(8)
            command = next((c for magic, c in _MAGICS.items() if start.startswith(magic)), None)
            for key, kind, member in () if command else _walk(file, 0):
                if not keys or key != keys[-1]:
                    keys.append(key)
                    shard.starts.append(member.offset)
                shard.kinds[kind] += 1
        fault = "" if keys else ": the tar has no samples"
        if command:
            fault = (
                " is compressed, which rules out random access; uncompress it once with "
                f"{command} (compression hardly makes videos smaller)"
            )
    except OSError as error:
        fault = f": the shard cannot be read ({error.strerror})"
    except (tarfile.TarError, ValueError, OverflowError) as error:
        # ValueError and OverflowError come from impossible sizes and dates in a header.
        placeholder = reason(path, "")
        fault = f": {placeholder or f'not a readable tar ({error}); copy it again'}"
        if keys:
            fault = f": {error}; {keys[-1]} and all samples after it are lost; copy the tar again"
    shard.marks = repeat_marks(keys)
    shard.apart = frozenset(keys[index] for index in shard.marks)
    if fault:
        if not shard.starts:
            shard.starts.append(0)
        shard.faults[len(shard.starts) - 1] = f"{path}{fault}"
    return shard


def _walk(file: BinaryIO, start: int) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key, suffix ("cam0.mp4") and header of the files from a byte on; TarError for damage."""
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while member := tar.next():
            tar.members = []  # otherwise it keeps every header
            parts = _NAME.fullmatch(member.name)
            if member.isreg() and parts and not member.name.startswith("__"):
                yield parts[1], parts[2].lower(), member
            if member.issparse():
                raise tarfile.ReadError("the tar was made with --sparse, which is not supported")
    # `tarfile` also stops silently at a damaged header.
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"the tar is damaged or truncated at byte {tar.offset}")
    if os.fstat(file.fileno()).st_size - tar.offset > _LONGEST_PADDING:  # an unfinished download
        raise tarfile.ReadError(f"the tar is empty from byte {tar.offset} on")


def _load(
    name: str,
    embodiment: str,
    pool: VideoPool,
    shards: list[Shard],
    ends: list[int],  # number of samples up to the end of each shard
    caption: str,
    index: int,
) -> Episode:
    number = bisect_right(ends, index)
    shard = shards[number]
    index -= ends[number] - len(shard.starts)
    key, members = shard.sample(index)
    cameras = {_camera(kind): kind for kind in members if _camera(kind)}
    if not cameras:
        raise ValueError(f"{shard.path}/{key} has no video, only {_only(shard, key, members)}")
    read = {*cameras.values(), "txt", "json"}
    left_out = {kind: "a member that is not read" for kind in members if kind not in read}
    streams, faults, findings = {}, [], []
    for camera, kind in cameras.items():
        member = members[kind]
        place = FileRange(shard.path, member.offset_data, member.size, name=f"{key}.{kind}")
        video = VideoFile(place, pool=pool)
        try:
            streams[camera] = video.stream()
            findings += video.findings
        except ValueError as error:
            left_out[camera] = str(error)
            faults.append(error)
    if not streams:
        raise faults[0]
    return Episode(
        id=f"{shard.path.stem}/{key}{shard.marks.get(index, '')}",
        source=name,
        embodiment=embodiment,
        instructions=_captions(shard, key, members, caption, findings),
        streams=streams,
        cameras=tuple(streams),
        left_out=left_out,
        findings=tuple(dict.fromkeys(findings)),
    )


def _camera(kind: str) -> str:
    """The stream of a member with this suffix; "" if it is not a video."""
    camera, _, suffix = kind.rpartition(".")
    return (camera or STREAM) if f".{suffix}" in VIDEO_SUFFIXES else ""


def _only(shard: Shard, key: str, members: Mapping[str, tarfile.TarInfo]) -> str:
    """The members of a sample that lacks some, and where these may be."""
    elsewhere = " there; other files of this key lie apart, so make the tar with --sort=name"
    return f"{sorted(members)}{elsewhere if key in shard.apart else ''}"


def _captions(
    shard: Shard,
    key: str,
    members: Mapping[str, tarfile.TarInfo],
    wanted: str,
    findings: list[str],
) -> tuple[str, ...]:
    if "txt" in members:
        text = _text(shard.path, f"{key}.txt", members["txt"]).strip()
        if "json" in members:
            try:
                others = _listed(shard.path, f"{key}.json", members["json"], wanted)
            except ValueError:
                others = (text,)  # a .json with other things
            if text not in others:
                findings.append(f"the .txt differs from {wanted!r} in the .json; the .txt is taken")
        return (text,)
    if "json" not in members:
        only = _only(shard, key, members)
        raise ValueError(f"{shard.path}/{key} has no .txt or .json, only {only}")
    return _listed(shard.path, f"{key}.json", members["json"], wanted)


def _text(shard: Path, name: str, member: tarfile.TarInfo) -> str:
    with shard.open("rb") as file:
        file.seek(member.offset_data)
        return decode_text(file.read(member.size), f"{shard}/{name}")


def _listed(shard: Path, name: str, member: tarfile.TarInfo, wanted: str) -> tuple[str, ...]:
    """The captions in a sample's .json."""
    where = f"{shard}/{name}"
    try:
        content = json.loads(_text(shard, name, member))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    found = content.get(wanted) if isinstance(content, dict) else None
    captions = tuple(found) if isinstance(found, list) else (found,)
    if not captions or not all(isinstance(caption, str) for caption in captions):
        there = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"{where} has no text under {wanted!r} (it has {there}); set the option caption to the "
            "field"
        )
    return tuple(caption.strip() for caption in captions)
