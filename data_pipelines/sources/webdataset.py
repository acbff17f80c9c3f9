"""WebDataset: tar shards of samples, the files of a sample sharing a key.

    <path>/*.tar holding    <key>.mp4    <key>.txt
                       or   <key>.mp4    <key>.json    {"caption": "..."}

Nothing is unpacked. One pass over the headers says where the samples lie (`tar_index.py`); a video
is then decoded from its bytes inside the tar. Videos named `<key>.<camera>.mp4` become a stream per
camera; one named `<key>.mp4` is the stream "video".
"""

import json
import os
import re
import tarfile
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data_pipelines.episode import Episode, LazyEpisodes
from data_pipelines.sources.files import decode_text
from data_pipelines.video import VideoFile, VideoPool
from data_pipelines.video_index import VIDEO_SUFFIXES, FileRange

# Where the samples of a WebDataset shard lie, from one pass over the headers of the tar.
#
# The standard `tarfile` takes a damaged header for the end of the archive, so the walk is done
# here and only a header's 512 bytes are parsed by it. What is kept is 8 bytes per sample; its two
# or three headers are read again when it is asked for.


_BLOCK = 512
_LONGEST_NAME = 1 << 16  # bytes, of a name kept in a block of its own
_LONGEST_PADDING = 1 << 20  # bytes of zeros at the end; tar writes 10,240 unless told otherwise
_MAGICS = {
    b"\x1f\x8b": "gunzip",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"\xfd7zXZ": "unxz",
    b"BZh": "bunzip2",
}
# WebDataset's rule: the key ends at the first dot of the file's name, folders before it included.
_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")


class Place(NamedTuple):
    """Bytes of a member in the tar."""

    offset: int
    size: int


class _Member(NamedTuple):
    start: int  # of its first header
    key: str
    kind: str  # the ending of its name, in small letters: "mp4", "cam0.mp4"
    place: Place


@dataclass
class Shard:
    """The samples of one tar, in its order.

    Attributes:
        path: the tar.
        starts: where each sample begins, bytes.
        kinds: endings of names -> how many there are.
        repeats: number of a sample -> how often its key has come before.
        faults: number of a sample -> why it cannot be used; the last one of a tar that is cut off.
    """

    path: Path
    starts: array = field(default_factory=lambda: array("q"))
    kinds: Counter[str] = field(default_factory=Counter)
    repeats: dict[int, int] = field(default_factory=dict)
    faults: dict[int, str] = field(default_factory=dict)

    def sample(self, number: int) -> tuple[str, dict[str, Place]]:
        """A sample's key, and its members by the endings of their names.

        Raises:
            ValueError: if it has a fault.
        """
        if number in self.faults:
            raise ValueError(self.faults[number])
        key, members = "", {}
        with self.path.open("rb") as file:
            for member in _walk(file, self.starts[number]):
                if member.key != (key := key or member.key):
                    break
                members[member.kind] = member.place
        return key, members


def index_shard(path: Path) -> Shard:
    """Find the samples of a tar.

    Raises:
        ValueError: if it is missing, compressed, no tar at all, or has no samples.
    """
    shard = Shard(path)
    seen: Counter[str] = Counter()
    key = None
    try:
        with path.open("rb") as file:
            _refuse_compressed(path, file.read(8))
            for member in _walk(file, 0):
                if member.key != key:
                    key = member.key
                    if seen[key]:
                        shard.repeats[len(shard.starts)] = seen[key]
                    seen[key] += 1
                    shard.starts.append(member.start)
                shard.kinds[member.kind] += 1
    except FileNotFoundError:
        raise ValueError(f"{path}: the shard is missing") from None
    except OSError as error:
        raise ValueError(f"{path}: the shard cannot be read ({error.strerror})") from error
    except tarfile.TarError as error:
        if key is None:
            raise ValueError(f"{path}: not a readable tar ({error}); copy it again") from None
        # The sample it happens in may lack a part, and what comes after it is lost.
        shard.faults[len(shard.starts) - 1] = (
            f"{path}: {error}; {key} and all samples after it are lost; copy the tar again"
        )
    if key is None:
        raise ValueError(f"{path}: the tar holds no samples")
    return shard


def _refuse_compressed(path: Path, start: bytes) -> None:
    for magic, command in _MAGICS.items():
        if start.startswith(magic):
            raise ValueError(
                f"{path} is compressed, so no sample in it can be found without reading all before "
                f"it; uncompress it once with {command} (videos hardly get smaller by it)"
            )


