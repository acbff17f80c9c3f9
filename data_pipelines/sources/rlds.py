"""RLDS datasets (BridgeData V2, DROID, Open X-Embodiment) as TFDS prepares them.

Read without TensorFlow, from TFRecord and from ArrayRecord files alike: an episode is one record,
found by its offset and checked by its checksum. Streams carry the dataset's own names
("steps/observation/state", "steps/action", or "steps/action/<key>" where the action is a dict).

RLDS has no place for timestamps or a frame rate, so steps are 1 / `fps` apart. Depth, text and
values of which a step has any number are no streams.
"""

import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import google_crc32c
import numpy as np
from array_record.python import array_record_module
from PIL import Image

from data_pipelines.episode import NANOSECONDS, Episode, LazyEpisodes, Stream, reason
from data_pipelines.sources.files import decode_text

# `tf.train.Example` messages, read from their bytes with numpy alone.
#
# A message is a map from names to lists of bytes, float32 or int64 (tensorflow/core/example). Only
# what is asked for is decoded: naming a list's place costs a few bytes' reading, whatever its size.


_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf's wire types
_KINDS = {1: "bytes", 2: "float", 3: "int64"}  # field numbers of the message Feature

Span = tuple[int, int]


@dataclass(frozen=True)
class Values:
    """One list of a message.

    Attributes:
        data: the whole message.
        kind: "bytes", "float" or "int64".
        spans: where the list's messages are.
    """

    data: bytes
    kind: str
    spans: tuple[Span, ...]

    def items(self) -> list[Span]:
        """Where the single values are (bytes), or runs of values (numbers)."""
        return [span for place in self.spans for n, _, span in _fields(self.data, *place) if n == 1]

    def blobs(self) -> list[bytes]:
        """The values of a list of bytes."""
        return [self.data[start:stop] for start, stop in self.items()]

    def numbers(self) -> np.ndarray:
        """The values of a list of numbers: float32 or int64 [n].

        Raises:
            ValueError: if it is a list of bytes or damaged.
        """
        if self.kind == "bytes":
            raise ValueError("bytes are stored where numbers are expected")
        # Packed or not, the values lie in order.
        raw = b"".join(self.blobs())
        if self.kind == "float":
            return np.frombuffer(raw, "<f4").astype(np.float32)
        return _decode_varints(np.frombuffer(raw, np.uint8))


def parse_example(data: bytes) -> dict[str, Values]:
    """The lists of a message by name.

    Raises:
        ValueError: if these bytes are no such message.
    """
    found = {}
    for number, _, features in _fields(data, 0, len(data)):
        if number != 1:
            continue
        for _, _, entry in _fields(data, *features):
            parts = {n: span for n, _, span in _fields(data, *entry)}
            if 1 not in parts or 2 not in parts:  # a name with no list, as for optional values
                continue
            lists = [(n, span) for n, _, span in _fields(data, *parts[2]) if n in _KINDS]
            if lists:
                kind = lists[-1][0]
                spans = tuple(span for n, span in lists if n == kind)
                name = data[slice(*parts[1])].decode("utf-8")
                found[name] = Values(data, _KINDS[kind], spans)
    return found


def _fields(data: bytes, start: int, stop: int) -> Iterator[tuple[int, int, Span]]:
    """Field number, wire type and place of every field of a message."""
    at = start
    while at < stop:
        tag, at = _varint(data, at, stop)
        wire = tag & 7
        if wire == _BYTES:
            size, at = _varint(data, at, stop)
            end = at + size
        elif wire == _VARINT:
            _, end = _varint(data, at, stop)
        elif wire in (_FIXED32, _FIXED64):
            end = at + (4 if wire == _FIXED32 else 8)
        else:
            raise ValueError(f"no tf.train.Example: wire type {wire} at byte {at}")
        if end > stop:
            raise ValueError(f"no tf.train.Example: a field passes its end at byte {stop}")
        yield tag >> 3, wire, (at, end)
        at = end


def _varint(data: bytes, at: int, stop: int) -> tuple[int, int]:
    value = shift = 0
    while at < stop:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError(f"no tf.train.Example: it ends within a number at byte {stop}")


