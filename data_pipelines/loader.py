"""The training loader: batch n is a pure function of the seed and n."""

from collections.abc import Sequence

import grain
import numpy as np

from data_pipelines.mixture import record_mixture
from data_pipelines.normalization.per_embodiment import Normalizers
from data_pipelines.records.dataset import RecordDataset
from data_pipelines.selection import PerTask


def make_loader(
    datasets: Sequence[RecordDataset],
    weights: Sequence[float],
    batch_size: int,
    seed: int,
    split: str,
    normalizers: Normalizers | None = None,
    episodes_per_task: PerTask = None,
    *,
    mask_padding: bool = False,
    max_bad_share: float = 0.05,
    rows: Sequence[int] | None = None,
    num_threads: int = 4,
    prefetch_batches: int = 8,
) -> grain.DatasetIterator:
    """Endless batches for one process.

    Global batch n is the elements n * batch_size, ... of the mixture, and a process reads some rows
    of it. The number of the next batch is all the state there is (`get_state`, `set_state`), so a
    run continues with the same samples on any number of processes; what threads have read ahead
    does not count.

    Args:
        datasets: see `record_mixture`.
        weights: see `record_mixture`.
        batch_size: global batch size.
        seed: of the order.
        split: "train" or "validation".
        normalizers: also yield actions and proprio, normalised by these.
        episodes_per_task: see `record_mixture`.
        mask_padding: see `record_mixture`.
        max_bad_share: see `record_mixture`; each process counts what it reads.
        rows: the rows of each global batch to read; all of them when None.
        num_threads: reader threads.
        prefetch_batches: batches read ahead.

    Returns:
        An iterator of dicts of float32 arrays, b = len(rows): latents [b, t', h', w', 16], text
        [b, l, d], and with normalizers actions [b, H, A], proprio [b, P, D] and action_mask
        [b, H, A], see `record_mixture`.
    """
    mixture = record_mixture(
        datasets,
        weights,
        seed=seed,
        split=split,
        normalizers=normalizers,
        mask_padding=mask_padding,
        episodes_per_task=episodes_per_task,
        max_bad_share=max_bad_share,
    )
    chosen = range(batch_size) if rows is None else [int(row) for row in rows]

    def read(number: int) -> dict[str, np.ndarray]:
        batch: dict[str, np.ndarray] = {}
        for place, row in enumerate(chosen):
            for key, value in mixture[number * batch_size + row].items():
                if place == 0:  # written once: fresh memory costs as much as filling it
                    batch[key] = np.empty((len(chosen), *np.shape(value)), np.float32)
                batch[key][place] = value
        return batch

    batches = grain.MapDataset.range(len(mixture) // batch_size).map(read)
    # Threads suffice: reading releases the interpreter lock and decoding copies nothing.
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch_batches)
    return iter(batches.to_iter_dataset(options))
