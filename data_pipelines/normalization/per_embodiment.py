"""One normalizer per embodiment: a gripper's millimetres say nothing about another robot's."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.normalization.column_statistics import column_statistics
from data_pipelines.normalization.normalizer import (
    Mode,
    Normalizer,
    normalizer_from,
    write_statistics,
)
from data_pipelines.records.dataset import RecordDataset
from data_pipelines.selection import PerTask
from data_pipelines.vectors.parts import modes, parse

VECTORS = {"actions": "action", "proprio": "proprio"}  # name in a record -> in the config


@dataclass(frozen=True)
class Normalizers:
    """The normalizers of a run, by embodiment.

    Attributes:
        by_embodiment: of each one; "" is of statistics that name none.
        fingerprint: identity of the data that all were made from.
    """

    by_embodiment: Mapping[str, Normalizer]
    fingerprint: str

    def of(self, embodiment: str = "") -> Normalizer:
        """The normalizer of an embodiment; "" is the only one there is.

        Raises:
            ValueError: if there is none, or more than one for "".
        """
        known = self.by_embodiment
        if len(known) == 1 and (not embodiment or "" in known):
            return next(iter(known.values()))
        if embodiment not in known:
            asked = f"there is none of {embodiment!r}" if embodiment else "say which is meant"
            raise ValueError(
                f"this run has a normalizer for each of the embodiments {', '.join(sorted(known))};"
                f" {asked} (--config.embodiment=NAME)."
            )
        return known[embodiment]

    def save(self, path: Path) -> None:
        """Writes JSON: of one embodiment as `Normalizer.save` does, else each below its name."""
        content = {name: one.as_json() for name, one in self.by_embodiment.items()}
        if len(content) == 1:
            (name, content), *_ = content.items()
            content["meta"]["embodiment"] = name
        else:
            content = {"embodiments": content, "meta": {"fingerprint": self.fingerprint}}
        write_statistics(Path(path), content)


def load_normalizers(path: Path) -> Normalizers:
    """Reads what `Normalizers.save` or `Normalizer.save` wrote."""
    content = json.loads(Path(path).read_text())
    meta = content.get("meta", {})
    each = content.get("embodiments", {meta.get("embodiment", ""): content})
    normalizers = {name: normalizer_from(one, str(path)) for name, one in each.items()}
    return Normalizers(normalizers, meta.get("fingerprint", ""))


def data_fingerprint(
    datasets: Sequence[RecordDataset],
    episodes_per_task: PerTask = None,
    seed: int = 0,
    mask_padding: bool = False,
) -> str:
    """Identity of the statistics that `make_normalizers` makes, known before they are made."""
    identity = [*(dataset.fingerprint for dataset in datasets), f"{episodes_per_task} {seed}"]
    identity += ["mask_padding"] * mask_padding
    return hashlib.sha256("/".join(identity).encode()).hexdigest()


def make_normalizers(
    datasets: Sequence[RecordDataset],
    episodes_per_task: PerTask = None,
    seed: int = 0,
    mask_padding: bool = False,
    *,
    scratch: Path | None = None,
) -> Normalizers:
    """Statistics of actions and proprioception over the training windows of every embodiment.

    Modes are those of the parts that the vectors were made of. Only numbers are read, a column at a
    time: memory does not grow with the data's horizon or dimensions.

    Args:
        datasets: those with actions and proprio.
        episodes_per_task: as in `record_mixture`, so that statistics see what training sees.
        seed: as in `record_mixture`.
        mask_padding: as in `record_mixture`: action steps that are not learned do not count either.
            Proprioception is what the network sees, repeated or not, so all of it counts.
        scratch: a folder to work in, from which a stopped call goes on; removed at the end.

    Raises:
        ValueError: if datasets of one embodiment are normalised differently, or have no windows for
            training, or with `mask_padding` do not tell what is padding.
    """
    choice = (episodes_per_task, seed, mask_padding)
    if mask_padding:
        check_padding_is_told(datasets)
    fingerprint = data_fingerprint(datasets, *choice)
    temporary = scratch is None
    scratch = Path(tempfile.mkdtemp()) if temporary else Path(scratch)
    if not temporary and scratch.exists() and not (scratch / fingerprint).exists():
        shutil.rmtree(scratch)  # left by other data
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / fingerprint).touch()
    try:
        names = sorted({dataset.embodiment for dataset in datasets})
        result = {}
        for number, name in enumerate(names):
            ours = [dataset for dataset in datasets if dataset.embodiment == name]
            sources = [(d, d.record_indices("train", episodes_per_task, seed)) for d in ours]
            folder = scratch / str(number)
            statistics = {
                "actions": column_statistics(sources, "actions", folder, padding=not mask_padding),
                "proprio": column_statistics(sources, "proprio", folder),
            }
            own = data_fingerprint(ours, *choice)
            result[name] = Normalizer(statistics, _modes(ours), own)
        shutil.rmtree(scratch)
    finally:
        if temporary:
            shutil.rmtree(scratch, ignore_errors=True)
    return Normalizers(result, fingerprint)


def check_padding_is_told(datasets: Sequence[RecordDataset]) -> None:
    """Raises ValueError if records were made before they told which actions are padding."""
    for dataset in datasets:
        if "actions" in dataset.shapes and "actions_padded" not in dataset.shapes:
            raise ValueError(
                f"The records of {dataset.name!r} do not tell which actions are padding; encode "
                "them again, or set policy_io.action.mask_padding to False."
            )


def _modes(datasets: Sequence[RecordDataset]) -> dict[str, Mode | tuple[Mode, ...]]:
    """Of one embodiment, whose datasets must agree."""
    chosen: dict[str, tuple[Mode, ...]] = {}
    for dataset in datasets:
        for key, setting in VECTORS.items():
            parts = parse(dataset.settings["dataset"][setting], setting)
            own = tuple(modes(parts, dataset.shapes[key][-1]))
            if chosen.setdefault(key, own) != own:
                raise ValueError(
                    f"The datasets {datasets[0].name!r} and {dataset.name!r} have the embodiment "
                    f"{dataset.embodiment!r}, but normalise {key} differently; make their parts "
                    "alike, or call the embodiments differently."
                )
    # One mode for all dimensions reads better in the file.
    return {key: own[0] if len(set(own)) == 1 else own for key, own in chosen.items()}