def _decode_varints(raw: np.ndarray) -> np.ndarray:
    """Integers of seven bits per byte, lowest first, the top bit set in all but the last byte."""
    ends = np.flatnonzero(raw < 0x80)
    starts = np.concatenate([[0], ends[:-1] + 1])[: len(ends)]
    sizes = ends - starts + 1
    if sizes.sum() != len(raw) or sizes.max(initial=0) > 10:
        raise ValueError("no tf.train.Example: it ends within a number")
    values = np.zeros(len(ends), np.uint64)
    for place in range(sizes.max(initial=0)):
        longer = sizes > place
        bits = (raw[starts[longer] + place] & 0x7F).astype(np.uint64)
        values[longer] |= bits << np.uint64(7 * place)
    return values.view(np.int64)


# TFRecord files without TensorFlow: random access by an index of offsets, checksums verified.
#
# A record is its length (uint64), the length's checksum, the payload, and the payload's checksum,
# all little-endian; a checksum is a "masked" CRC32C (tensorflow/core/lib/io/record_writer.h).


_HEADER, _FOOTER = 12, 4
_MASK_DELTA = 0xA282EAD8


@dataclass(frozen=True)
class TFRecordIndex:
    """Where the whole records of a file are.

    Attributes:
        starts: int64 [n], offsets of the payloads.
        sizes: int64 [n], their lengths in bytes.
        fault: what stops the file from being read further, or "" if it was read to its end.
    """

    starts: np.ndarray
    sizes: np.ndarray
    fault: str


