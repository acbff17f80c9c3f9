"""Encoded windows on disk: ArrayRecord shards, one text table, one manifest.

A records folder holds

    plan.json                 the settings of the encoding job (written first)
    shard_00000.arrayrecord   one record per window and variant, episodes in order
    shard_00000.npz           the shard's numeric columns and episode rows; written when it is done
    texts.npz                 the distinct instructions and their embeddings
    manifest.json             everything that a reader needs (written last)

`RecordDataset` reads a finished folder, `RecordWriter` and `write_texts` write its files, and
`encode_record` makes the bytes of a record. `mvjax/encode.py` is the encoding job.
"""

import bisect
import json
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import ml_dtypes  # noqa: F401  (numpy knows bfloat16 from here on)
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from data_pipelines import episode
from data_pipelines.atomic import replacing, write_npz
from data_pipelines.clip import VIDEO

# Records are read one by one, in any order, so readahead would be wasted.
_READER = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 1 << 15}
# A group of one makes every record addressable by its own index.
_WRITER = "group_size:1,uncompressed"
_ALIGNMENT = 8  # bytes, of the buffers in a record


def entry(view: str) -> str:
    """The entry of a record, and of a batch, that holds the latents of a view."""
    return "latents" if view == VIDEO else f"views/{view}"


def is_latents(name: str) -> bool:
    """Whether an entry holds the latents of a view."""
    return name == "latents" or name.startswith("views/")


class DamagedRecord(ValueError):
    """A record cannot be read as it was written."""


@dataclass(frozen=True)
class EpisodeRow:
    """One episode of a records folder."""

    id: str  # as in its source
    instructions: tuple[int, ...]  # rows of the text table; the first one names the task
    first: int  # index of its first record
    count: int  # of its records; 0 for a skipped episode
    split: str  # "train" or "validation"
    digest: str = ""  # hash of the encoded frames and numbers


