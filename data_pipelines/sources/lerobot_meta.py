"""What all versions of LeRobot datasets have in common in their metadata."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """Where an episode is.

    Attributes:
        number: its episode_index.
        length: its rows.
        tasks: what the list of episodes says happens in it.
        data: the parquet file with its rows.
        videos: video feature -> file, first second, last second (exclusive).
    """

    number: int
    length: int
    tasks: Sequence[str]
    data: Path
    videos: Mapping[str, tuple[Path, float, float]]


@dataclass(frozen=True)
class Listing:
    """The episodes of a dataset, as far as its lists can be read.

    Attributes:
        numbers: the episode_index of each, increasing.
        place: finds the i-th of them; may raise KeyError or ValueError.
        tasks: task_index -> text.
        faults: what could not be read, for messages.
    """

    numbers: Sequence[int]
    place: Callable[[int], Place]
    tasks: Mapping[int, str]
    faults: Sequence[str]


def read_info(path: Path) -> dict:
    """The content of meta/info.json.

    Raises:
        ValueError: if it is missing, damaged, or says too little.
    """
    file = path / "meta/info.json"
    if not file.is_file():
        raise ValueError(f"{path} is no LeRobot dataset: it has no meta/info.json")
    try:
        info = json.loads(file.read_text(encoding="utf-8-sig"))
        features = info.get("features", {})
        whole = features and all(
            isinstance(feature["dtype"], str) and isinstance(feature["shape"], list)
            for feature in features.values()
        )
        whole = whole and isinstance(info.get("data_path"), str) and info.get("fps", 0) > 0
        whole = whole and isinstance(info.get("total_episodes"), int)
        whole = whole and (isinstance(info.get("video_path"), str) or not video_features(info))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is damaged ({type(error).__name__}: {error}); copy it again"
        ) from error
    if not whole:
        raise ValueError(
            f"{file} must say fps, data_path, total_episodes, video_path where there are videos, "
            "and the dtype and shape of every feature; copy or convert the dataset again"
        )
    return info


def video_features(info: Mapping) -> list[str]:
    """The features that are stored as video."""
    return [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