def read_index(path: Path) -> TFRecordIndex:
    """Find the records of a file by going from header to header; payloads are not read."""
    starts, sizes, at, fault = [], [], 0, ""
    with open(path, "rb", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        while at < end and not fault:
            file.seek(at)
            header = file.read(_HEADER)
            size = int.from_bytes(header[:8], "little")
            if len(header) == _HEADER and not _intact(header[:8], header[8:]):
                fault = reason(path, f"the header of record {len(starts)} is damaged")
            elif len(header) < _HEADER or at + _HEADER + size + _FOOTER > end:
                fault = f"the file ends within record {len(starts)}"
            else:
                starts.append(at + _HEADER)
                sizes.append(size)
                at += _HEADER + size + _FOOTER
    return TFRecordIndex(np.array(starts, np.int64), np.array(sizes, np.int64), fault)


def read_record(path: Path, index: TFRecordIndex, number: int) -> bytes:
    """One payload.

    Raises:
        ValueError: if the file has no such record or its checksum is wrong.
    """
    if number >= len(index.starts):
        reason = index.fault or f"the file has {len(index.starts)} records"
        raise ValueError(f"{path}: no record {number}, {reason}; copy the file again")
    start, size = int(index.starts[number]), int(index.sizes[number])
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        payload, checksum = file.read(size), file.read(_FOOTER)
    if len(payload) < size or not _intact(payload, checksum):
        raise ValueError(f"{path}: record {number} is damaged (checksum); copy the file again")
    return payload


def _intact(data: bytes, checksum: bytes) -> bool:
    crc = google_crc32c.value(data)
    masked = (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF
    return masked == int.from_bytes(checksum, "little")


# Folders as `tfds` prepares them: which files a split has, and its records by number.
#
# dataset_info.json                              file format, splits, records per file
# features.json                                  names, shapes and dtypes
# <name>-<split>.tfrecord-00000-of-00002         or .array_record-...: one episode per record


INFO, FEATURES = "dataset_info.json", "features.json"
FORMATS = ("tfrecord", "array_record")
_VERSION = "[0-9]*.[0-9]*.[0-9]*"
_READ_AT_ONCE = 16 * 2**20  # about an episode; smaller buffers take four times as long
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


@dataclass(frozen=True)
class RecordFiles:
    """The records of one split; safe to use from several threads.

    Attributes:
        files: the split's files, in order.
        lengths: the number of records in each.
    """

    files: tuple[Path, ...]
    lengths: tuple[int, ...]
    _indices: dict[int, TFRecordIndex] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(self.lengths)

    def place(self, number: int) -> tuple[int, int]:
        """The file of a record, and the record's number within it."""
        ends = list(accumulate(self.lengths))
        shard = int(np.searchsorted(ends, number, side="right"))
        return shard, number - (ends[shard] - self.lengths[shard])

    def read(self, shard: int, number: int) -> bytes:
        """A record of a file.

        Raises:
            ValueError: if the file is missing or damaged there.
        """
        path = self.files[shard]
        if not path.is_file():
            raise ValueError(f"{path} is missing; copy it again")
        if ".tfrecord" in path.name:
            if shard not in self._indices:
                self._indices[shard] = read_index(path)
            return read_record(path, self._indices[shard], number)
        try:
            # Opened for each read (half a millisecond): datasets have more files than may be open.
            reader = array_record_module.ArrayRecordReader(
                str(path),
                "readahead_buffer_size:0,max_parallelism:0",
                file_reader_buffer_size=_READ_AT_ONCE,
            )
            (data,) = reader.read([number])
            reader.close()
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"{path}: record {number} cannot be read ({error}); copy the file again"
            ) from error
        return data


@dataclass(frozen=True)
class PreparedFolder:
    """A folder and what its `dataset_info.json` says.

    Attributes:
        path: the version's folder.
        info: the content of `dataset_info.json`.
    """

    path: Path
    info: dict

    @property
    def name(self) -> str:
        """The dataset's name."""
        return self.info["name"]

    @property
    def file_format(self) -> str:
        """How records are kept: "tfrecord", "array_record", or another of TFDS's ways."""
        return self.info.get("fileFormat") or "tfrecord"

    @property
    def splits(self) -> dict[str, RecordFiles]:
        """The splits by name."""
        return {row["name"]: self._files(row) for row in self.info["splits"]}

    def split(self, name: str) -> RecordFiles:
        """One split.

        Raises:
            ValueError: if there is none of that name; says which there are.
        """
        if name not in self.splits:
            raise ValueError(
                f"{self.path} has no split {name!r}, but {', '.join(self.splits)}; set "
                "dataset.options.split"
            )
        return self.splits[name]

    def _files(self, row: dict) -> RecordFiles:
        lengths = tuple(int(length) for length in row["shardLengths"])
        files = []
        for shard in range(len(lengths)):
            fields = {"DATASET": self.name, "SPLIT": row["name"], "FILEFORMAT": self.file_format}
            fields |= {"SHARD_INDEX": f"{shard:05d}", "NUM_SHARDS": f"{len(lengths):05d}"}
            fields["SHARD_X_OF_Y"] = f"{shard:05d}-of-{len(lengths):05d}"
            file = row.get("filepathTemplate") or _TEMPLATE
            for key, value in fields.items():
                file = file.replace("{" + key + "}", value)
            files.append(self.path / Path(file).name)
        return RecordFiles(tuple(files), lengths)


def version_folders(path: Path) -> list[Path]:
    """The path itself if it is a prepared folder, or those directly below it."""
    direct = (path / INFO).is_file()
    folders = [path] if direct else [file.parent for file in path.glob(f"{_VERSION}/{INFO}")]
    # Other libraries write a dataset_info.json too.
    return sorted(
        folder
        for folder in folders
        if (folder / FEATURES).is_file() or any(_records(folder, format) for format in FORMATS)
    )


def open_folder(path: Path) -> PreparedFolder:
    """Read what a prepared folder says about itself.

    Args:
        path: `<name>/<version>`, or `<name>` if it holds one version.

    Raises:
        ValueError: if it is no such folder, holds several, or is of another file format.
    """
    folders = version_folders(Path(path))
    if len(folders) != 1:
        found = f"several versions, {[f.name for f in folders]}" if folders else "none"
        raise ValueError(
            f"{path} should be one folder prepared by TFDS, with {INFO} and {FEATURES}, but there "
            f"is {found}; give <name>/<version>"
        )
    try:
        info = json.loads((folders[0] / INFO).read_text(encoding="utf-8-sig"))
        folder = PreparedFolder(folders[0], info)
        _ = folder.name, folder.splits
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{folders[0] / INFO} is damaged ({type(error).__name__}: {error}); copy it again"
        ) from error
    if folder.file_format not in FORMATS:
        raise ValueError(
            f"{folder.path} is kept as {folder.file_format}; tfrecord and array_record can be "
            "read, and `tfds convert_format` (with TensorFlow) converts to them"
        )
    return folder


