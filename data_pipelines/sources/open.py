"""Open a dataset by the name of its format."""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from data_pipelines.episode import Episode
from data_pipelines.sources.lerobot import open_lerobot
from data_pipelines.sources.video_folder import open_video_folder

FORMATS = {"lerobot": open_lerobot, "video_folder": open_video_folder}


def open_dataset(format: str, path: Path, name: str, embodiment: str) -> Sequence[Episode]:
    """Open a dataset lazily.

    Args:
        format: a key of `FORMATS`.
        path: the dataset's folder.
        name: becomes `Episode.source`.
        embodiment: becomes `Episode.embodiment`.

    Raises:
        ValueError: for an unknown format, a missing folder, or a folder that is something else.
    """
    if format not in FORMATS:
        raise ValueError(
            f"dataset {name!r} has the format {format!r}; supported are {', '.join(FORMATS)}"
        )
    if not Path(path).is_dir():
        raise ValueError(
            f"dataset {name!r}: there is no folder {path}; record or download it first"
        )
    return FORMATS[format](Path(path), name=name, embodiment=embodiment)


def open_config(dataset: ConfigDict) -> Sequence[Episode]:
    """Open the dataset that a config section describes: `format`, `path`, `name`, `embodiment`."""
    return open_dataset(dataset.format, Path(dataset.path), dataset.name, dataset.embodiment)
