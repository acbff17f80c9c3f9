"""RLDS datasets (BridgeData V2, DROID, Open X-Embodiment) as TFDS prepares them.

    <name>/<version>/dataset_info.json        file format, splits, records per file
                     features.json            names, shapes and dtypes
                     <name>-<split>.tfrecord-00000-of-00002, or .array_record-...

An episode is one record, a `tf.train.Example`: a map from names to lists of bytes, float32 or
int64. TFDS reads the two JSON files and has the protobuf classes of a record, without TensorFlow.
For TFRecord files it needs TensorFlow, so they are read here: an index of offsets gives random
access, and checksums are verified.

Streams have the dataset's own names ("steps/observation/state", "steps/action", or
"steps/action/<key>" if the action is a dict). RLDS stores neither timestamps nor a frame rate, so
steps are 1 / `fps` apart. Depth, texts and values of variable length are not streams.
"""

import json
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from data_pipelines.episode import NANOSECONDS, Episode, LazyEpisodes, Stream, reason
from data_pipelines.frames import Frames, ImageFrames
from data_pipelines.sources.files import UnknownRate, decode_text, without_padding

if TYPE_CHECKING:  # importing TFDS takes 0.3 s, so only opening a dataset does it
    from tensorflow_datasets.core.dataset_info import DatasetInfo
    from tensorflow_datasets.features import FeatureConnector
    from tensorflow_datasets.proto import tf_feature_pb2

INFO, FEATURES = "dataset_info.json", "features.json"
FORMATS = ("tfrecord", "array_record")
STEPS = "steps"
# Steps per second by the prefix of a dataset's name: BridgeData V2, DROID, RT-1, LIBERO.
KNOWN_FPS = {"bridge": 5.0, "droid": 15.0, "fractal": 3.0, "libero": 20.0}


def recognises(path: Path) -> bool:
    """Whether this is a dataset prepared by TFDS, or the folder of its versions."""
    return bool(_version_folders(path))


def open_rlds(
    path: Path,
    *,
    name: str,
    embodiment: str,
    split: str = "train",
    fps: float | None = None,
    instruction: str = "",
) -> Sequence[Episode]:
    """Opens one split of a dataset; a record is read when its episode is accessed.

    Args:
        path: `<dataset>/<version>`, or `<dataset>` if it holds one version.
        name, embodiment: see `formats`.
        split: "train", "val", ...
        fps: steps per second; optional for the datasets of `KNOWN_FPS`.
        instruction: full name of the text to take; "" takes every text with "instruction" in its
            name. An episode can have several; empty ones are left out. The embedding beside a text
            ("language_embedding" for "language_instruction") is taken as one row; those of Bridge
            and Open X-Embodiment are sentence embeddings, not T5's.

    Raises:
        UnknownRate: if `fps` is None and the dataset's own name does not match `KNOWN_FPS`.
        ValueError: if TFDS did not prepare it, or it has no such split or text.
    """
    folder, info = _read_info(Path(path))
    features = _step_features(folder, info.features)
    texts = tuple(key for key in features if _is_instruction(key, features[key], instruction))
    if instruction and not texts:
        known = [key for key in features if features[key].kind == "text"]
        raise ValueError(
            f"{folder} has no text {instruction!r}, but {known}; set dataset.options.instruction"
        )
    records = _records(folder, info, split)
    rates = (rate for prefix, rate in KNOWN_FPS.items() if info.name.startswith(prefix))
    fps = next(rates, None) if fps is None else fps
    if fps is None:
        known = ", ".join(f"{rate:g} for {prefix}*" for prefix, rate in KNOWN_FPS.items())
        raise UnknownRate(
            f"{folder} has no frame rate, and the name {info.name!r} is not a known one ({known}); "
            "set dataset.options.fps"
        )
    loader = _Split(records, split, name, embodiment, fps, features, texts)
    return LazyEpisodes(records.ends[-1], loader.load)


def _version_folders(path: Path) -> list[Path]:
    """The path itself if it is a prepared folder, or the prepared folders directly below it."""
    found = [path / INFO] if (path / INFO).is_file() else path.glob(f"[0-9]*.[0-9]*.[0-9]*/{INFO}")
    # Other libraries write a dataset_info.json, too.
    return sorted(
        file.parent
        for file in found
        if file.with_name(FEATURES).is_file()
        or any(shard for format in FORMATS for shard in file.parent.glob(f"*.{format}-*-of-*"))
    )