def _records(folder: Path, format: str) -> bool:
    return any(folder.glob(f"*.{format}-*-of-*"))


# What `features.json` says of an RLDS dataset: every value of a step, its shape and dtype.
#
# The file names Python classes; they are compared by name only, never imported.


STEPS = "steps"


@dataclass(frozen=True)
class Feature:
    """One value of a step.

    Attributes:
        kind: "number", "text" or "picture" (encoded, such as JPEG).
        dtype: numpy's name of it.
        shape: of one step's value, [h, w, c] for a picture, where -1 is any size.
        encoding: of numbers: "none", or "bytes" and "zlib" for those kept as raw buffers.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    encoding: str = "none"

    @property
    def is_camera(self) -> bool:
        """Whether it is a colour or grey picture; depth (uint16, float32) is none."""
        if self.dtype != "uint8" or len(self.shape) != 3:
            return False
        return self.kind == "picture" or (self.kind == "number" and self.shape[-1] == 3)

    def numbers(self, values: Values) -> np.ndarray:
        """The steps' values in the dataset's own dtype: [n, *shape].

        `tf.train.Example` has float32 and int64 only, so float64 comes back rounded to float32.
        """
        dtype = np.dtype(self.dtype)
        if self.encoding != "none":
            unpack = zlib.decompress if self.encoding == "zlib" else bytes
            flat = np.frombuffer(b"".join(map(unpack, values.blobs())), dtype)
        else:
            flat = values.numbers()
        # TFDS keeps the bits of a uint64 as an int64, and the value of all others.
        flat = flat.view(dtype) if dtype == np.uint64 else flat.astype(dtype)
        return flat.reshape(-1, *self.shape)


def read_features(folder: Path) -> dict[str, Feature]:
    """The features of a step by their full names, such as "steps/observation/state".

    Values of which a step has any number are left out, and so are sounds, videos and boxes.

    Raises:
        ValueError: if the file is missing or damaged, or the dataset is not made of steps.
    """
    path = folder / FEATURES
    if not path.is_file():
        raise ValueError(f"{path} is missing, which says how to read the records; copy it again")
    try:
        root = json.loads(path.read_text(encoding="utf-8-sig"))
        if "type" in root:
            raise ValueError(
                f"{path} is in the form that TFDS wrote before 2022; rewrite it with a newer TFDS: "
                "tfds.builder_from_directory(folder).info.write_to_directory(folder)"
            )
        steps = root.get("featuresDict", {}).get("features", {}).get(STEPS, {})
        found = _flatten(STEPS, steps.get("sequence", {}).get("feature", {}))
    except (KeyError, TypeError, AttributeError, UnicodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}); copy it again"
        ) from error
    if not found:
        raise ValueError(f"{path} describes no RLDS dataset: its examples are not made of {STEPS}")
    return dict(sorted(found.items()))


def _flatten(name: str, node: dict) -> dict[str, Feature]:
    if "featuresDict" in node:
        members = node["featuresDict"].get("features", {})
        return {
            key: feature
            for child, value in members.items()
            for key, feature in _flatten(f"{name}/{child}", value).items()
        }
    feature = _feature(node)
    return {name: feature} if feature else {}


def _feature(node: dict) -> Feature | None:
    if "text" in node:
        return Feature("text", "object", ())
    if "classLabel" in node:
        return Feature("number", "int64", ())
    if "image" in node:
        return Feature("picture", node["image"].get("dtype", "uint8"), _shape(node["image"]))
    if "tensor" not in node:
        return None
    tensor, shape = node["tensor"], _shape(node["tensor"])
    if tensor["dtype"] in ("object", "string", "str"):
        return None if shape else Feature("text", "object", ())
    if any(size < 1 for size in shape):
        return None
    return Feature("number", np.dtype(tensor["dtype"]).name, shape, tensor.get("encoding", "none"))


def _shape(content: dict) -> tuple[int, ...]:
    return tuple(int(size) for size in content.get("shape", {}).get("dimensions", ()))


# Pictures of an RLDS episode as frames: kept encoded until they are asked for.


class EncodedFrames:
    """A `FrameReader` over JPEG, PNG or other pictures inside a record.

    Args:
        record: the bytes that hold them all, shared by the cameras of an episode.
        places: the first byte of each picture and the one past its end.
        where: for messages.
    """

    def __init__(self, record: bytes, places: Sequence[tuple[int, int]], where: str):
        self._record = record
        self._places = places
        self._where = where

    def __len__(self) -> int:
        return len(self._places)

    def encoded(self, index: int) -> bytes:
        """One picture as it is stored."""
        return self._record[slice(*self._places[index])]

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Frames at `indices` (any order, repeats allowed): uint8 [k, h, w, 3].

        Raises:
            ValueError: if a picture is damaged, or not as large as the others.
        """
        indices = _checked(indices, len(self), self._where)
        frames = {i: self._decode(i) for i in sorted(set(indices))}
        if len(sizes := {frame.shape for frame in frames.values()}) > 1:
            raise ValueError(f"{self._where}: the pictures have different sizes, {sorted(sizes)}")
        return np.stack([frames[i] for i in indices])

    def _decode(self, index: int) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(self.encoded(index))) as picture:
                return np.asarray(picture.convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{self._where}: picture {index} cannot be read ({error}); copy the file again"
            ) from error


