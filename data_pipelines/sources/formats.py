"""Opens a dataset by the name of its format, or detects the format.

A format is one file here with two functions: `recognises(path)`, which is cheap, and
`open_<format>(path, *, name, embodiment, <options>)`, which returns the episodes (usually
`LazyEpisodes`, read on access). `name` becomes `Episode.source` and `embodiment`
`Episode.embodiment`. A fault of one file is a ValueError of its episode only. To add a format, add
a line to `FORMATS`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from data_pipelines.episode import Episode, reason
from data_pipelines.sources import (
    bridge,
    clip_lists,
    egodex,
    lerobot,
    mimic_video,
    rlds,
    robomimic,
    video_folder,
    webdataset,
)


class Format(NamedTuple):
    """The two functions of a format."""

    open: Callable[..., Sequence[Episode]]
    recognises: Callable[[Path], bool]


FORMATS = {
    "bridge_raw": Format(bridge.open_bridge_raw, bridge.recognises),
    "clip_list": Format(clip_lists.open_clip_list, clip_lists.recognises),
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
        options: keyword arguments of this format's `open` function.

    Raises:
        ValueError: if the format or an option is unknown, or the dataset is missing or of another
            format.
    """
    where = f"dataset {name!r}"
    if format not in FORMATS:
        raise ValueError(f"{where} has the format {format!r}; supported are {', '.join(FORMATS)}")
    if not Path(path).exists():
        raise ValueError(f"{where}: there is no folder or file {path}; record or download it first")
    if why := _placeholder(Path(path)):
        raise ValueError(f"{where}: {why}")
    options = dict(options or {})
    opener = FORMATS[format].open
    known = opener.__kwdefaults__ or {}  # name and embodiment have no default
    if unknown := options.keys() - known.keys():
        raise ValueError(
            f"{where}: the format {format!r} has no options {sorted(unknown)}; it has "
            f"{sorted(known) or 'none'}"
        )
    for key, value in options.items():
        if wanted := _unfit(value, str(opener.__annotations__[key])):
            raise ValueError(f"{where}: the option {key} is {value!r}; give {wanted}")
    return opener(Path(path), name=name, embodiment=embodiment, **options)


def _unfit(value: Any, annotation: str) -> str:
    """What an option of this type must be, if a value of it is not; "" if it fits."""
    is_bool = isinstance(value, bool)
    if value is not None and "float" in annotation:
        is_number = isinstance(value, int | float) and not is_bool
        return "" if is_number and 0 < value < math.inf else "a positive number"
    if value is not None and "Sequence" in annotation:  # a string is one, of letters
        return "a list of names" if isinstance(value, str) else ""
    if value is not None and "Mapping" in annotation:
        return "" if isinstance(value, Mapping | ConfigDict) else "a dict of settings"
    return "True or False" if "bool" in annotation and not is_bool else ""


def detect(path: Path) -> str:
    """The format of a dataset; ValueError if no format, or more than one, recognises the path."""
    if not path.exists():
        raise ValueError(f"there is no folder or file {path}; give a dataset's folder or file")
    found = [name for name, format in FORMATS.items() if format.recognises(path)]
    if not found:
        explanations = (robomimic.explain, mimic_video.explain, video_folder.explain)
        whys = (explain(path) for explain in (_placeholder, *explanations))
        if why := next(filter(None, whys), ""):
            raise ValueError(why)
    if len(found) != 1:
        what = f"looks like {' and '.join(found)}" if found else "has no known format"
        raise ValueError(f"{path} {what}; give the format, one of {', '.join(FORMATS)}")
    return found[0]


def _placeholder(path: Path) -> str:
    why = reason(path, "")
    return f"{path}: {why}" if why else ""


def open_config(dataset: ConfigDict) -> Sequence[Episode]:
    """Opens a config's dataset: `format`, `path`, `name`, `embodiment` and maybe `options`."""
    options = dataset.get("options", {})
    return open_dataset(
        dataset.format, Path(dataset.path), dataset.name, dataset.embodiment, options
    )
