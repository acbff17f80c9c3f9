"""Normalisation of actions and proprioception: modes, and one normalizer per embodiment.

From top to bottom: `Normalizer` (applies and inverts the modes), `Normalizers` (those of a run,
stored as `normalizer.json`), `make_normalizers` (from the training records), `released_normalizer`
(from the published `dataset_statistics/*.json`). `statistics.py` computes the statistics and says
what each mode makes of them.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.atomic import write_text
from data_pipelines.episode import PerTask, reason
from data_pipelines.records import RecordDataset
from data_pipelines.representations import Mode, Part
from data_pipelines.statistics import (
    NAMES,
    PERCENTILES,
    Affine,
    Statistics,
    affine_of,
    collapsed,
    column_statistics,
    concat_statistics,
)
from data_pipelines.vectors import dims, modes, parse

VECTORS = {"actions": "action", "proprio": "proprio"}  # key of a record -> of the config
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Normalizer:
    """Normalises named arrays, each with its own statistics and mode."""

    statistics: Mapping[str, Statistics]  # key -> output of `compute_statistics`
    modes: Mapping[str, Mode | Sequence[Mode]]  # one, or one per dimension of the last axis
    fingerprint: str = ""  # identity of the data that the statistics were computed from
    # Of released statistics: their entries' names of each key, and the digest of the converted
    # decoder that they were given to.
    streams: Mapping[str, Sequence[str]] = field(default_factory=dict)
    decoder: str = ""

    def __post_init__(self) -> None:
        for key, mode in self.modes.items():
            missing = set(NAMES) - set(self.statistics.get(key, ()))
            if missing and mode != Mode.NONE:
                raise ValueError(
                    f"Normalizer key {key!r} has mode {mode} but lacks the statistics "
                    f"{sorted(missing)}; known keys: {sorted(self.statistics)}."
                )

    def normalize(self, key: str, values: np.ndarray) -> np.ndarray:
        """Raw values [..., horizon, dim] to normalised, clamped float32 values."""
        affine, values = self._checked(key, values)
        if affine is None:
            return values
        return np.clip((values - affine.shift) * affine.scale, affine.clamp_min, affine.clamp_max)

    def unnormalize(self, key: str, values: np.ndarray) -> np.ndarray:
        """Normalised values [..., horizon, dim] to raw float32 values, without clamping."""
        affine, values = self._checked(key, values)
        return values if affine is None else values / affine.scale + affine.shift

    @cached_property
    def affines(self) -> dict[str, Affine]:
        """Key -> affine map and clamps, for use in jitted code; without the keys of mode NONE."""
        return {key: self._affine(key, mode) for key, mode in self.modes.items() if mode != "NONE"}

    def _affine(self, key: str, mode: Mode | Sequence[Mode]) -> Affine:
        statistics = self.statistics[key]
        if isinstance(mode, str):
            return affine_of(statistics, Mode(mode))
        dim = np.shape(statistics["mean"])[-1]
        if len(mode) != dim:
            raise ValueError(f"Key {key!r} has {dim} dimensions but {len(mode)} modes.")
        whole = {m: vars(affine_of(statistics, Mode(m))) for m in set(mode)}
        parts = (one.name for one in fields(Affine))
        return Affine(
            *(np.stack([whole[m][part][..., i] for i, m in enumerate(mode)], -1) for part in parts)
        )

    def _checked(self, key: str, values: np.ndarray) -> tuple[Affine | None, np.ndarray]:
        """The affine map of a key (None for mode NONE), and the values as float32."""
        if key not in self.modes:
            raise KeyError(f"Normalizer has no key {key!r}; it has {sorted(self.modes)}.")
        affine, values = self.affines.get(key), np.asarray(values, np.float32)
        shape = () if affine is None else affine.shift.shape
        if shape and values.shape[-len(shape) :] != shape:
            raise ValueError(
                f"{key!r} has shape {values.shape}, but its statistics have "
                f"[..., {', '.join(map(str, shape))}]; check horizon and dim in the config."
            )
        return affine, values

    def save(self, path: str | Path) -> None:
        """Writes `as_json`."""
        write_text(Path(path), json.dumps(self.as_json()))

    def as_json(self) -> dict[str, Any]:
        """JSON values in the release's layout `{key: {min, max, ...}}`, plus one "meta" entry."""
        content = {
            key: {name: np.asarray(value).tolist() for name, value in statistics.items()}
            for key, statistics in self.statistics.items()
        }
        modes = {
            k: str(m) if isinstance(m, str) else list(map(str, m)) for k, m in self.modes.items()
        }
        meta = {"modes": modes, "fingerprint": self.fingerprint}
        if self.streams or self.decoder:
            meta |= {"streams": dict(self.streams), "decoder": self.decoder}
        return content | {"meta": meta}