def _read_info(path: Path) -> tuple[Path, "DatasetInfo"]:
    import tensorflow_datasets as tfds

    folders = _version_folders(path)
    if len(folders) != 1:
        found = f"several versions, {[f.name for f in folders]}" if folders else "none"
        raise ValueError(
            f"{path} should be one folder prepared by TFDS, with {INFO} and {FEATURES}, but there "
            f"is {found}; give <name>/<version>"
        )
    (folder,) = folders
    if not (folder / FEATURES).is_file():  # TFDS would say that an old version of it wrote them
        raise ValueError(f"{folder / FEATURES} is missing; copy it again")
    try:
        # TFDS imports the module of every class name in the file, so only its own are allowed.
        names = set(_class_names((folder / FEATURES).read_text("utf-8")))
        if foreign := sorted(n for n in names if not n.startswith("tensorflow_datasets.")):
            raise ValueError(f"{foreign} are not classes of TFDS")
        return folder, tfds.builder_from_directory(folder).info
    except Exception as error:  # TFDS passes on what JSON, protobuf and its own classes raise
        raise ValueError(
            f"{folder}: {INFO} or {FEATURES} is damaged, or needs another version of TFDS "
            f"({type(error).__name__}: {error})"
        ) from error


def _class_names(node: Any) -> Iterator[str]:
    """All class names in features.json, of old and new versions; strings may hold JSON, too."""
    if isinstance(node, str):
        try:
            node = json.loads(node)
        except ValueError:
            return
    if isinstance(node, dict):
        for key in ("pythonClassName", "python_class_name", "type"):
            if isinstance(node.get(key), str):
                yield node[key]
        node = list(node.values())
    for child in node if isinstance(node, list) else ():
        yield from _class_names(child)


def _records(folder: Path, info: "DatasetInfo", split: str) -> "RecordFiles":
    if (format := info.file_format.file_suffix) not in FORMATS:
        raise ValueError(
            f"{folder} is stored as {format}; convert it to {' or '.join(FORMATS)} with "
            "`tfds convert_format` (which needs TensorFlow)"
        )
    splits = {name: found for name, found in info.splits.items() if found.shard_lengths}
    if split not in splits:
        raise ValueError(
            f"{folder} has no split {split!r}, but {', '.join(splits)}; set dataset.options.split"
        )
    # TFDS stores the folder it wrote to; the dataset may have been moved since.
    files = tuple(folder / Path(name).name for name in splits[split].filenames)
    return RecordFiles(files, tuple(accumulate(splits[split].shard_lengths)))


@dataclass(frozen=True)
class Feature:
    """One value of a step."""

    kind: str  # "number", "text" or "image" (encoded, such as JPEG)
    dtype: str  # NumPy's name
    shape: tuple[int | None, ...]  # of one step; None is any size
    encoding: str = "none"  # of numbers: "none", or "bytes" or "zlib" for raw buffers

    @property
    def is_camera(self) -> bool:
        """Whether it is a colour or grey image, not depth (uint16, float32)."""
        image = self.dtype == "uint8" and len(self.shape) == 3
        return image and (self.kind == "image" or self.shape[-1] == 3)