class ArrayFrames:
    """A `FrameReader` over pictures that are stored as numbers, uint8 [n, h, w, 3]."""

    def __init__(self, frames: np.ndarray):
        self._frames = frames

    def __len__(self) -> int:
        return len(self._frames)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Frames at `indices` (any order, repeats allowed): uint8 [k, h, w, 3]."""
        return self._frames[_checked(indices, len(self), "pictures")]


def _checked(indices: Sequence[int], length: int, where: str) -> list[int]:
    indices = [int(i) for i in indices]
    if not indices:
        raise ValueError(f"{where}: no frame indices were given")
    if bad := [i for i in indices if not 0 <= i < length]:
        raise IndexError(f"{where}: frame {bad[0]} asked for, but there are {length}")
    return indices


# Steps per second by the beginning of a dataset's name: BridgeData V2, DROID, RT-1, LIBERO.
KNOWN_FPS = {"bridge": 5.0, "droid": 15.0, "fractal": 3.0, "libero": 20.0}


class UnknownRate(ValueError):
    """Nothing says how many steps a second of this dataset has."""


def recognises(path: Path) -> bool:
    """Whether this is a dataset prepared by TFDS, or the folder of its versions."""
    return bool(version_folders(path))


def open_rlds(
    path: Path,
    *,
    name: str,
    embodiment: str,
    split: str = "train",
    fps: float | None = None,
    instruction: str = "",
) -> Sequence[Episode]:
    """Open one split of a dataset; a record is read when its episode is asked for.

    Args:
        path: `<dataset>/<version>`, the folder with `dataset_info.json` and `features.json`.
        name: of the dataset, becomes `Episode.source`.
        embodiment: the robot, becomes `Episode.embodiment`.
        split: "train", "val", ...
        fps: steps per second; may be left out for the datasets of `KNOWN_FPS`.
        instruction: full name of the text to take; "" takes every text that has "instruction" in
            its name. An episode can have several; empty ones are left out. An embedding kept
            beside a text ("language_embedding" beside "language_instruction") goes with it as one
            row; those of Bridge and Open X-Embodiment are sentence embeddings, not T5's.

    Raises:
        UnknownRate: if `fps` is left out and the dataset's own name is not of `KNOWN_FPS`.
        ValueError: if it is no such dataset, or has no such split or text.
    """
    folder = open_folder(path)
    features = read_features(folder.path)
    texts = tuple(key for key in features if _is_instruction(key, features[key], instruction))
    if instruction and not texts:
        raise ValueError(
            f"{folder.path} has no text {instruction!r}, but "
            f"{[key for key in features if features[key].kind == 'text']}; set "
            "dataset.options.instruction"
        )
    records = folder.split(split)
    rate = _known_rate(folder) if fps is None else float(fps)
    opened = _Split(records, split, name, embodiment, rate, features, texts)
    return LazyEpisodes(len(records), opened.load)


def _known_rate(folder: PreparedFolder) -> float:
    for start, rate in KNOWN_FPS.items():
        if folder.name.startswith(start):
            return rate
    known = ", ".join(f"{rate:g} for {start}*" for start, rate in KNOWN_FPS.items())
    raise UnknownRate(
        f"{folder.path} does not say how many steps a second has, and the name {folder.name!r} is "
        f"not one of those known ({known}); set dataset.options.fps"
    )


@dataclass(frozen=True)
class _Split:
    records: RecordFiles
    split: str
    name: str
    embodiment: str
    fps: float
    features: dict[str, Feature]
    texts: tuple[str, ...]

    def load(self, index: int) -> Episode:
        shard, number = self.records.place(index)
        data = self.records.read(shard, number)
        try:
            return self._episode(f"{self.split}/{shard:05d}/{number:05d}", parse_example(data))
        except ValueError as error:
            path = self.records.files[shard]
            raise ValueError(f"{path}, record {number}: {error}") from error

    def _episode(self, id: str, lists: dict[str, Values]) -> Episode:
        values = {key: _values(key, feature, lists) for key, feature in self.features.items()}
        lengths = {key: len(value) for key, value in values.items()}
        length = max(lengths.values())
        if not length:
            raise ValueError("the episode has no steps")
        if short := {key: n for key, n in lengths.items() if n != length}:
            raise ValueError(f"the episode has {length} steps, but these have others: {short}")
        times = np.round(np.arange(length) / self.fps * NANOSECONDS).astype(np.int64)
        said = _language(values, self.texts)
        language = {*self.texts, *map(_embedding_key, self.texts)}
        shown = {
            key: feature
            for key, feature in self.features.items()
            if feature.is_camera or (feature.kind == "number" and key not in language)
        }
        return Episode(
            id=id,
            source=self.name,
            embodiment=self.embodiment,
            instructions=tuple(said) or ("",),
            streams={key: Stream(times, values[key]) for key in shown},
            cameras=tuple(key for key, feature in shown.items() if feature.is_camera),
            embeddings={text: row for text, row in said.items() if row is not None},
        )


def _values(key: str, feature: Feature, lists: dict[str, Values]) -> Sequence:
    if key not in lists:
        raise ValueError(f"there is no {key!r} in it, which features.json promises")
    if feature.kind == "text":
        return lists[key].blobs()
    if feature.kind == "picture":
        return EncodedFrames(lists[key].data, lists[key].items(), key)
    try:
        numbers = feature.numbers(lists[key])
    except (ValueError, zlib.error) as error:
        raise ValueError(f"{key}: {error}") from error
    return ArrayFrames(numbers) if feature.is_camera else numbers


def _language(values: dict[str, Sequence], texts: Sequence[str]) -> dict[str, np.ndarray | None]:
    """The distinct texts of an episode, each with the embedding [1, d] kept beside it, if any."""
    found: dict[str, np.ndarray | None] = {}
    for key in texts:
        rows = values.get(_embedding_key(key))
        for step, text in enumerate(_sentences(key, values[key])):
            if text and text not in found:
                found[text] = _filled(rows[step]) if isinstance(rows, np.ndarray) else None
    return found


def _filled(embedding: np.ndarray) -> np.ndarray | None:
    """As rows, without the zero rows at the end; zeros stand for none."""
    rows = np.atleast_2d(embedding)
    filled = np.flatnonzero(rows.any(axis=1))
    return rows[: filled[-1] + 1] if len(filled) else None


def _sentences(key: str, values: Sequence) -> list[str]:
    if isinstance(values, np.ndarray):  # code points, padded with zeros
        return ["".join(map(chr, row)).split("\0")[0].strip() for row in values.tolist()]
    return [decode_text(value, f"{key} of step {i}").strip() for i, value in enumerate(values)]


def _is_instruction(key: str, feature: Feature, wanted: str) -> bool:
    if wanted:
        return key == wanted and feature.kind == "text"
    leaf = key.rsplit("/", 1)[-1]
    # Language-Table keeps its instructions as code points.
    coded = leaf == "instruction" and feature.dtype == "int32" and len(feature.shape) == 1
    return coded or (feature.kind == "text" and "instruction" in leaf)


def _embedding_key(text: str) -> str:
    return text.replace("instruction", "embedding")