@dataclass(frozen=True)
class Normalizers:
    """The normalizers of a run, one per embodiment, because robots differ in scales and units."""

    by_embodiment: Mapping[str, Normalizer]  # "" for statistics that name no embodiment
    fingerprint: str  # identity of the data that all were made from

    def of(self, embodiment: str = "") -> Normalizer:
        """The normalizer of an embodiment; "" stands for the only one."""
        known = self.by_embodiment
        if len(known) == 1 and (not embodiment or "" in known):
            return next(iter(known.values()))
        if embodiment not in known:
            asked = f"there is none of {embodiment!r}" if embodiment else "choose one"
            raise ValueError(
                f"this run has normalizers of the embodiments {', '.join(sorted(known))}; "
                f"{asked} (--config.embodiment=NAME)."
            )
        return known[embodiment]

    def save(self, path: Path) -> None:
        """Writes JSON: a single normalizer as `Normalizer.save` does, several by embodiment."""
        content = {name: one.as_json() for name, one in self.by_embodiment.items()}
        if len(content) == 1:
            (name, content), *_ = content.items()
            content["meta"]["embodiment"] = name
        else:
            content = {"embodiments": content, "meta": {"fingerprint": self.fingerprint}}
        write_text(Path(path), json.dumps(content))


def load_normalizers(path: Path) -> Normalizers:
    """Reads what `Normalizers.save` or `Normalizer.save` wrote; OSError if it is damaged."""
    try:
        content = json.loads(Path(path).read_text())
        if not isinstance(content, dict):
            raise ValueError("it holds no statistics")
    except ValueError as error:
        why = reason(path, error)
        raise OSError(f"{path} is damaged ({why}); restore a copy of the run's.") from error
    meta = content.get("meta", {})
    each = content.get("embodiments", {meta.get("embodiment", ""): content})
    normalizers = {}
    for name, one in each.items():
        if "meta" not in one:
            raise ValueError(
                f"{path} has statistics but no modes, like a released file; use launch.convert."
            )
        statistics = {
            key: {statistic: np.asarray(value) for statistic, value in entry.items()}
            for key, entry in one.items()
            if key != "meta"
        }
        about = one["meta"]
        given = about.get("streams", {}), about.get("decoder", "")
        normalizers[name] = Normalizer(statistics, about["modes"], about["fingerprint"], *given)
    return Normalizers(normalizers, meta.get("fingerprint", ""))


# Normalizers from the training records.


def make_normalizers(
    datasets: Sequence[RecordDataset],
    episodes_per_task: PerTask = None,
    seed: int = 0,
    mask_padding: bool = False,
    *,
    scratch: Path | None = None,
) -> Normalizers:
    """Makes normalizers from the training windows of every embodiment.

    The modes are those of the parts of the vectors. Numbers are read one column at a time, so
    memory does not grow with the horizon or the number of dimensions.

    Args:
        datasets: datasets with actions and proprio.
        episodes_per_task, seed: as in `record_mixture`, so that statistics cover what is learned.
        mask_padding: as in `record_mixture`. Padded action steps, which are not learned, do not
            count. Padded proprioception does, because the network sees it.
        scratch: a folder for intermediate results, from which a stopped call resumes; removed at
            the end.

    Raises:
        ValueError: datasets of one embodiment have different modes, a dataset has no training
            windows, or `mask_padding` is set and records do not mark padding.
    """
    choice = (episodes_per_task, seed, mask_padding)
    if scratch is None:
        with tempfile.TemporaryDirectory() as folder:
            return make_normalizers(datasets, *choice, scratch=Path(folder) / "statistics")
    if mask_padding:
        require_padding_marks(datasets)
    fingerprint = data_fingerprint(datasets, *choice)
    if scratch.exists() and not (scratch / fingerprint).exists():
        shutil.rmtree(scratch)  # it belongs to other data
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / fingerprint).touch()
    result = {}
    for number, name in enumerate(sorted({dataset.embodiment for dataset in datasets})):
        ours = [dataset for dataset in datasets if dataset.embodiment == name]
        sources = [(d, d.record_indices("train", episodes_per_task, seed)) for d in ours]
        folder = scratch / str(number)
        statistics = {
            "actions": column_statistics(sources, "actions", folder, padding=not mask_padding),
            "proprio": column_statistics(sources, "proprio", folder),
        }
        result[name] = Normalizer(statistics, _modes(ours), data_fingerprint(ours, *choice))
        for sentence in _losses(ours, result[name]):
            log.warning(sentence)
    shutil.rmtree(scratch)
    return Normalizers(result, fingerprint)


