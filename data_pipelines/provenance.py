"""What records were made from, and whether a configuration still says the same.

The encoding job stores every setting that its records depend on. Whoever reads them for a
configuration opens them here (`open_records`): a dataset that has other streams, cameras, parts or
options by now would be learned under the wrong name.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from data_pipelines.augment import Augment
from data_pipelines.cameras import Rows, camera_rows, view_rows
from data_pipelines.cutting import cut_episode
from data_pipelines.episode import Episode
from data_pipelines.records import RecordDataset
from data_pipelines.representations import Mode, Part
from data_pipelines.settings import differences, other_networks, plain
from data_pipelines.sources.formats import FORMATS, open_config
from data_pipelines.vectors import StreamMismatch, parse

# Settings of a dataset that say what its windows hold; they are part of the fingerprint.
_CONTENT = ("name", "video", "views", "action", "proprio", "embodiment", "augment")
_AS_WRITTEN = ("name", "video", "action", "proprio", "embodiment")
# Those that say nothing about it; the others (format, path, options, ...) say where it comes from.
_ELSEWHERE = ("records", "weight", "anchor_fps")
_TRAINING_ONLY = ("mask_padding",)  # settings of policy_io that records do not depend on

log = logging.getLogger(__name__)


def encoding_settings(
    dataset: ConfigDict,
    clip: ConfigDict,
    policy_io: ConfigDict,
    identity: Mapping[str, str],
    **rest: Any,
) -> dict[str, Any]:
    """Every setting that the records depend on; arguments as of `mvjax.encode.encode_dataset`."""
    windows = policy_io if dataset.action or dataset.proprio else {}
    source = {k: v for k, v in dataset.items() if k not in (*_CONTENT, *_ELSEWHERE)}
    described = {name: dataset[name] for name in _AS_WRITTEN if name in dataset}
    if views := clip.get("views"):  # a dataset may describe more
        shown = dataset.get("views") or {}
        described["views"] = {name: shown[name] for name in views if name in shown}
    if augment := Augment.of(dataset).settings():
        described["augment"] = augment
    settings = {
        "dataset": described,
        "source": source,
        "clip": clip,
        "policy_io": _recorded(windows),
        "identity": identity,
    }
    return plain(settings | rest)


def changes(stored: Mapping[str, Any], wanted: Mapping[str, Any], tell: bool = True) -> list[str]:
    """What differs between the settings of records and others, in sentences.

    Another way to write the same is no difference. Another `normalize` is none, as training applies
    it, nor is another path, whose content `check_moved` compares. What old records do not say is
    not compared, and logged with `tell`.
    """
    before, after = plain(stored), plain(wanted)
    described, asked = before["dataset"], after["dataset"]
    described.setdefault("augment", {})  # earlier versions had none, which is a setting, too
    for key, form in _FORMS.items():
        if key in described and key in asked and _same(form, described[key], asked[key]):
            asked[key] = described[key]
    for settings, section in ((before, described), (after, asked)):
        section |= _source(settings.pop("source", {}))
    # Records of earlier versions say less.
    unknown = [key for key in after if key not in before]
    unknown += [
        k for k in asked if k not in described and (k in _CONTENT or "source" not in stored)
    ]
    for key in unknown:
        (after if key in after else asked).pop(key)
    unknown += ["path"] * ("source" not in stored)
    if unknown and tell:
        log.warning(
            "the records of %r do not store their %s, so these are not compared with the "
            "configuration.",
            *(described["name"], ", ".join(unknown)),
        )
    networks = [settings.pop("identity", {}) for settings in (before, after)]
    return differences(before, after) + other_networks(*networks)


def wanted_settings(config: ConfigDict, dataset: ConfigDict) -> dict[str, Any]:
    """The settings of an encoding job for a dataset of a configuration, without the networks."""
    rest = dict(anchor_fps=dataset.get("anchor_fps"), validation_share=config.validation_share)
    return encoding_settings(dataset, config.clip, config.policy_io, {}, **rest)


def open_records(
    config: ConfigDict, dataset: ConfigDict, *, acting: bool, tell: bool = True
) -> RecordDataset:
    """Opens the records of a dataset of a configuration.

    Args:
        config: clip, policy_io, text and validation_share.
        dataset: its section of the dataset.
        acting: whether actions and proprioception are read; otherwise they need not agree.
        tell: log what cannot be compared; False in all processes of a job but one.

    Raises:
        FileNotFoundError: there are no finished records.
        ValueError: they were encoded with other settings, or from other data.
    """
    records = RecordDataset(dataset.records)
    stored, (length, dim) = records.settings, records.text(0).shape
    wanted = wanted_settings(config, dataset)
    compared = ("dataset", "source", "clip", "anchor_fps", "validation_share")
    compared += ("policy_io",) * acting
    unread = () if acting else ("action", "proprio")
    chosen = [_chosen(settings, compared, unread) for settings in (stored, wanted)]
    different = changes(*chosen, tell)
    different += differences(dict(length=length, dim=dim), config.text, "text")
    if different:
        raise ValueError(
            f"The records of {records.name!r} in {records.path} were encoded with other settings: "
            f"{'; '.join(different)}. Use those, or encode them again into another folder."
        )
    check_moved(records, dataset, config.policy_io, tell)
    several = sum(len(row.instructions) > 1 for row in records.episodes)
    if several and "source" not in stored and tell:
        log.warning(
            "the records of %r have episodes with several instructions (%d), which alternate from "
            "window to window. If the task changes within an episode, encode them again.",
            *(records.name, several),
        )
    if acting:
        # `normalize` takes effect here and not in the records: what the configuration says holds.
        described = [parse(stored["dataset"][key], key) for key in ("action", "proprio")]
        asked = [parse(dataset[key], key) for key in ("action", "proprio")]
        if described != asked:
            modes = [[part.normalize.value for part in parts] for parts in asked]
            records.settings["dataset"] |= {k: wanted["dataset"][k] for k in ("action", "proprio")}
            records.normalization = str(modes)
    return records


def check_moved(
    records: RecordDataset, dataset: ConfigDict, policy_io: ConfigDict, tell: bool = True
) -> None:
    """ValueError if `dataset.path` is not where the records come from and holds other data.

    Of the data only the shortest episode is compared. What cannot be read is logged with `tell`:
    training needs the records alone.
    """
    stored = records.settings
    before, now = stored.get("source", {}).get("path"), dataset.get("path")
    if before is None or now is None or Path(before).resolve() == Path(now).resolve():
        return
    moved = f"the records of {records.name!r} were made from {before}"

    def cannot_check(why: object) -> None:
        if tell:
            log.warning(
                "%s, but the configuration says %s; whether that is the same data cannot be "
                "checked: %s.",
                *(moved, now, why),
            )

    if not Path(now).exists():
        return cannot_check("it is not on this machine")

    def digest(episode: Episode) -> str:
        described, anchor_fps = ConfigDict(stored["dataset"]), stored.get("anchor_fps")
        windows = ConfigDict(stored.get("policy_io") or policy_io)
        clip = ConfigDict(stored["clip"])
        return cut_episode(episode, described, clip, windows, anchor_fps).digest()

    rows = records.episodes
    index = min((i for i, row in enumerate(rows) if row.count), key=lambda i: rows[i].count)
    try:
        episodes = open_config(dataset)
        what = f"it has {len(episodes)} episodes instead of {len(rows)}"
        if len(episodes) == len(rows):
            what = difference(index, rows[index].id, rows[index].digest, episodes, digest)
    except Exception as error:  # readers and decoders raise types of their own
        return cannot_check(f"{type(error).__name__}: {error}")
    if what:
        raise ValueError(
            f"T{moved[1:]}, but {now} (config.datasets...path) holds other data: {what}. Restore "
            "the path (training does not read it), or encode again into another folder."
        )


def difference(
    index: int,
    id: str,
    stored: str,
    episodes: Sequence[Episode],
    digest: Callable[[Episode], str],
) -> str:
    """How an encoded episode differs from the source's own; "" if it does not.

    One episode is enough to notice data that were recorded or converted again. `stored` is its
    digest, "" in old records.
    """
    episode = episodes[index]
    if episode.id != id:
        return f"episode number {index} is {episode.id!r} instead of {id!r}"
    try:
        same = stored in ("", digest(episode))
    except StreamMismatch as error:
        return f"episode {id!r} does not fit ({error})"
    return "" if same else f"episode {id!r} is no longer what it was, or is read in another way"


def _source(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is set of where data come from, but for the path; an option's default is the option."""
    options, format = settings.get("options") or {}, FORMATS.get(settings.get("format"))
    defaults = plain(format.open.__kwdefaults__ or {}) if format else {}
    every = {**settings, "options": defaults | options}
    return {k: v for k, v in every.items() if k != "path" and v not in (None, {}, [], "")}


def _recorded(policy_io: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The windows of actions and proprioception without the settings that only training reads."""
    return {
        name: {key: value for key, value in window.items() if key not in _TRAINING_ONLY}
        for name, window in plain(policy_io).items()
    }


def _chosen(
    settings: Mapping[str, Any], names: Sequence[str], unread: Sequence[str]
) -> dict[str, Any]:
    chosen = {name: settings[name] for name in names if name in settings}
    return chosen | {"dataset": {k: v for k, v in settings["dataset"].items() if k not in unread}}


def _same(form: Callable[[Any], Any], before: Any, after: Any) -> bool:
    with suppress(ValueError):  # a description that is wrong is explained where it is used
        return form(before) == form(after)
    return False


def _vector(description: Any) -> list[Part]:
    return [replace(part, normalize=Mode.VARIANCE) for part in parse(description)]


def _views(shown: Mapping[str, Any]) -> dict[str, Rows]:
    return {name: view_rows(cameras) for name, cameras in shown.items()}


# Settings that can be written in several ways -> what they mean.
_FORMS = {"video": camera_rows, "views": _views, "action": _vector, "proprio": _vector}
