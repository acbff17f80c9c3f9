"""Encoded windows on disk: ArrayRecord shards, one text table, one manifest.

A records folder holds

    plan.json                 what is being encoded and how (written first)
    shard_00000.arrayrecord   one record per window, episodes in order
    shard_00000.npz           the shard's numeric columns and episode rows; written when it is done
    texts.npz                 the distinct instructions and their embeddings
    manifest.json             everything a reader needs to know (written last)

A record is packed by `codec`; `writer` writes the files.
"""

import bisect
import itertools
import json
import os
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from data_pipelines import episode
from data_pipelines.atomic import write_npz

# A record as bytes: a small JSON header followed by raw little-endian buffers.
#
# No pickle, no schema files, and decoding copies nothing.


_ALIGNMENT = 8


def encode_record(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Packs named numeric arrays into bytes: header length, JSON header, aligned buffers."""
    arrays = {key: np.asarray(value, order="C") for key, value in arrays.items()}
    for key, value in arrays.items():
        if value.dtype.hasobject or value.dtype.kind in "USM" or value.dtype.byteorder == ">":
            raise ValueError(
                f"Record entry {key!r} has dtype {value.dtype}; records hold little-endian numbers."
            )
    header = json.dumps([[k, v.dtype.name, v.shape] for k, v in arrays.items()]).encode()
    header += b" " * (-(4 + len(header)) % _ALIGNMENT)
    parts = [len(header).to_bytes(4, "little"), header]
    for value in arrays.values():
        parts += [value.tobytes(), bytes(-value.nbytes % _ALIGNMENT)]
    return b"".join(parts)


def decode_record(data: bytes) -> dict[str, np.ndarray]:
    """Unpacks `encode_record`; the arrays are read-only views of `data`."""
    start = 4 + int.from_bytes(data[:4], "little")
    arrays = {}
    for key, name, shape in json.loads(data[4:start]):
        dtype, count = np.dtype(name), int(np.prod(shape))
        arrays[key] = np.frombuffer(data, dtype, count, start).reshape(shape)
        start += -(-count * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    return arrays


# The .npz beside a shard: its numeric columns, and the rows of its episodes.


def read_columns(shard: Path, *names: str) -> dict[str, np.ndarray]:
    """Some columns of a shard; those that it has not are left out.

    Args:
        shard: the .arrayrecord.
        names: of the columns.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    file = shard.with_suffix(".npz")
    try:
        with np.load(file) as columns:
            return {name: columns[name] for name in names if name in columns}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{file} is damaged ({type(error).__name__}: {error}); delete it and run the encoding "
            "job again"
        ) from error


# Random access to the records of several ArrayRecord files, of which some may be damaged.
#
# Every record has a checksum. What is damaged spoils only itself: one record, or one file whose end
# is missing.


# Records are read one by one, in any order: reading ahead would be wasted.
_OPTIONS = "readahead_buffer_size:0"
_BUFFER = 1 << 15


class DamagedRecord(ValueError):
    """A record's bytes are not what was written."""