def data_fingerprint(
    datasets: Sequence[RecordDataset],
    episodes_per_task: PerTask = None,
    seed: int = 0,
    mask_padding: bool = False,
) -> str:
    """Identity of the result of `make_normalizers`, without computing it."""
    identity = [dataset.fingerprint + dataset.normalization for dataset in datasets]
    identity += [f"{episodes_per_task} {seed}"]
    identity += ["mask_padding"] * mask_padding
    return hashlib.sha256("/".join(identity).encode()).hexdigest()


def require_padding_marks(datasets: Sequence[RecordDataset]) -> None:
    """Raises ValueError for old records, which do not mark padded actions."""
    for dataset in datasets:
        if "actions" in dataset.shapes and "actions_padded" not in dataset.shapes:
            raise ValueError(
                f"The records of {dataset.name!r} do not mark padded actions; encode them again, "
                "or set policy_io.action.mask_padding to False."
            )


def _modes(datasets: Sequence[RecordDataset]) -> dict[str, Mode | tuple[Mode, ...]]:
    """The modes of one embodiment, in which its datasets must agree."""
    chosen: dict[str, tuple[Mode, ...]] = {}
    for dataset in datasets:
        for key, setting in VECTORS.items():
            parts = parse(dataset.settings["dataset"][setting], setting)
            own = modes(parts, dataset.shapes[key][-1])
            if chosen.setdefault(key, own) != own:
                raise ValueError(
                    f"The datasets {datasets[0].name!r} and {dataset.name!r} have the embodiment "
                    f"{dataset.embodiment!r} but normalise {key} differently; use the same parts, "
                    "or different embodiments."
                )
    # A single mode for all dimensions keeps the file readable.
    return {key: own[0] if len(set(own)) == 1 else own for key, own in chosen.items()}


def _losses(datasets: Sequence[RecordDataset], normalizer: Normalizer) -> Iterator[str]:
    """What the normalizer of one embodiment loses: a sentence for each dimension."""
    whose = ", ".join(dataset.name for dataset in datasets)
    for key, setting in VECTORS.items():
        statistics = normalizer.statistics[key]
        dim = np.shape(statistics["mean"])[-1]
        names = dimension_names(parse(datasets[0].settings["dataset"][setting], setting), dim)
        for i, what in collapsed(statistics, normalizer.modes[key]):
            yield f"{whose}: dimension {i} of the {setting} ({names[i]}) {what}"
        low, high = (statistics[end].reshape(-1, dim) for end in ("min", "max"))
        constant = np.flatnonzero((low.min(0) == high.max(0)) & [name != "pad" for name in names])
        for i, (least, most) in _held_out_ranges(datasets, key, constant).items():
            if max(low[0, i] - least, most - low[0, i]) > 1e-5:
                yield (
                    f"{whose}: dimension {i} of the {setting} ({names[i]}) is always {low[0, i]:g} "
                    f"in the training episodes, but {least:g} to {most:g} in those held out: "
                    "it is learned as a constant"
                )


def _held_out_ranges(
    datasets: Sequence[RecordDataset], key: str, dimensions: np.ndarray
) -> dict[int, tuple[float, float]]:
    """The smallest and largest value of some dimensions in the validation records."""
    ranges: dict[int, tuple[float, float]] = {}
    for dataset in datasets if len(dimensions) else ():
        chosen = dataset.record_indices("validation")
        values = dataset.columns(key)[key][chosen][..., dimensions].reshape(-1, len(dimensions))
        for i, column in zip(dimensions.tolist(), values.T if len(values) else ()):
            known = ranges.get(i, (np.inf, -np.inf))
            ranges[i] = min(known[0], column.min()), max(known[1], column.max())
    return ranges


def dimension_names(parts: Sequence[Part], dim: int) -> list[str]:
    """Where each number of a vector comes from: "action[6]", "eef (pose) 2" or "pad"."""
    names = []
    for part, width in zip(parts, dims(parts, dim)):
        stream = "/".join(part.streams)
        for i in range(width):
            if part.pad:
                names.append("pad")
            elif part.represent in ("values", "delta", "gripper"):
                names.append(f"{stream}[{part.columns[i] if part.columns else i}]")
            else:
                names.append(f"{stream} ({part.represent}) {i}")
    return names


# The released `dataset_statistics/*.json`, as a normalizer for the released decoders.
#
# The release normalises each stream separately and concatenates position (3), rotation (6) and
# gripper (1). Its keys are `action/<stream>` and `obs/<stream>`, e.g. `obs/eef_pos_lowdim`.
# Positions and grippers have the mode VARIANCE, rotations IDENTITY (mimic-video release,
# `configs/dataloading/policy_io`).