def _walk(file: BinaryIO, at: int) -> Iterator[_Member]:
    """The members that belong to samples, from a byte on; TarError where the tar is damaged."""
    fd = file.fileno()
    size = os.fstat(fd).st_size
    start, long_name, long_size = at, "", None
    while True:
        try:
            header = tarfile.TarInfo.frombuf(os.pread(fd, _BLOCK, at), "utf-8", "surrogateescape")
        except tarfile.EOFHeaderError:
            if size - at > _LONGEST_PADDING:  # as of a download that is not finished
                raise tarfile.ReadError(f"the tar is empty from byte {at} on") from None
            return
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"the tar is damaged at byte {at} ({error})") from None
        data = at + _BLOCK
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            if header.size > _LONGEST_NAME:
                raise tarfile.ReadError(f"a name at byte {at} is {header.size} bytes long")
            content = os.pread(fd, header.size, data)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                long_name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
            else:
                records = _pax_records(content)
                long_name, long_size = records.get("path", long_name), records.get("size")
            length = header.size
        else:
            if header.type == tarfile.GNUTYPE_SPARSE:
                raise tarfile.ReadError("the tar was made with --sparse, which is not supported")
            length = int(long_size) if long_size else header.size
            length = length if header.isreg() or header.type == tarfile.XGLTYPE else 0
            name = long_name or header.name
            parts = _NAME.fullmatch(name)
            if header.isreg() and parts and not name.startswith("__"):
                yield _Member(start, parts[1], parts[2].lower(), Place(data, length))
            if data + length > size:  # after the member was named, so that its sample has the fault
                raise tarfile.ReadError(f"the tar ends inside {name}")
            long_name, long_size = "", None
        at = data + -(-length // _BLOCK) * _BLOCK
        if not long_name and long_size is None:
            start = at


def _pax_records(content: bytes) -> dict[str, str]:
    """The lines "<length> <key>=<value>" of an extended header."""
    records, at = {}, 0
    while at < len(content):
        length = content[at : at + 20].partition(b" ")[0]
        if not length.isdigit() or int(length) == 0:
            break  # padding
        line = content[at : at + int(length)].rstrip(b"\n").partition(b" ")[2]
        key, _, value = line.decode("utf-8", "surrogateescape").partition("=")
        records[key] = value
        at += int(length)
    if not records.get("size", "0").isdigit():
        raise tarfile.ReadError("an extended header gives no number as the size")
    return records


STREAM = "video"
COMPRESSED = (".tar.gz", ".tar.zst", ".tar.xz", ".tar.bz2", ".tgz")


def recognises(path: Path) -> bool:
    """Whether this is a tar, or a folder with some."""
    names = (entry.name for entry in path.iterdir()) if path.is_dir() else (path.name,)
    return any(name.lower().endswith((".tar", *COMPRESSED)) for name in names)


def open_webdataset(
    path: Path, *, name: str, embodiment: str, shards: str = "*.tar", caption: str = "caption"
) -> Sequence[Episode]:
    """Open tar shards; videos and texts are read when an episode is asked for.

    A sample without a text or a video, the sample in which a shard is cut off, and a shard that
    cannot be read at all are errors of one episode each.

    Args:
        path: a tar, or the folder of the shards.
        name: of the dataset, becomes `Episode.source`.
        embodiment: whose body is seen, e.g. "human".
        shards: which files of the folder, such as "train-*.tar".
        caption: the field of a sample's .json with its caption or list of captions; a .txt is
            preferred to it.

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
            f"{path} has no samples with videos ({', '.join(VIDEO_SUFFIXES)}); they hold "
            f"{sorted(kinds) or 'nothing'}"
        )
    ends = list(accumulate(len(shard.starts) for shard in found))
    return LazyEpisodes(ends[-1], _Dataset(name, embodiment, found, ends, caption).load)


@dataclass(frozen=True)
class _Dataset:
    name: str
    embodiment: str
    shards: list[Shard]
    ends: list[int]  # number of samples up to the end of each shard
    caption: str
    pool: VideoPool = field(default_factory=VideoPool)

    def load(self, index: int) -> Episode:
        number = bisect_right(self.ends, index)
        shard = self.shards[number]
        index -= self.ends[number] - len(shard.starts)
        key, members = shard.sample(index)
        cameras = {_camera(kind): kind for kind in members if _camera(kind)}
        if not cameras:
            raise ValueError(f"{shard.path}/{key} has no video, only {sorted(members)}")
        streams = {}
        for camera, kind in cameras.items():
            place = FileRange(shard.path, *members[kind], name=f"{key}.{kind}")
            streams[camera] = VideoFile(place, pool=self.pool).stream()
        repeat = f" #{shard.repeats[index] + 1}" if index in shard.repeats else ""
        return Episode(
            id=f"{shard.path.stem}/{key}{repeat}",
            source=self.name,
            embodiment=self.embodiment,
            instructions=_captions(shard.path, key, members, self.caption),
            streams=streams,
            cameras=tuple(streams),
        )


def _shard_files(path: Path, pattern: str) -> list[Path]:
    names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    files = []
    for name in names:
        # A compressed shard is taken too, and refused by name; left out, nobody would miss it.
        suffix = next((end for end in COMPRESSED if name.lower().endswith(end)), None)
        plain = f"{name[: -len(suffix)]}.tar" if suffix else name
        if fnmatch(plain, pattern):
            files.append(path / name)
    if not files:
        raise ValueError(f"{path} is no folder of tar shards: no file is named {pattern}")
    return files


def _index(file: Path) -> Shard:
    try:
        return index_shard(file)
    except ValueError as error:
        shard = Shard(file, faults={0: str(error)})
        shard.starts.append(0)
        return shard


def _camera(kind: str) -> str:
    """The stream that a member belongs to by the ending of its name; "" if it is no video."""
    camera, _, suffix = kind.rpartition(".")
    return (camera or STREAM) if f".{suffix}" in VIDEO_SUFFIXES else ""


def _captions(shard: Path, key: str, members: dict[str, Place], wanted: str) -> tuple[str, ...]:
    kind = next((kind for kind in ("txt", "json") if kind in members), None)
    if kind is None:
        raise ValueError(f"{shard}/{key} has no .txt or .json, only {sorted(members)}")
    where = f"{shard}/{key}.{kind}"
    with shard.open("rb") as file:
        file.seek(members[kind].offset)
        text = decode_text(file.read(members[kind].size), where)
    if kind == "txt":
        return (text.strip(),)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    found = content.get(wanted) if isinstance(content, dict) else None
    captions = tuple(found) if isinstance(found, list) else (found,)
    if not captions or not all(isinstance(caption, str) for caption in captions):
        there = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"{where} has no text under {wanted!r} (it has {there}); name the field with the "
            "option caption"
        )
    return tuple(caption.strip() for caption in captions)
