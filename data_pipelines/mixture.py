"""Several record datasets as one endless, shuffled, weighted stream of windows."""

import hashlib
from collections.abc import Mapping, Sequence

import grain
import numpy as np

from data_pipelines.normalizer import Mode, Normalizer, compute_statistics
from data_pipelines.records import RecordDataset


def record_mixture(
    datasets: Sequence[RecordDataset],
    weights: Sequence[float],
    *,
    seed: int,
    split: str,
    with_actions: bool,
    episodes_per_task: int | None = None,
) -> grain.MapDataset:
    """Mixes datasets; element n is a pure function of the arguments and n.

    Every dataset is shuffled and repeated on its own (each epoch in another order), then the
    datasets are interleaved in proportion to their weights.

    Args:
        datasets: the datasets; latents and texts must have the same shapes.
        weights: relative frequency of each dataset, not scaled by its size; positive.
        seed: of the order, and of the choice of episodes.
        split: "train" or "validation".
        with_actions: also yield actions and proprio, which every dataset must then have.
        episodes_per_task: use this many episodes of each distinct instruction.

    Returns:
        An endless Grain dataset of dicts: latents bfloat16 [t', h', w', 16], text float32 [l, d],
        and with actions actions float32 [H, A] and proprio float32 [P, D], raw units.
    """
    _check(datasets, weights, with_actions)
    keys = ("latents", "actions", "proprio") if with_actions else ("latents",)

    def stream(dataset: RecordDataset) -> grain.MapDataset:
        indices = dataset.record_indices(split, episodes_per_task, seed)
        if len(indices) == 0:
            raise ValueError(
                f"Dataset {dataset.name!r} has no records in its {split!r} split; use a larger "
                "validation share or more episodes."
            )

        def load(index: int) -> dict[str, np.ndarray]:
            record = dataset[int(index)]
            return {key: record[key] for key in keys} | {"text": dataset.text(int(record["text"]))}

        # The order depends on the dataset's name, so datasets of one size do not march in step.
        name_seed = int.from_bytes(
            hashlib.md5(f"{seed}/{dataset.name}".encode()).digest()[:4], "big"
        )
        return grain.MapDataset.source(indices).seed(name_seed).shuffle().repeat().map(load)

    streams = [stream(dataset) for dataset in datasets]
    return grain.MapDataset.mix(streams, list(weights)) if len(streams) > 1 else streams[0]


def _check(datasets: Sequence[RecordDataset], weights: Sequence[float], with_actions: bool) -> None:
    if not datasets or len(datasets) != len(weights) or min(weights) <= 0:
        raise ValueError(
            f"{len(datasets)} datasets and the weights {list(weights)} given; every dataset needs "
            "one positive weight."
        )
    first = datasets[0]
    for dataset in datasets:
        keys = ("latents", "actions", "proprio") if with_actions else ("latents",)
        for key in keys:
            if key not in dataset.shapes:
                raise ValueError(f"Dataset {dataset.name!r} has no {key}; train on video only.")
            if dataset.shapes[key] != first.shapes[key]:
                raise ValueError(
                    f"Datasets cannot be mixed: {key} is {dataset.shapes[key]} in "
                    f"{dataset.name!r} and {first.shapes[key]} in {first.name!r}."
                )
        if dataset.text(0).shape != first.text(0).shape:
            raise ValueError(
                f"Datasets cannot be mixed: text is {dataset.text(0).shape} in {dataset.name!r} "
                f"and {first.text(0).shape} in {first.name!r}; encode both with one text encoder."
            )


def action_statistics(
    datasets: Sequence[RecordDataset],
    episodes_per_task: int | None = None,
    seed: int = 0,
    modes: Mapping[str, Mode | Sequence[Mode]] | None = None,
) -> Normalizer:
    """Normalizer for actions and proprio from the training windows; latents are not read.

    Args:
        datasets: datasets that have actions and proprio.
        episodes_per_task: as in `record_mixture`, so that statistics see what training sees.
        seed: as in `record_mixture`.
        modes: modes of "actions" and "proprio"; VARIANCE where absent.
    """
    parts: dict[str, list[np.ndarray]] = {"actions": [], "proprio": []}
    for dataset in datasets:
        indices = dataset.record_indices("train", episodes_per_task, seed)
        for key, column in dataset.columns(*parts).items():
            parts[key].append(column[indices])
    identity = "/".join(
        [*(dataset.fingerprint for dataset in datasets), f"{episodes_per_task} {seed}"]
    )
    return Normalizer(
        {key: compute_statistics(np.concatenate(columns)) for key, columns in parts.items()},
        {key: Mode.VARIANCE for key in parts} | dict(modes or {}),
        hashlib.sha256(identity.encode()).hexdigest(),
    )