_RELEASED_MODES = {"pos": Mode.VARIANCE, "rot": Mode.IDENTITY, "gripper": Mode.VARIANCE}  # in order
_ROLES = {*_RELEASED_MODES, "pose", "quat", "mat", "6d", "action", "state", "lowdim"}
_RELEASED_PREFIXES = {"actions": "action/", "proprio": "obs/"}


def looks_like_statistics(path: Path) -> bool:
    """Whether a file is JSON rather than weights."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(64).lstrip().startswith(b"{")


def released_normalizer(path: Path) -> Normalizer:
    """Reads released statistics as the normalizer of "actions" and "proprio".

    The `normalizer.json` of a run of this project is read, too: its decoder may have been exported
    and come back without it.

    Raises:
        ValueError: they are damaged, not of one position, rotation and gripper each, or of
            several robots.
    """
    text = path.read_bytes()
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); copy or download it again.") from error
    if "meta" in content:
        normalizers = load_normalizers(path).by_embodiment
        if len(normalizers) > 1:
            raise ValueError(
                f"{path} holds the statistics of several robots ({', '.join(sorted(normalizers))}),"
                " but a converted decoder takes those of one."
            )
        return next(iter(normalizers.values()))
    if "weight_map" in content:
        raise ValueError(f"{path} is the index of weights in several files; give its folder.")
    incomplete = [k for k, v in content.items() if not isinstance(v, dict) or "mean" not in v]
    if incomplete or not content:
        lacking = f"{', '.join(incomplete[:5])} lack mean" if incomplete else "it is empty"
        raise ValueError(f"{path} is not a file of statistics: {lacking}")
    statistics, modes, streams = {}, {}, _released_streams(path, content)
    for name, keys in streams.items():
        for key in keys:
            _check_released(path, key, content[key])
        try:
            statistics[name] = concat_statistics(content, keys)
        except ValueError as error:
            raise ValueError(
                f"{path}: the entries {', '.join(keys)} do not go together ({error})."
            ) from error
        dims = [np.shape(content[key]["mean"])[-1] for key in keys]
        modes[name] = [m for m, dim in zip(_RELEASED_MODES.values(), dims) for _ in range(dim)]
    fingerprint = f"released {hashlib.sha256(text).hexdigest()[:16]}"
    return Normalizer(statistics, modes, fingerprint, streams)


def _check_released(path: Path, key: str, entry: Mapping[str, Any]) -> None:
    """Raises ValueError unless an entry of released statistics can normalise anything."""
    if lacking := [name for name in NAMES if name not in entry]:
        raise ValueError(f"{path}: the entry {key} lacks {', '.join(lacking)}.")
    shape = np.shape(entry["mean"])
    for name in NAMES:
        values, expected = entry[name], shape
        if name == "percentiles":
            expected = (PERCENTILES, *shape)
        try:
            values = np.asarray(values, np.float64)
        except (TypeError, ValueError):
            values = np.array(np.nan)
        if values.shape != expected or not np.isfinite(values).all():
            raise ValueError(
                f"{path}: {name} of the entry {key} must be finite numbers of the shape "
                f"{list(expected)}; copy or download the file again."
            )
    low, high, spread = (np.asarray(entry[n]) for n in ("clamp_min", "clamp_max", "std_clamped"))
    if (low > high).any() or (spread < 0).any():
        raise ValueError(
            f"{path}: the entry {key} has a clamp_min above clamp_max or a std_clamped below 0; "
            "copy or download the file again."
        )


def strange_streams(normalizer: Normalizer, key: str, names: Sequence[str]) -> list[str]:
    """The entries of released statistics that are not of these streams of the release's format.

    A pose `eef_pose_lowdim` is normalised as `eef_pos_lowdim` and `eef_rot_lowdim`, so what is
    compared are the words that say which part of which robot it is.
    """

    def robot(name: str) -> frozenset[str]:
        return frozenset(name.rpartition("/")[2].split("_")) - _ROLES

    known = {robot(name) for name in names}
    return [name for name in normalizer.streams.get(key, ()) if robot(name) not in known]


def _released_streams(path: Path, content: Mapping[str, Any]) -> dict[str, list[str]]:
    """The entries of each vector: position, rotation, gripper."""
    result = {}
    for name, prefix in _RELEASED_PREFIXES.items():
        found = [key for key in content if key.startswith(prefix)]
        words = {key: key.removeprefix(prefix).split("_") for key in found}
        keys = [key for stream in _RELEASED_MODES for key in found if stream in words[key]]
        if not len(keys) == len(found) == len(_RELEASED_MODES):
            raise ValueError(
                f"{path} must have one position, rotation and gripper entry below {prefix!r}; "
                f"it has {', '.join(found) or 'none'}."
            )
        result[name] = keys
    return result
