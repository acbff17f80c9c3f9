"""WebDataset: tar shards of samples, the files of a sample sharing a key.

    <path>/*.tar holding    <key>.mp4    <key>.txt
                       or   <key>.mp4    <key>.json    {"caption": "..."}

Nothing is unpacked. One pass over the headers says where the samples lie (`tar_index.py`); a video
is then decoded from its bytes inside the tar. Videos named `<key>.<camera>.mp4` become a stream per
camera; one named `<key>.mp4` is the stream "video".
"""

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import accumulate
from pathlib import Path

from data_pipelines.episode import Episode, LazyEpisodes
from data_pipelines.sources.tar_index import Place, Shard, index_shard
from data_pipelines.sources.text import decode_text
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
