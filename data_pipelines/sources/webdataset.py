"""WebDataset: tar shards of samples, the files of a sample sharing a key.

    <path>/*.tar holding    <key>.mp4    <key>.txt
                       or   <key>.mp4    <key>.json    {"caption": "..."}

Nothing is unpacked. One pass over the headers of a tar says where its samples are; a video is then
decoded from its bytes inside the tar. Videos named `<key>.<camera>.mp4` become a stream per camera;
one named `<key>.mp4` is the stream "video".
"""

import json
import os
import re
import tarfile
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

from data_pipelines.episode import Episode, LazyEpisodes
from data_pipelines.sources.files import decode_text
from data_pipelines.video import VideoFile, VideoPool
from data_pipelines.video_index import VIDEO_SUFFIXES, FileRange

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


def _shard_files(path: Path, pattern: str) -> list[Path]:
    files = []
    for name in sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(".")):
        # A compressed shard is taken too, and refused by name; left out, nobody would miss it.
        suffix = next((end for end in COMPRESSED if name.lower().endswith(end)), None)
        if fnmatch(f"{name[: -len(suffix)]}.tar" if suffix else name, pattern):
            files.append(path / name)
    if not files:
        raise ValueError(f"{path} is no folder of tar shards: no file is named {pattern}")
    return files


# Where the samples of a shard are.

# WebDataset's rule: the key ends at the first dot of the file's name, folders before it included.
_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")
_LONGEST_PADDING = 1 << 20  # bytes of zeros at the end; tar writes 10,240 unless told otherwise
_MAGICS = {
    b"\x1f\x8b": "gunzip",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"\xfd7zXZ": "unxz",
    b"BZh": "bunzip2",
}


@dataclass
class Shard:
    """The samples of one tar, in its order; their headers are read again when they are asked for.

    Attributes:
        path: the tar.
        starts: where each sample begins, bytes.
        kinds: rest of a name ("mp4", "cam0.mp4") -> how many there are.
        repeats: number of a sample -> how often its key has come before.
        faults: number of a sample -> why it cannot be used; the last one of a tar that is cut off.
    """

    path: Path
    starts: array = field(default_factory=lambda: array("q"))
    kinds: Counter[str] = field(default_factory=Counter)
    repeats: dict[int, int] = field(default_factory=dict)
    faults: dict[int, str] = field(default_factory=dict)

    def sample(self, number: int) -> tuple[str, dict[str, tarfile.TarInfo]]:
        """A sample's key, and its members by the rest of their names; ValueError for a fault."""
        if number in self.faults:
            raise ValueError(self.faults[number])
        first, members = "", {}
        with self.path.open("rb") as file:
            for key, kind, member in _walk(file, self.starts[number]):
                if key != (first := first or key):
                    break
                members[kind] = member
        return first, members


def _index(path: Path) -> Shard:
    """Finds the samples of a tar; what is wrong with it is the fault of its last sample."""
    shard, seen, last = Shard(path), Counter(), None
    try:
        with path.open("rb") as file:
            start = file.read(8)
            command = next((c for magic, c in _MAGICS.items() if start.startswith(magic)), None)
            for key, kind, member in () if command else _walk(file, 0):
                if key != last:
                    if seen[key]:
                        shard.repeats[len(shard.starts)] = seen[key]
                    seen[key] += 1
                    shard.starts.append(member.offset)
                    last = key
                shard.kinds[kind] += 1
        fault = "" if seen else ": the tar holds no samples"
        if command:
            fault = (
                " is compressed, so no sample in it can be found without reading all before it; "
                f"uncompress it once with {command} (videos hardly get smaller by it)"
            )
    except FileNotFoundError:
        fault = ": the shard is missing"
    except OSError as error:
        fault = f": the shard cannot be read ({error.strerror})"
    except (tarfile.TarError, ValueError, OverflowError) as error:  # the latter for absurd numbers
        fault = f": not a readable tar ({error}); copy it again"
        if last is not None:
            fault = f": {error}; {last} and all samples after it are lost; copy the tar again"
    if fault:
        if not shard.starts:
            shard.starts.append(0)
        shard.faults[len(shard.starts) - 1] = f"{path}{fault}"
    return shard


def _walk(file: BinaryIO, start: int) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """The members of samples from a byte on: key, rest of the name ("cam0.mp4") and header.

    Raises:
        tarfile.TarError: where the tar is damaged.
    """
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while member := tar.next():
            tar.members = []  # it would keep every header
            parts = _NAME.fullmatch(member.name)
            if member.isreg() and parts and not member.name.startswith("__"):
                yield parts[1], parts[2].lower(), member
            if member.issparse():
                raise tarfile.ReadError("the tar was made with --sparse, which is not supported")
    # `tarfile` takes a damaged header, too, for the end of the archive.
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"the tar is damaged or cut off at byte {tar.offset}")
    if os.fstat(file.fileno()).st_size - tar.offset > _LONGEST_PADDING:  # an unfinished download
        raise tarfile.ReadError(f"the tar is empty from byte {tar.offset} on")


# One episode out of its sample.


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
            offset, size = members[kind].offset_data, members[kind].size
            place = FileRange(shard.path, offset, size, name=f"{key}.{kind}")
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


def _camera(kind: str) -> str:
    """The stream that a member belongs to by the ending of its name; "" if it is no video."""
    camera, _, suffix = kind.rpartition(".")
    return (camera or STREAM) if f".{suffix}" in VIDEO_SUFFIXES else ""


def _captions(
    shard: Path, key: str, members: Mapping[str, tarfile.TarInfo], wanted: str
) -> tuple[str, ...]:
    kind = next((kind for kind in ("txt", "json") if kind in members), None)
    if kind is None:
        raise ValueError(f"{shard}/{key} has no .txt or .json, only {sorted(members)}")
    where = f"{shard}/{key}.{kind}"
    with shard.open("rb") as file:
        file.seek(members[kind].offset_data)
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
