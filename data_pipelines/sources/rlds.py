"""RLDS datasets (BridgeData V2, DROID, Open X-Embodiment) as TFDS prepares them.

    <name>/<version>/dataset_info.json        file format, splits, records per file
                     features.json            names, shapes and dtypes
                     <name>-<split>.tfrecord-00000-of-00002, or .array_record-...

An episode is one record, a `tf.train.Example`: a map from names to lists of bytes, float32 or
int64. TFDS reads the two JSON files and has the protobuf classes of a record, without TensorFlow;
`record_files.py` reads the records.

Streams have the dataset's own names ("steps/observation/state", "steps/action", or
"steps/action/<key>" if the action is a dict). RLDS stores neither timestamps nor a frame rate, so
steps are 1 / `fps` apart. Depth, texts and values of variable length are not streams, and are named
in `Episode.left_out`. A text that changes within an episode makes its `sections`.
"""

import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.episode import Episode, LazyEpisodes, Section, Stream, reason
from data_pipelines.frames import ImageFrames
from data_pipelines.sources import pictures
from data_pipelines.sources.files import (
    UNKNOWN_RATE,
    decode_text,
    sections,
    step_times,
    without_padding,
)
from data_pipelines.sources.pictures import ArrayFrames
from data_pipelines.sources.record_files import RecordFiles

if TYPE_CHECKING:  # importing TFDS takes 0.3 s, so only opening a dataset does it
    from tensorflow_datasets.core.dataset_info import DatasetInfo
    from tensorflow_datasets.features import FeatureConnector
    from tensorflow_datasets.proto import tf_feature_pb2

