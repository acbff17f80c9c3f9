"""Opens a dataset by the name of its format, or finds out which format it has.

A format is one file here with two functions: `recognises(path)`, and `open_<format>(path, *, name,
embodiment, <options>)`, which returns the episodes (mostly `LazyEpisodes`, read when asked for). A
fault of one file is a ValueError of its episode only. Another format is a line in `FORMATS`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from data_pipelines.episode import Episode
from data_pipelines.sources import (
    bridge,
    clips,
    egodex,
    lerobot,
    mimic_video,
    rlds,
    robomimic,
    video_folder,
    webdataset,
)


class Format(NamedTuple):
    """How a kind of dataset is opened, and whether a path looks like one (cheap to find out)."""

    open: Callable[..., Sequence[Episode]]
    recognises: Callable[[Path], bool]


FORMATS = {
    "bridge_raw": Format(bridge.open_bridge_raw, bridge.recognises),
    "clip_list": Format(clips.open_clip_list, clips.recognises),
    "egodex": Format(egodex.open_egodex, egodex.recognises),
    "lerobot": Format(lerobot.open_lerobot, lerobot.recognises),
    "mimic_episodes": Format(mimic_video.open_mimic_episodes, mimic_video.recognises),
    "rlds": Format(rlds.open_rlds, rlds.recognises),
    "robomimic_hdf5": Format(robomimic.open_robomimic_hdf5, robomimic.recognises),
    "video_folder": Format(video_folder.open_video_folder, video_folder.recognises),
    "webdataset": Format(webdataset.open_webdataset, webdataset.recognises),
}


def open_dataset(
    format: str, path: Path, name: str, embodiment: str, options: Mapping[str, Any] | None = None
) -> Sequence[Episode]:
    """Opens a dataset lazily.

    Args:
        format: a key of `FORMATS`.
        path: the dataset's folder or file.
        name: becomes `Episode.source`.
        embodiment: becomes `Episode.embodiment`.
        options: further arguments of this format's `open`, by name.

    Raises:
        ValueError: for an unknown format or option, a missing dataset, or one of another format.
    """
    if format not in FORMATS:
        raise ValueError(
            f"dataset {name!r} has the format {format!r}; supported are {', '.join(FORMATS)}"
        )
    if not Path(path).exists():
        raise ValueError(
            f"dataset {name!r}: there is no folder or file {path}; record or download it first"
        )
    options = dict(options or {})
    opener = FORMATS[format].open
    known = opener.__kwdefaults__ or {}  # name and embodiment have no default
    if unknown := options.keys() - known.keys():
        raise ValueError(
            f"dataset {name!r}: the format {format!r} has no options {sorted(unknown)}; it has "
            f"{sorted(known) or 'none'}"
        )
    fps = options.get("fps")
    if fps is not None and not (isinstance(fps, int | float) and 0 < fps < math.inf):
        raise ValueError(
            f"dataset {name!r}: the option fps is {fps!r}; give a number above 0, per second"
        )
    return opener(Path(path), name=name, embodiment=embodiment, **options)


def detect(path: Path) -> str:
    """The format of a dataset.

    Raises:
        ValueError: if no format, or more than one, recognises the path.
    """
    if not path.exists():
        raise ValueError(f"there is no folder or file {path}; give a dataset's folder or file")
    found = [name for name, format in FORMATS.items() if format.recognises(path)]
    if len(found) != 1:
        what = f"looks like {' and '.join(found)}" if found else "is of no format known here"
        raise ValueError(f"{path} {what}; say which it is: {', '.join(FORMATS)}")
    return found[0]


def open_config(dataset: ConfigDict) -> Sequence[Episode]:
    """Opens the dataset that a config section describes.

    Args:
        dataset: `format`, `path`, `name`, `embodiment`, and if need be `options` of the format.
    """
    return open_dataset(
        dataset.format,
        Path(dataset.path),
        dataset.name,
        dataset.embodiment,
        dataset.get("options", {}),
    )
