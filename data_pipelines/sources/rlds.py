"""RLDS datasets (BridgeData V2, DROID, Open X-Embodiment) as TFDS prepares them.

    <name>/<version>/dataset_info.json        file format, splits, records per file
                     features.json            names, shapes and dtypes
                     <name>-<split>.tfrecord-00000-of-00002, or .array_record-...

An episode is one record, a `tf.train.Example`: a map from names to lists of bytes, float32 or
int64. TFDS reads the two JSON files and has the protobuf classes of a record, without TensorFlow;
`record_files.py` reads the records, `rlds_features.py` their values.

Streams have the dataset's own names ("steps/observation/state", "steps/action", or
"steps/action/<key>" if the action is a dict). RLDS stores neither timestamps nor a frame rate, so
steps are 1 / `fps` apart. Depth, texts and values of variable length are not streams, and are named
in `Episode.left_out`. A text that changes within an episode makes its `sections`.
"""

import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.episode import Episode, LazyEpisodes, Section, Stream, reason
from data_pipelines.sources.droid_lists import DroidLists, read_droid_lists
from data_pipelines.sources.files import (
    UNKNOWN_RATE,
    decode_text,
    sections,
    step_times,
    without_padding,
)
from data_pipelines.sources.record_files import RecordFiles
from data_pipelines.sources.rlds_features import (
    FEATURES,
    INFO,
    STEPS,
    Feature,
    read_features,
    read_values,
)

if TYPE_CHECKING:  # importing TFDS takes 0.3 s, so only opening a dataset does it
    from tensorflow_datasets.core.dataset_info import DatasetInfo

