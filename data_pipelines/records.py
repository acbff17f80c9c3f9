"""Encoded windows on disk: ArrayRecord shards, one text table, one manifest.

A records folder holds

    plan.json                 what is being encoded and how (written first)
    shard_00000.arrayrecord   one record per window, episodes in order
    shard_00000.npz           the shard's numeric columns and episode rows; written when it is done
    texts.npz                 the distinct instructions and their embeddings
    manifest.json             everything a reader needs to know (written last)

A record is a small JSON header followed by raw little-endian buffers: no pickle, no schema files,
and decoding copies nothing.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import grain
import ml_dtypes  # noqa: F401  (teaches numpy the name "bfloat16")
import numpy as np
from array_record.python import array_record_module

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


def write_json(path: Path, content: object) -> None:
    """Writes JSON so that `path` never holds half a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1))
    os.replace(partial, path)


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """Writes an uncompressed .npz so that `path` never holds half a file."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    os.replace(partial, path)


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
            raise FileNotFoundError(f"{self.path} {state}: run the encoding job on it first.")
        manifest = json.loads(file.read_text())
        self.name: str = manifest["settings"]["dataset"]["name"]
        self.fingerprint: str = manifest["fingerprint"]
        self.settings: dict = manifest["settings"]
        self.skipped: list[dict[str, str]] = manifest["skipped"]
        self.episodes = [
            EpisodeRow(**{**row, "instructions": tuple(row["instructions"])})
            for row in manifest["episodes"]
        ]
        self._shards = [self.path / shard for shard in manifest["shards"]]
        self._source = grain.sources.ArrayRecordDataSource([str(shard) for shard in self._shards])
        self.shapes = {key: value.shape for key, value in self[0].items()}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One window.

        Args:
            index: 0 <= index < len(self).

        Returns:
            latents bfloat16 [t', h', w', 16]; episode (row in `episodes`), anchor (nanoseconds) and
            text (row of the text table), int64 []; where the dataset has them actions float32
            [H, A] and proprio float32 [P, D], raw units. Arrays are read-only.
        """
        record = decode_record(self._source[index])
        row = self.episodes[int(record["episode"])]
        return record | {"text": np.int64(row.instructions[int(record["text"])])}

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

    def columns(self, *names: str) -> dict[str, np.ndarray]:
        """Numeric columns of all records, such as actions [n, H, A], without reading latents."""
        missing = [name for name in names if name not in self.shapes or name in ("latents", "text")]
        if missing:
            raise KeyError(f"Records of {self.name!r} have no column {missing} (in {self.path}).")
        parts = []
        for shard in self._shards:
            with np.load(shard.with_suffix(".npz")) as columns:
                if "anchor" in columns:  # every episode of a shard may have been skipped
                    parts.append({name: columns[name] for name in names})
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    def record_indices(
        self, split: str | None = None, episodes_per_task: int | None = None, seed: int = 0
    ) -> np.ndarray:
        """Which records to use.

        Args:
            split: "train", "validation", or None for both.
            episodes_per_task: keep this many episodes of every distinct first instruction; with the
                same seed a smaller choice is contained in a larger one.
            seed: chooses among the episodes.

        Returns:
            int64 [n], ascending.
        """
        rows = [r for r in self.episodes if r.count and (split is None or r.split == split)]
        if episodes_per_task is not None:
            order = sorted(rows, key=lambda row: hashlib.md5(f"{seed}/{row.id}".encode()).digest())
            taken: dict[int, list[EpisodeRow]] = {}
            for row in order:
                taken.setdefault(row.instructions[0], []).append(row)
            rows = [row for task in taken.values() for row in task[:episodes_per_task]]
        spans = [np.arange(row.first, row.first + row.count) for row in rows]
        return np.sort(np.concatenate([np.zeros(0, np.int64), *spans]))