def _step_features(folder: Path, root: "FeatureConnector") -> dict[str, Feature]:
    """The features of a step by their full names, such as "steps/observation/state".

    Values of variable length, sounds, videos and boxes are left out.
    """
    from tensorflow_datasets import features as tfds_features

    found: dict[str, Feature] = {}

    def collect(name: str, node: "FeatureConnector") -> None:
        kind = type(node)  # exactly: a box, for example, is a kind of Tensor
        if kind is tfds_features.FeaturesDict:
            for child, value in node.items():
                collect(f"{name}/{child}", value)
        elif kind is tfds_features.Image:
            found[name] = Feature("image", np.dtype(node.np_dtype).name, node.shape)
        elif kind in (tfds_features.Text, tfds_features.Tensor, tfds_features.Scalar):
            if node.np_dtype == np.object_:
                if not node.shape:
                    found[name] = Feature("text", "object", ())
            elif all(node.shape):
                encoding = node.to_json_content().encoding
                found[name] = Feature("number", np.dtype(node.np_dtype).name, node.shape, encoding)
        elif kind is tfds_features.ClassLabel:
            found[name] = Feature("number", "int64", ())

    if isinstance(root, tfds_features.FeaturesDict) and STEPS in root.keys():
        if isinstance(root[STEPS], tfds_features.Sequence):
            collect(STEPS, root[STEPS].feature)
    if not found:
        raise ValueError(
            f"{folder / FEATURES} is not of an RLDS dataset: its examples are not made of {STEPS}"
        )
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class _Split:
    records: "RecordFiles"
    split: str
    name: str
    embodiment: str
    fps: float
    features: dict[str, Feature]
    texts: tuple[str, ...]

    def load(self, index: int) -> Episode:
        from google.protobuf.message import DecodeError
        from tensorflow_datasets.proto import tf_example_pb2

        shard, number = self.records.place(index)
        data = self.records.read(shard, number)
        where = f"{self.records.files[shard]}, record {number}"
        try:
            stored = tf_example_pb2.Example.FromString(data).features.feature
            values = {
                key: _values(feature, key, stored, where) for key, feature in self.features.items()
            }
            return self._episode(f"{self.split}/{shard:05d}/{number:05d}", values)
        except (ValueError, DecodeError, zlib.error) as error:
            raise ValueError(f"{where}: {error}") from error

    def _episode(self, id: str, values: Mapping[str, Sequence]) -> Episode:
        lengths = {key: len(value) for key, value in values.items()}
        length = max(lengths.values())
        if not length:
            raise ValueError("the episode has no steps")
        if short := {key: n for key, n in lengths.items() if n != length}:
            raise ValueError(f"the episode has {length} steps, but not of every value: {short}")
        times = np.round(np.arange(length) / self.fps * NANOSECONDS).astype(np.int64)
        spoken = _language(values, self.texts)
        language = {*self.texts, *(t.replace("instruction", "embedding") for t in self.texts)}
        shown = {
            key: feature
            for key, feature in self.features.items()
            if feature.is_camera or (feature.kind == "number" and key not in language)
        }
        return Episode(
            id=id,
            source=self.name,
            embodiment=self.embodiment,
            instructions=tuple(spoken) or ("",),
            streams={key: Stream(times, values[key]) for key in shown},
            cameras=tuple(key for key, feature in shown.items() if feature.is_camera),
            embeddings={text: row for text, row in spoken.items() if row is not None},
        )


def _values(
    feature: Feature, key: str, stored: Mapping[str, "tf_feature_pb2.Feature"], where: str
) -> Sequence:
    """The values of a feature in a record: an array [n, *shape], texts as bytes, or frames."""
    kind = stored[key].WhichOneof("kind") if key in stored else None
    if kind is None:
        raise ValueError(f"it has no {key!r}, which {FEATURES} lists")
    values = getattr(stored[key], kind).value
    if (kind == "bytes_list") != (feature.kind != "number" or feature.encoding != "none"):
        raise ValueError(f"{key}: {FEATURES} says {feature}, but it is stored as {kind}")
    if feature.kind == "text":
        return values
    if feature.kind == "image":
        return EncodedFrames(f"{where}: {key}", values)
    dtype = np.dtype(feature.dtype)
    if kind == "bytes_list":
        unpack = zlib.decompress if feature.encoding == "zlib" else bytes
        flat = np.frombuffer(bytearray().join(map(unpack, values)), dtype)
    else:
        flat = np.array(values, np.float32 if kind == "float_list" else np.int64)
        # TFDS stores a uint64 as the int64 with the same bits, all other integers by value, and a
        # float64 rounded to float32.
        flat = flat.view(dtype) if dtype == np.uint64 else flat.astype(dtype)
    try:
        array = flat.reshape(-1, *feature.shape)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    return ArrayFrames(f"{where}: {key}", array) if feature.is_camera else array


class EncodedFrames(ImageFrames):
    """Frames that are stored as JPEG, PNG or other images inside a record."""

    def __init__(self, where: str, images: Sequence[bytes]):
        super().__init__(where, len(images))
        self._images = images

    def __reduce__(self):  # a list inside a protobuf cannot be pickled
        return EncodedFrames, (self.where, list(self._images))

    def encoded(self, number: int) -> bytes:
        """One image as it is stored."""
        return self._images[number]


class ArrayFrames(Frames):
    """Frames that are stored as an array, uint8 [n, h, w, 3]."""

    def __init__(self, where: str, frames: np.ndarray):
        super().__init__(where, len(frames))
        self._frames = frames

    def _read(self, numbers: list[int]) -> np.ndarray:
        return self._frames[numbers]


def _is_instruction(key: str, feature: Feature, wanted: str) -> bool:
    if wanted:
        return key == wanted and feature.kind == "text"
    leaf = key.rsplit("/", 1)[-1]
    # Language-Table keeps its instructions as code points.
    coded = leaf == "instruction" and feature.dtype == "int32" and len(feature.shape) == 1
    return coded or (feature.kind == "text" and "instruction" in leaf)