class ShardReader:
    """The records of all files, counted through; safe to use from several threads."""

    def __init__(self, shards: Sequence[Path], counts: Sequence[int]):
        """Opens nothing yet.

        Args:
            shards: the files.
            counts: records in each; the files are not asked, since a damaged one does not know.
        """
        self._shards = list(shards)
        self._ends = list(itertools.accumulate(counts))
        self._readers: dict[int, array_record_module.ArrayRecordReader] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, index: int) -> bytes:
        """One record.

        Raises:
            DamagedRecord: if it cannot be read; the others still can.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} asked for, but there are {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        position = index - (self._ends[shard - 1] if shard else 0)
        try:
            return self._reader(shard).read([position])[0]
        except Exception as error:  # the library's types differ between versions
            path = self._shards[shard]
            raise DamagedRecord(
                f"record {position} of {path} is damaged ({_first_line(error)}); delete that file "
                "and the .npz beside it, and run the encoding job again"
            ) from error

    def _reader(self, shard: int) -> array_record_module.ArrayRecordReader:
        with self._lock:
            if shard not in self._readers:
                path, count = self._shards[shard], self._ends[shard]
                count -= self._ends[shard - 1] if shard else 0
                if not path.exists():
                    raise FileNotFoundError("the file is missing")
                reader = array_record_module.ArrayRecordReader(
                    str(path), options=_OPTIONS, file_reader_buffer_size=_BUFFER
                )
                found = reader.num_records()
                if found != count:
                    raise ValueError(f"the file holds {found} records instead of {count}")
                self._readers[shard] = reader  # only a sound one: a network drive may recover
            return self._readers[shard]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@dataclass(frozen=True)
class EpisodeRow:
    """One episode of a records folder.

    Attributes:
        id: the episode's id in its source.
        instructions: indices into the text table; the first one names the task.
        first: index of the episode's first record.
        count: number of records; 0 for an episode that was skipped.
        split: "train" or "validation".
        digest: hash of the frames and numbers that were encoded.
    """

    id: str
    instructions: tuple[int, ...]
    first: int
    count: int
    split: str
    digest: str = ""


class RecordDataset:
    """Random access to the windows of one finished records folder.

    Attributes:
        path: the folder.
        name: the dataset's name.
        embodiment: the body whose actions these are; its own normalisation goes with it.
        fingerprint: identity of the content; changes with the data, the clip and the tokenizer.
        settings: what was encoded and how (streams, clip, policy_io, identity of the networks).
        shapes: shape of each array in a record.
        episodes: one row per episode of the source, in its order.
        skipped: episodes left out while encoding: {"id", "reason"}.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        file = self.path / "manifest.json"
        if not file.exists():
            state = "is not finished" if (self.path / "plan.json").exists() else "holds no records"
            raise FileNotFoundError(f"{self.path} {state}: run launch.encode first.")
        manifest = json.loads(file.read_text())
        self.settings: dict = manifest["settings"]
        self.name: str = self.settings["dataset"]["name"]
        self.embodiment: str = self.settings["dataset"].get("embodiment", self.name)
        self.fingerprint: str = manifest["fingerprint"]
        self.skipped: list[dict[str, str]] = manifest["skipped"]
        self.episodes = [
            EpisodeRow(**{**row, "instructions": tuple(row["instructions"])})
            for row in manifest["episodes"]
        ]
        self._shards = [self.path / shard for shard in manifest["shards"]]
        counts = [_rows_in(columns) for columns in self._columns("anchor")]
        self._reader = ShardReader(self._shards, counts)
        self.shapes = self._first_shapes(np.cumsum([0, *counts[:-1]]))

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One window.

        Args:
            index: 0 <= index < len(self).

        Returns:
            latents bfloat16 [t', h', w', 16]; episode (row in `episodes`), anchor (nanoseconds) and
            text (row of the text table), int64 []; where the dataset has them actions float32
            [H, A] and proprio float32 [P, D], raw units, with actions_padded bool [H] and
            proprio_padded bool [P], true where the episode's first or last value was repeated.
            Arrays are read-only.

        Raises:
            DamagedRecord: if the record cannot be read.
        """
        record = decode_record(self._reader.read(index))
        row = self.episodes[int(record["episode"])]
        return record | {"text": np.int64(row.instructions[int(record["text"])])}

    def _first_shapes(self, firsts: Sequence[int]) -> dict[str, tuple[int, ...]]:
        damage = None
        for index in firsts:  # of every shard: one may be damaged
            try:
                return {key: value.shape for key, value in self[int(index)].items()}
            except (DamagedRecord, IndexError) as error:
                damage = damage or error
        raise ValueError(f"no file of records in {self.path} can be read; {damage}")

    @cached_property
    def _texts(self) -> dict[str, np.ndarray]:
        with np.load(self.path / "texts.npz") as texts:
            table = dict(texts)
        return table | {"ends": np.cumsum(table["lengths"])}

    @property
    def instructions(self) -> list[str]:
        """The distinct instructions, in the order of the text table."""
        return self._texts["instructions"].tolist()

    def text(self, index: int) -> np.ndarray:
        """Embedding of an instruction: float32 [length, dim], zeros past the text's end."""
        table, end = self._texts, self._texts["ends"][index]
        embedding = np.zeros((int(table["padded_length"]), table["rows"].shape[1]), np.float32)
        used = table["lengths"][index]
        embedding[:used] = table["rows"][end - used : end]
        return embedding

    def shard_columns(self, *names: str) -> Iterator[dict[str, np.ndarray]]:
        """Numeric columns, such as actions [n, H, A], shard by shard, without reading latents.

        Raises:
            KeyError: if the records have no such column.
            ValueError: if a file is damaged.
        """
        missing = [name for name in names if name not in self.shapes or name in ("latents", "text")]
        if missing:
            raise KeyError(f"Records of {self.name!r} have no column {missing} (in {self.path}).")
        return filter(None, self._columns(*names))

    def columns(self, *names: str) -> dict[str, np.ndarray]:
        """Numeric columns of all records at once; see `shard_columns`."""
        parts = list(self.shard_columns(*names))
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    def _columns(self, *names: str) -> Iterator[dict[str, np.ndarray]]:
        """Of each shard; {} for one whose episodes were all skipped, which has none."""
        return (read_columns(shard, *names) for shard in self._shards)

    def record_indices(
        self,
        split: str | None = None,
        episodes_per_task: episode.PerTask = None,
        seed: int = 0,
    ) -> np.ndarray:
        """Which records to use.

        Args:
            split: "train", "validation", or None for both.
            episodes_per_task: keep so many episodes of every distinct first instruction, a number
                or a share by name; with the same seed a smaller choice is contained in a larger.
            seed: chooses among the episodes.

        Returns:
            int64 [n], ascending.
        """
        rows = [r for r in self.episodes if r.count and (split is None or r.split == split)]
        rows = episode.of_every_task(rows, episodes_per_task, seed)
        spans = [np.arange(row.first, row.first + row.count) for row in rows]
        return np.sort(np.concatenate([np.zeros(0, np.int64), *spans]))


def _rows_in(columns: Mapping[str, np.ndarray]) -> int:
    return len(columns["anchor"]) if columns else 0


# Writing a records folder: files that appear under their name only when they are complete.


class RecordWriter:
    """Writes one ArrayRecord file that appears under its name only when it is complete."""

    def __init__(self, path: Path):
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        # group_size 1 makes every record addressable by its own index.
        self._writer = array_record_module.ArrayRecordWriter(
            str(self._partial), "group_size:1,uncompressed"
        )

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Appends one record."""
        self._writer.write(encode_record(arrays))

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        self._writer.close()
        if error_type is None:
            os.replace(self._partial, self.path)
        else:
            self._partial.unlink(missing_ok=True)


def write_texts(path: Path, instructions: Sequence[str], embeddings: np.ndarray) -> None:
    """Stores instruction embeddings float32 [n, length, dim] without their trailing zero rows."""
    used = np.any(embeddings != 0, axis=-1)
    lengths = np.where(used.any(1), used.shape[1] - np.argmax(used[:, ::-1], axis=1), 0)
    write_npz(
        path,
        instructions=np.asarray(instructions, dtype=np.str_),
        rows=np.concatenate([text[:n] for text, n in zip(embeddings, lengths)]).astype(np.float32),
        lengths=lengths.astype(np.int64),
        padded_length=np.int64(embeddings.shape[1]),
    )