FORMATS = ("tfrecord", "array_record")
# Steps per second of published datasets: BridgeData V2, DROID, RT-1, LIBERO. Their whole names, as
# another dataset may begin with the same word and have another rate.
KNOWN_FPS = {
    r"bridge(_dataset|_orig|_oxe|_data_v2)?": 5.0,
    r"droid(_100)?": 15.0,
    r"fractal20220817_data": 3.0,
    r"libero_(spatial|object|goal|10|90|100)(_no_noops)?": 20.0,
}
_TIMES = ("timestamp", "timestamps", "time", "time_stamp")  # of steps, by their last names
_UNITS, _SAME_RATE = (1, 1e3, 1e6, 1e9), 0.25  # per second; the share by which rates may differ
_EPISODE = ""  # in place of a feature
# Published with red and blue exchanged, by `prepare_open_x.sh` of kpertsch/rlds_dataset_mod.
_BGR = {
    "berkeley_autolab_ur5": "the wrist camera",
    **dict.fromkeys(
        (
            "berkeley_fanuc_manipulation",
            "stanford_hydra_dataset_converted_externally_to_rlds",
            "utaustin_mutex",
        ),
        "both cameras",
    ),
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
    droid: Mapping[str, Any] | None = None,
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
        droid: which episodes and steps are wanted, and DROID's lists of them: see `droid_lists`.
            An episode failed if its flag `success` says so, or else the folder of its `file_path`.

    Raises:
        ValueError: if TFDS did not prepare it, it has no such split or text, or a list cannot be
            read or used.
    """
    lists = read_droid_lists(droid)
    folder, info = _read_info(Path(path))
    features, about = read_features(folder, info.features)
    texts = [key for key in features if _is_instruction(key, features[key], instruction)]
    if not texts:  # one of the whole episode, such as "episode_metadata/language_instruction"
        texts = [key for key in about if _is_instruction(key, about[key], instruction)]
        features |= {key: about[key] for key in texts}
    if instruction and not texts:
        known = [key for key, feature in (features | about).items() if feature.kind == "text"]
        raise ValueError(
            f"{folder} has no text {instruction!r}, but {known}; set dataset.options.instruction"
        )
    findings = []
    if not texts and (known := [k for k, f in (features | about).items() if f.kind == "text"]):
        findings.append(
            f"no text has 'instruction' in its name, so the instruction is empty; if it is one of "
            f"{known}, name it in dataset.options.instruction"
        )
    if exchanged := _BGR.get(info.name):
        findings.append(
            f"the published {info.name} has red and blue exchanged in {exchanged}, and a mended "
            "copy has the same name; look at the pictures of launch.inspect"
        )
    leaves = {key.rsplit("/", 1)[-1]: key for key in about}
    flags = {key: leaves.get(f"has_{key.rsplit('/', 1)[-1]}") for key in features}
    flags[_EPISODE] = leaves.get("success")
    flags = {k: (f, about[f]) for k, f in flags.items() if f and about[f].kind == "number"}
    path_key = leaves.get("file_path", "")
    recorded = (path_key, about[path_key]) if path_key else None
    if lists is not None:
        lists.check(folder, "episode_metadata/file_path", bool(recorded), _EPISODE in flags)
    records = _records(folder, info, split)
    rates = (rate for known, rate in KNOWN_FPS.items() if re.fullmatch(known, info.name))
    fps = next(rates, None) if fps is None else fps
    unknown = "" if fps else UNKNOWN_RATE.format(f"{folder} ({info.name})")
    said = (features, flags, tuple(texts), tuple(findings), lists, recorded)
    loader = _Split(records, split, name, embodiment, fps or 1, unknown, *said)
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
class _Split:
    records: RecordFiles
    split: str
    name: str
    embodiment: str
    fps: float
    unknown_rate: str
    features: dict[str, Feature]
    # Of a feature: what says whether an episode has it, or dummy values, such as has_image_1. Of
    # the episode itself: whether it succeeded.
    flags: dict[str, tuple[str, Feature]]
    texts: tuple[str, ...]
    findings: tuple[str, ...]  # that concern every episode
    lists: DroidLists | None  # what is wanted
    recorded: tuple[str, Feature] | None  # the path of an episode's recording

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
        findings = [*self.findings, self.records.finding(shard)]
        failed = self._denied(_EPISODE, stored, where)
        if (flag := failed) and not (self.lists and self.lists.success_only):
            findings.append(f"{flag} says that the episode failed; it was taken all the same")
        for key, feature in self.features.items():
            try:
                if flag := self._denied(key, stored, where):
                    raise ValueError(f"{flag} says that the episode does not have it")
                values[key] = read_values(feature, key, stored, where)
            except (ValueError, zlib.error) as error:
                left_out[key] = str(error)
        try:
            id = f"{self.split}/{shard:05d}/{number:05d}"
            episode = self._episode(id, values, left_out, findings)
            if self.lists is None:
                return episode
            path = ""
            if self.recorded:
                (text,) = read_values(self.recorded[1], self.recorded[0], stored, where)
                path = decode_text(text, self.recorded[0])
            times = step_times(self._steps(values)[0], self.fps)
            succeeded = not failed if _EPISODE in self.flags else None
            return self.lists.choose(episode, times, path, succeeded)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def _denied(self, key: str, stored: Mapping[str, Any], where: str) -> str:
        """The flag that says no of a feature or of the episode; "" if none does."""
        flag, feature = self.flags.get(key, ("", None))
        with suppress(ValueError, zlib.error):  # a broken flag says nothing
            said = read_values(feature, flag, stored, where) if flag else ()
            return flag if len(said) and not np.any(said) else ""
        return ""

    def _rate(self, values: Mapping[str, Sequence]) -> str:
        """That stored times of the steps have another rate than `fps`; "" if none has."""
        for key, times in values.items():
            named = key.rsplit("/", 1)[-1] in _TIMES and isinstance(times, np.ndarray)
            if not named or times.size != len(times) or len(times) < 3 or self.unknown_rate:
                continue
            per_step = float(np.median(np.diff(times.ravel().astype(np.float64)))) * self.fps
            # 0: too coarse, as seconds since 1970 in float32
            if per_step and not any(abs(per_step / unit - 1) < _SAME_RATE for unit in _UNITS):
                return f"{key} is not 1 / fps apart in any unit; the option fps was taken"
        return ""

    def _steps(self, values: Mapping[str, Sequence]) -> tuple[int, dict[str, int]]:
        """The number of steps of an episode, and of each value of a step."""
        # A value that is cut off, or of another shape than the features say, has another length.
        lengths = {key: len(value) for key, value in values.items() if key.startswith(STEPS)}
        (length, most), *others = Counter(lengths.values()).most_common(2)
        if others and others[0][1] == most:
            raise ValueError(f"the number of steps of the episode is not clear: {lengths}")
        if not length:
            raise ValueError("the episode has no steps")
        return length, lengths

    def _episode(
        self, id: str, values: Mapping[str, Sequence], left_out: dict[str, str], findings: list[str]
    ) -> Episode:
        length, lengths = self._steps(values)
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
            findings=tuple(filter(None, (*findings, _borders(values, length), self._rate(values)))),
            unknown_rate=self.unknown_rate,
        )


def _borders(values: Mapping[str, Sequence], steps: int) -> str:
    """That a record holds several episodes, as its flags say; "" if they say nothing like it."""
    for key, inner in ((f"{STEPS}/is_first", slice(1, None)), (f"{STEPS}/is_last", slice(-1))):
        flag = np.asarray(values.get(key, ()))
        if flag.shape == (steps,) and flag[inner].any() and not flag.all():
            return (
                f"{key} marks borders within a record, which was taken as one episode; if they are "
                "right, windows run across them"
            )
    return ""


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