def _language(values: Mapping[str, Sequence], texts: Sequence[str]) -> dict[str, np.ndarray | None]:
    """The distinct texts of an episode, each with the embedding stored beside it, if any."""
    found: dict[str, np.ndarray | None] = {}
    for key in texts:
        rows = values.get(key.replace("instruction", "embedding"))
        for step, text in enumerate(_sentences(key, values[key])):
            if text and text not in found:
                found[text] = None  # and so if the embedding is zeros
                if isinstance(rows, np.ndarray) and rows[step].any():
                    found[text] = without_padding(np.atleast_2d(rows[step]))
    return found


def _sentences(key: str, values: Sequence) -> list[str]:
    if isinstance(values, np.ndarray):  # code points, padded with zeros
        return ["".join(map(chr, row)).split("\0")[0].strip() for row in values.tolist()]
    return [decode_text(value, f"{key} of step {i}").strip() for i, value in enumerate(values)]


@dataclass(frozen=True)
class RecordFiles:
    """The records of one split, in TFRecord or ArrayRecord files; safe to use from threads."""

    files: tuple[Path, ...]
    ends: tuple[int, ...]  # the number of records up to the end of each file
    _indices: dict[int, tuple[np.ndarray, str]] = field(default_factory=dict)

    def place(self, number: int) -> tuple[int, int]:
        """The file of a record, and the record's number within it."""
        shard = bisect_right(self.ends, number)
        return shard, number - (self.ends[shard - 1] if shard else 0)

    def read(self, shard: int, number: int) -> bytes:
        """A record of a file; ValueError if the file is missing or damaged there."""
        path = self.files[shard]
        if not path.is_file():
            raise ValueError(f"{path} is missing; copy it again")
        if ".tfrecord" in path.name:
            if shard not in self._indices:
                self._indices[shard] = read_index(path)
            return read_record(path, self._indices[shard], number)
        try:
            # Opened for each read (0.5 ms), as datasets have more files than may be open at once.
            # The buffer holds about an episode; with a smaller one a read takes four times as long.
            options = "readahead_buffer_size:0,max_parallelism:0"
            reader = ArrayRecordReader(str(path), options, file_reader_buffer_size=16 * 2**20)
            (data,) = reader.read([number])
            reader.close()
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"{path}: record {number} cannot be read ({error}); copy the file again"
            ) from error
        return data


# A record of a TFRecord file is its length (uint64), the length's checksum, the payload, and the
# payload's checksum, all little-endian (tensorflow/core/lib/io/record_writer.h).
_HEADER, _FOOTER = 12, 4


def read_index(path: Path) -> tuple[np.ndarray, str]:
    """Finds the records of a TFRecord file by their headers; payloads are not read.

    Returns:
        Offset and length of each payload in bytes, int64 [n, 2]; and why no more records can be
        found, "" at the regular end.
    """
    places, at, fault = [], 0, ""
    with open(path, "rb", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        while at < end and not fault:
            header = os.pread(file.fileno(), _HEADER, at)
            start, size = at + _HEADER, int.from_bytes(header[:8], "little")
            if len(header) == _HEADER and not _intact(header[:8], header[8:]):
                fault = reason(path, f"the header of record {len(places)} is damaged")
            elif start + size + _FOOTER > end:  # the header itself may be truncated, too
                fault = f"the file ends within record {len(places)}"
            else:
                places.append((start, size))
                at = start + size + _FOOTER
    return np.array(places, np.int64).reshape(-1, 2), fault


def read_record(path: Path, index: tuple[np.ndarray, str], number: int) -> bytes:
    """One payload; ValueError if the file has no such record or its checksum is wrong."""
    places, fault = index
    if number >= len(places):
        fault = fault or f"the file has {len(places)} records"
        raise ValueError(f"{path}: no record {number}, {fault}; copy the file again")
    start, size = places[number].tolist()
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        payload, checksum = file.read(size), file.read(_FOOTER)
    if len(payload) < size or not _intact(payload, checksum):
        raise ValueError(f"{path}: record {number} is damaged (checksum); copy the file again")
    return payload


def _intact(data: bytes, checksum: bytes) -> bool:
    """Compares with a "masked" CRC32C: rotated, plus a constant."""
    crc = google_crc32c.value(data)
    masked = (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
    return masked == int.from_bytes(checksum, "little")