class RecordDataset:
    """Thread-safe random access to the windows of one finished records folder.

    Every record has a checksum, so damage affects one record, or one truncated file.

    Attributes:
        path: the folder.
        name: the dataset's name.
        embodiment: the robot or body; it selects the normalizer.
        fingerprint: identity of the content; changes with the data, the clip and the tokenizer.
        normalization: how numbers are normalised, where a configuration says it otherwise than the
            encoding job; see `provenance.open_records`.
        settings: settings of the encoding job (streams, clip, policy_io, identity of the networks).
        variants: of every window (`data_pipelines.augment`); 1 if pictures were not augmented.
        shapes: shape of each array in a record.
        episodes: one row per episode of the source, in its order.
        skipped: episodes skipped while encoding: {"id", "reason"}.
        findings: what the source found and settled -> numbers of the episodes; see `Episode`.
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
        self.normalization = ""
        self.embodiment: str = self.settings["dataset"].get("embodiment", self.name)
        self.fingerprint: str = manifest["fingerprint"]
        self.skipped: list[dict[str, str]] = manifest["skipped"]
        self.findings: dict[str, list[int]] = manifest.get("findings", {})
        self.episodes = [
            EpisodeRow(**{**row, "instructions": tuple(row["instructions"])})
            for row in manifest["episodes"]
        ]
        self.variants: int = (self.settings["dataset"].get("augment") or {}).get("variants", 1)
        self._shards = [self.path / shard for shard in manifest["shards"]]
        # Counted in the .npz, because a damaged .arrayrecord has lost its count.
        counts = [len(columns.get("anchor", ())) for columns in self._columns("anchor")]
        self._firsts = np.cumsum([0, *counts]).tolist()  # each shard's first record, and the total
        self._readers: dict[int, ArrayRecordReader] = {}
        self._lock = threading.Lock()
        self.shapes = self._first_shapes()

    def __len__(self) -> int:
        """The windows; each counts once, however many variants it has."""
        return self._firsts[-1]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Variant 0 of a window; see `read`."""
        return self.read(index)

    def read(self, index: int, variant: int = 0) -> dict[str, np.ndarray]:
        """One window, as read-only arrays.

        Args:
            index: of the window.
            variant: of its pictures; only latents differ between them.

        Returns:
            latents bfloat16 [t', h', w', 16], and of every observed view `views/<name>` bfloat16
            [observed t', its h', its w', 16]; episode (row in `episodes`), anchor (nanoseconds) and
            text (row of the text table), int64 []; where the dataset has them actions float32
            [H, A] and proprio float32 [P, D], raw units, with actions_padded bool [H] and
            proprio_padded bool [P], true where the episode's first or last value was repeated.

        Raises:
            DamagedRecord: this record cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        if not 0 <= variant < self.variants:
            raise IndexError(f"variant {variant} of {self.variants}")
        shard = bisect.bisect_right(self._firsts, index) - 1
        position = (index - self._firsts[shard]) * self.variants + variant
        try:
            data = self._reader(shard).read([position])[0]
        except Exception as error:  # the library's types differ between versions
            first_line = str(error).split("\n")[0] or type(error).__name__
            raise DamagedRecord(
                f"record {position} of {self._shards[shard]} is damaged ({first_line}); delete "
                "the file and its .npz, and run the encoding job again"
            ) from error
        record = decode_record(data)
        row = self.episodes[int(record["episode"])]
        return record | {"text": np.int64(row.instructions[int(record["text"])])}

    def _reader(self, shard: int) -> ArrayRecordReader:
        with self._lock:
            if shard not in self._readers:
                path, windows = self._shards[shard], self._firsts[shard + 1] - self._firsts[shard]
                count = windows * self.variants
                if not path.exists():
                    raise FileNotFoundError("the file is missing")
                reader = ArrayRecordReader(str(path), **_READER)
                if (found := reader.num_records()) != count:
                    raise ValueError(f"the file holds {found} records instead of {count}")
                self._readers[shard] = reader  # a failed one is not kept: the drive may recover
            return self._readers[shard]

    def _first_shapes(self) -> dict[str, tuple[int, ...]]:
        damage = None
        for index in self._firsts[:-1]:  # one record of every shard, because some may be damaged
            try:
                return {key: value.shape for key, value in self[index].items()}
            except (DamagedRecord, IndexError) as error:
                damage = damage or error
        raise ValueError(f"no shard in {self.path} can be read; {damage}")

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
        """Embedding of an instruction: float32 [length, dim], zeros after the text's end."""
        table, end = self._texts, self._texts["ends"][index]
        embedding = np.zeros((int(table["padded_length"]), table["rows"].shape[1]), np.float32)
        used = table["lengths"][index]
        embedding[:used] = table["rows"][end - used : end]
        return embedding

    def shard_columns(self, *names: str) -> Iterator[dict[str, np.ndarray]]:
        """Yields numeric columns, such as actions [n, H, A], by shard; no latents are read."""
        stored = [name for name in self.shapes if not is_latents(name) and name != "text"]
        missing = [name for name in names if name not in stored]
        if missing:
            raise KeyError(f"Records of {self.name!r} have no column {missing} (in {self.path}).")
        return filter(None, self._columns(*names))

    def columns(self, *names: str) -> dict[str, np.ndarray]:
        """Numeric columns of all records at once; see `shard_columns`."""
        parts = list(self.shard_columns(*names))
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    def _columns(self, *names: str) -> Iterator[dict[str, np.ndarray]]:
        """Columns of each shard; {} for a shard whose episodes were all skipped."""
        return (read_columns(shard, *names) for shard in self._shards)

    def record_indices(
        self, split: str | None = None, episodes_per_task: episode.PerTask = None, seed: int = 0
    ) -> np.ndarray:
        """Indices of the windows to use: int64 [n], ascending.

        Args:
            split: "train", "validation", or None for both.
            episodes_per_task, seed: see `episode.kept` and `episode.of_every_task`.
        """
        rows = [r for r in self.episodes if r.count and (split is None or r.split == split)]
        rows = episode.of_every_task(rows, episodes_per_task, seed)
        spans = [np.arange(row.first, row.first + row.count) for row in rows]
        return np.sort(np.concatenate([np.zeros(0, np.int64), *spans]))


class RecordWriter:
    """Writes one ArrayRecord file atomically."""

    def __init__(self, path: Path):
        self._replacing = replacing(path)

    def __enter__(self) -> "RecordWriter":
        self._writer = ArrayRecordWriter(str(self._replacing.__enter__()), _WRITER)
        return self

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Appends one record."""
        self._writer.write(encode_record(arrays))

    def __exit__(self, *error: object) -> None:
        self._writer.close()
        self._replacing.__exit__(*error)


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


def read_columns(shard: Path, *names: str) -> dict[str, np.ndarray]:
    """Those of the named columns that the .npz beside a shard has."""
    file = shard.with_suffix(".npz")
    try:
        with np.load(file) as columns:
            return {name: columns[name] for name in names if name in columns}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{file} is damaged ({type(error).__name__}: {error}); delete it and run the encoding "
            "job again"
        ) from error


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
    """The inverse of `encode_record`; the arrays are read-only views of `data`."""
    start = 4 + int.from_bytes(data[:4], "little")
    arrays = {}
    for key, name, shape in json.loads(data[4:start]):
        dtype, count = np.dtype(name), int(np.prod(shape))
        arrays[key] = np.frombuffer(data, dtype, count, start).reshape(shape)
        start += -(-count * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    return arrays
