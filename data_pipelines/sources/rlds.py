"""RLDS datasets (BridgeData V2, DROID, Open X-Embodiment) as TFDS prepares them.

Read without TensorFlow, from TFRecord and from ArrayRecord files alike: an episode is one record,
found by its offset and checked by its checksum. Streams carry the dataset's own names
("steps/observation/state", "steps/action", or "steps/action/<key>" where the action is a dict).

RLDS has no place for timestamps or a frame rate, so steps are 1 / `fps` apart. Depth, text and
values of which a step has any number are no streams.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.episode import NANOSECONDS, Episode, LazyEpisodes, Stream
from data_pipelines.sources.rlds_example import Values, parse_example
from data_pipelines.sources.rlds_features import Feature, read_features
from data_pipelines.sources.rlds_folder import (
    PreparedFolder,
    RecordFiles,
    open_folder,
    version_folders,
)
from data_pipelines.sources.rlds_frames import ArrayFrames, EncodedFrames
from data_pipelines.sources.text import decode_text

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
