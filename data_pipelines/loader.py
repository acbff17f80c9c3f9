"""The training loader: batches that are a pure function of seed, position and process."""

from collections.abc import Sequence

import grain
import numpy as np

from data_pipelines.mixture import record_mixture
from data_pipelines.normalizer import Normalizer
from data_pipelines.records import RecordDataset


def make_loader(
    datasets: Sequence[RecordDataset],
    weights: Sequence[float],
    batch_size: int,
    seed: int,
    split: str,
    normalizer: Normalizer | None = None,
    episodes_per_task: int | None = None,
    *,
    with_actions: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
    prefetch_batches: int = 8,
) -> grain.DatasetIterator:
    """Endless batches for one process.

    Each global batch is a run of consecutive elements of the mixture, and process p takes the p-th
    of `process_count` equal blocks of it: the blocks of all processes in order are the batch that a
    single process would get. The position is all the state there is (`get_state`, `set_state`);
    what threads have read ahead does not count.

    Args:
        datasets: see `record_mixture`.
        weights: see `record_mixture`.
        batch_size: global batch size.
        seed: of the order.
        split: "train" or "validation".
        normalizer: for "actions" and "proprio"; required with actions.
        episodes_per_task: use this many episodes of each distinct instruction.
        with_actions: also yield actions and proprio.
        process_index: this process.
        process_count: number of processes.
        num_threads: reader threads.
        prefetch_batches: batches read ahead.

    Returns:
        An iterator of dicts of float32 arrays, b = batch_size / process_count: latents
        [b, t', h', w', 16], text [b, l, d], and with actions actions [b, H, A] and proprio
        [b, P, D], both normalised.
    """
    if batch_size % process_count:
        raise ValueError(
            f"A batch of {batch_size} cannot be split over {process_count} processes; choose a "
            "multiple."
        )
    if with_actions and normalizer is None:
        raise ValueError("Actions were asked for without a normalizer; see action_statistics.")

    def finish(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for key in ("actions", "proprio") if with_actions else ():
            batch[key] = normalizer.normalize(key, batch[key])
        return {key: value.astype(np.float32, copy=False) for key, value in batch.items()}

    mixture = record_mixture(
        datasets,
        weights,
        seed=seed,
        split=split,
        with_actions=with_actions,
        episodes_per_task=episodes_per_task,
    )
    batches = mixture.batch(batch_size // process_count, drop_remainder=True)
    local = batches[process_index::process_count].map(finish)
    # Threads suffice: reading releases the interpreter lock and decoding copies nothing.
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch_batches)
    return iter(local.to_iter_dataset(options))