INFO, FEATURES = "dataset_info.json", "features.json"
FORMATS = ("tfrecord", "array_record")
STEPS = "steps"
# Steps per second of published datasets: BridgeData V2, DROID, RT-1, LIBERO. Their whole names, as
# another dataset may begin with the same word and have another rate.
KNOWN_FPS = {
    r"bridge(_dataset|_orig|_oxe|_data_v2)?": 5.0,
    r"droid(_100)?": 15.0,
    r"fractal20220817_data": 3.0,
    r"libero_(spatial|object|goal|10|90|100)(_no_noops)?": 20.0,
}


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
        ValueError: if TFDS did not prepare it, or it has no such split or text.
    """
    folder, info = _read_info(Path(path))
    features, about = _features(folder, info.features)
    texts = [key for key in features if _is_instruction(key, features[key], instruction)]
    if not texts:  # one of the whole episode, such as "episode_metadata/language_instruction"
        texts = [key for key in about if _is_instruction(key, about[key], instruction)]
        features |= {key: about[key] for key in texts}
    if instruction and not texts:
        known = [key for key, feature in (features | about).items() if feature.kind == "text"]
        raise ValueError(
            f"{folder} has no text {instruction!r}, but {known}; set dataset.options.instruction"
        )
    records = _records(folder, info, split)
    rates = (rate for known, rate in KNOWN_FPS.items() if re.fullmatch(known, info.name))
    fps = next(rates, None) if fps is None else fps
    unknown = "" if fps else UNKNOWN_RATE.format(f"{folder} ({info.name})")
    loader = _Split(records, split, name, embodiment, fps or 1, unknown, features, tuple(texts))
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
        for file in (folder / INFO, folder / FEATURES):
            if placeholder := reason(file, ""):
                raise ValueError(f"{file}: {placeholder}") from error
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


def _records(folder: Path, info: "DatasetInfo", split: str) -> RecordFiles:
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
    if not any(file.is_file() for file in files):
        there = sorted(file.name for file in folder.glob(f"*{split}*-of-*"))
        raise ValueError(
            f"{folder} has none of the {len(files)} files that {INFO} lists for the split "
            f"{split!r}, such as {files[0].name}; "
            + (f"it has {there[0]}" if there else "fetch them")
        )
    return RecordFiles(files, tuple(accumulate(splits[split].shard_lengths)))


@dataclass(frozen=True)
class Feature:
    """One value of a step."""

    kind: str  # "number", "text", "image" (encoded, such as JPEG), or "" if it is not read
    dtype: str = ""  # NumPy's name
    shape: tuple[int | None, ...] = ()  # of one step; None is any size
    encoding: str = "none"  # of numbers: "none", or "bytes" or "zlib" for raw buffers
    order: str = ""  # of numbers that are pictures: `pictures.axes`
    why: str = ""  # it is not read

    @property
    def is_camera(self) -> bool:
        """Whether it is a colour or grey image, not depth (uint16, float32)."""
        return self.kind == "image" or bool(self.order)


def _features(
    folder: Path, root: "FeatureConnector"
) -> tuple[dict[str, Feature], dict[str, Feature]]:
    """The features of a step by their full names, "steps/observation/state", and the others."""
    from tensorflow_datasets import features as tfds_features

    found: dict[str, Feature] = {}

    def collect(name: str, node: "FeatureConnector") -> None:
        if type(node) is tfds_features.FeaturesDict:
            for child, value in node.items():
                collect(f"{name}/{child}", value)
        else:
            found[name] = _feature(node)

    if isinstance(root, tfds_features.FeaturesDict) and STEPS in root.keys():
        if isinstance(root[STEPS], tfds_features.Sequence):
            collect(STEPS, root[STEPS].feature)
        for key in root.keys() - {STEPS}:
            collect(key, root[key])
    steps = {key: found[key] for key in sorted(found) if key.startswith(f"{STEPS}/")}
    if not any(feature.kind for feature in steps.values()):
        raise ValueError(
            f"{folder / FEATURES} is not of an RLDS dataset: its examples are not made of {STEPS}"
        )
    return steps, {key: found[key] for key in sorted(found.keys() - steps.keys())}


def _feature(node: "FeatureConnector") -> Feature:
    from tensorflow_datasets import features as tfds_features

    kind = type(node)  # exactly: a box, for example, is a kind of Tensor
    if kind is tfds_features.Image:
        dtype = np.dtype(node.np_dtype).name
        if dtype == "uint8":
            return Feature("image", dtype, node.shape)
        return Feature("", why=f"{dtype} pictures, such as depth; a camera is uint8")
    if kind is tfds_features.ClassLabel:
        return Feature("number", "int64", ())
    if kind in (tfds_features.Text, tfds_features.Tensor, tfds_features.Scalar):
        if node.np_dtype == np.object_:
            if node.shape:
                return Feature("", why="several texts in each step")
            return Feature("text", "object", ())
        if not all(node.shape):
            return Feature("", why=f"values of shape {list(node.shape)}, whose size may vary")
        dtype, shape = np.dtype(node.np_dtype), tuple(node.shape)
        order = ""
        if dtype == np.uint8:
            try:
                order = pictures.axes(dtype, (1, *shape))
            except ValueError as error:
                return Feature("", why=str(error))
        encoding = node.to_json_content().encoding
        return Feature("number", dtype.name, shape, encoding, order)
    return Feature("", why=f"a feature of the kind {kind.__name__}, which is not read")


@dataclass(frozen=True)
class _Split:
    records: RecordFiles
    split: str
    name: str
    embodiment: str
    fps: float
    unknown_rate: str
    features: dict[str, Feature]
    texts: tuple[str, ...]

    def load(self, index: int) -> Episode:
        from google.protobuf.message import DecodeError
        from tensorflow_datasets.proto import tf_example_pb2

        shard, number = self.records.place(index)
        data = self.records.read(shard, number)
        where = f"{self.records.files[shard]}, record {number}"
        values, left_out = {}, {}
        try:
            stored = tf_example_pb2.Example.FromString(data).features.feature
        except DecodeError as error:
            raise ValueError(f"{where}: {error}") from error
        for key, feature in self.features.items():
            try:
                values[key] = _values(feature, key, stored, where)
            except (ValueError, zlib.error) as error:
                left_out[key] = str(error)
        try:
            id = f"{self.split}/{shard:05d}/{number:05d}"
            return self._episode(id, values, left_out, self.records.finding(shard))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def _episode(
        self, id: str, values: Mapping[str, Sequence], left_out: dict[str, str], finding: str
    ) -> Episode:
        # A value that is cut off, or of another shape than the features say, has another length.
        lengths = {key: len(value) for key, value in values.items() if key.startswith(STEPS)}
        (length, most), *others = Counter(lengths.values()).most_common(2)
        if others and others[0][1] == most:
            raise ValueError(f"how many steps the episode has is not clear: {lengths}")
        if not length:
            raise ValueError("the episode has no steps")
        for key, found in lengths.items():
            if found != length:
                left_out[key] = f"it has {found} values for {length} steps"
        if unread := [key for key in self.texts if key in left_out]:
            raise ValueError(f"{unread[0]}: {left_out[unread[0]]}")
        times = step_times(length, self.fps)
        language = {*self.texts, *(t.replace("instruction", "embedding") for t in self.texts)}
        streams = {}
        for key, feature in self.features.items():
            if key in left_out or key in language:
                continue
            if feature.kind == "text":
                left_out[key] = "text, which is not a stream"
            else:
                streams[key] = Stream(times, values[key])
        texts = {
            key: values[key] if key in lengths else [*values[key]] * length for key in self.texts
        }
        spoken, instructions, parts = _language(times, values, texts)
        return Episode(
            id=id,
            source=self.name,
            embodiment=self.embodiment,
            instructions=instructions,
            streams=streams,
            cameras=tuple(key for key in streams if self.features[key].is_camera),
            embeddings={text: row for text, row in spoken.items() if row is not None},
            sections=parts,
            left_out=left_out,
            findings=(finding,) if finding else (),
            unknown_rate=self.unknown_rate,
        )


def _values(
    feature: Feature, key: str, stored: Mapping[str, "tf_feature_pb2.Feature"], where: str
) -> Sequence:
    """The values of a feature in a record: an array [n, *shape], texts as bytes, or frames."""
    if not feature.kind:
        raise ValueError(feature.why)
    kind = stored[key].WhichOneof("kind") if key in stored else None
    if kind is None:
        raise ValueError(f"the record has no {key!r}, which {FEATURES} lists")
    values = getattr(stored[key], kind).value
    if (kind == "bytes_list") != (feature.kind != "number" or feature.encoding != "none"):
        raise ValueError(f"{FEATURES} says {feature}, but it is stored as {kind}")
    if feature.kind == "text":
        return values
    if feature.kind == "image":
        if empty := sum(not image for image in values):
            raise ValueError(f"{empty} of its {len(values)} pictures are empty")
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
    size = math.prod(feature.shape)
    if len(flat) % size:
        raise ValueError(
            f"{FEATURES} says {list(feature.shape)}, but there are {len(flat)} numbers, which is "
            f"no multiple of {size}"
        )
    array = flat.reshape(-1, *feature.shape)
    return ArrayFrames(f"{where}: {key}", array, feature.order) if feature.order else array


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


def _is_instruction(key: str, feature: Feature, wanted: str) -> bool:
    if wanted:
        return key == wanted and feature.kind == "text"
    leaf = key.rsplit("/", 1)[-1]
    # Language-Table keeps its instructions as code points.
    coded = leaf == "instruction" and feature.dtype == "int32" and len(feature.shape) == 1
    return coded or (feature.kind == "text" and "instruction" in leaf)


def _language(
    times: np.ndarray, values: Mapping[str, Sequence], texts: Mapping[str, Sequence]
) -> tuple[dict[str, np.ndarray | None], tuple[str, ...], tuple[Section, ...]]:
    """The distinct texts of an episode, each with the embedding stored beside it, if any.

    Also the episode's instructions and sections; `texts` are those of `values` that count.
    """
    found: dict[str, np.ndarray | None] = {}
    columns = {key: _sentences(key, column) for key, column in texts.items()}
    for key, column in columns.items():
        rows = values.get(key.replace("instruction", "embedding"))
        rows = rows if isinstance(rows, np.ndarray) and len(rows) == len(times) else None
        for step, text in enumerate(column):
            if text and text not in found:
                found[text] = None  # and so if the embedding is zeros
                if rows is not None and rows[step].any():
                    found[text] = without_padding(np.atleast_2d(rows[step]))
    steps = [tuple(dict.fromkeys(filter(None, row))) for row in zip(*columns.values())]
    return found, *sections(times, steps)


def _sentences(key: str, values: Sequence) -> list[str]:
    if isinstance(values, np.ndarray):  # code points, padded with zeros
        return ["".join(map(chr, row)).split("\0")[0].strip() for row in values.tolist()]
    return [decode_text(value, f"{key} of step {i}").strip() for i, value in enumerate(values)]
