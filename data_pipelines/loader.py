"""The training loader: batch n is a pure function of the seed and n."""

import hashlib
import sys
import threading
from collections.abc import Callable, Sequence

import grain
import numpy as np
from tqdm import tqdm

from data_pipelines.episode import BadShare, PerTask
from data_pipelines.normalize import VECTORS, Normalizers, check_padding_is_told
from data_pipelines.records import DamagedRecord, RecordDataset
from data_pipelines.vectors import mask, parse

# Several record datasets as one endless, shuffled, weighted stream of windows.


LEAST_SAMPLES = 200  # before the share of damaged ones stops a training
_TRIES = 1000  # samples in a row that may be damaged

Window = dict[str, np.ndarray]


def record_mixture(
    datasets: Sequence[RecordDataset],
    weights: Sequence[float],
    *,
    seed: int,
    split: str,
    normalizers: Normalizers | None = None,
    mask_padding: bool = False,
    episodes_per_task: PerTask = None,
    max_bad_share: float = 0.05,
) -> grain.MapDataset:
    """Mixes datasets; element n is a pure function of the arguments and n.

    Every dataset is shuffled and repeated on its own (each epoch in another order), then the
    datasets are interleaved in proportion to their weights. In place of a damaged record comes the
    one after it in this order; that is counted, and each is named once on stderr.

    Args:
        datasets: the datasets; latents and texts must have the same shapes.
        weights: relative frequency of each dataset, not scaled by its size; positive.
        seed: of the order, and of the choice of episodes.
        split: "train" or "validation".
        normalizers: also yield actions and proprio, normalised; None for video alone.
        mask_padding: also mask the time steps past an episode's end (the release learns from them).
        episodes_per_task: how many episodes of each distinct instruction; see `selection.kept`.
        max_bad_share: share of damaged records above which the stream ends with an error.

    Returns:
        An endless Grain dataset of dicts: latents bfloat16 [t', h', w', 16], text float32 [l, d],
        and with normalizers, float32: actions [H, A], proprio [P, D], and action_mask [H, A], 1
        where an action is to be learned. Of a dataset without actions all three are zeros.

    Raises:
        ValueError: if the datasets do not go together, or one has nothing in this split.
    """
    _check(datasets, weights, normalizers is not None)
    samples, remedy = f"samples of the {split} split", "Make those files again"
    bad = BadShare(max_bad_share, samples, LEAST_SAMPLES, remedy)
    acting = [dataset for dataset in datasets if "actions" in dataset.shapes]

    def stream(dataset: RecordDataset) -> grain.MapDataset:
        indices = dataset.record_indices(split, episodes_per_task, seed)
        if len(indices) == 0:
            raise ValueError(
                f"Dataset {dataset.name!r} has no records in its {split!r} split; use a larger "
                "validation share or more episodes."
            )
        # The order depends on the dataset's name, so datasets of one size do not march in step.
        name_seed = int.from_bytes(
            hashlib.md5(f"{seed}/{dataset.name}".encode()).digest()[:4], "big"
        )
        order = grain.MapDataset.source(indices).seed(name_seed).shuffle().repeat()
        vectors = _vectors(dataset, normalizers, acting, mask_padding)

        def load(record: Window) -> Window:
            text = dataset.text(int(record["text"]))
            return {"latents": record["latents"], "text": text} | vectors(record)

        read = _Replacing(dataset, order, bad)
        return grain.MapDataset.range(len(order)).map(lambda place: load(read(int(place))))

    streams = [stream(dataset) for dataset in datasets]
    return grain.MapDataset.mix(streams, list(weights)) if len(streams) > 1 else streams[0]


class _Replacing:
    """Reads the record at a place of the order, or the next one that is not damaged."""

    def __init__(self, dataset: RecordDataset, order: grain.MapDataset, bad: BadShare):
        self._dataset, self._order, self._bad = dataset, order, bad
        self._named: set[int] = set()
        self._lock = threading.Lock()

    def __call__(self, place: int) -> Window:
        damage = None
        for step in range(_TRIES):
            index = int(self._order[(place + step) % len(self._order)])
            try:
                record = self._dataset[index]
            except DamagedRecord as error:
                if damage is None:  # what comes in its place is read for the same sample
                    self._bad.is_bad(f"record {index} of {self._dataset.name!r}", str(error))
                damage = error
                self._name(index, error)
                continue
            if damage is None:
                self._bad.good()
            return record
        raise ValueError(f"{_TRIES} records in a row could not be read; the last: {damage}")

    def _name(self, index: int, error: DamagedRecord) -> None:
        with self._lock:  # several threads may meet it at once
            if index in self._named:
                return
            self._named.add(index)
        tqdm.write(f"replaced: {error}.", file=sys.stderr)


def _vectors(
    dataset: RecordDataset,
    normalizers: Normalizers | None,
    acting: Sequence[RecordDataset],
    mask_padding: bool,
) -> Callable[[Window], Window]:
    """Gives the normalised vectors of a record, and which of their numbers are to be learned."""
    if normalizers is None:
        return lambda record: {}
    if dataset not in acting:
        shapes = {key: acting[0].shapes[key] for key in VECTORS}
        shapes["action_mask"] = shapes["actions"]
        nothing = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
        return lambda record: nothing
    normalizer = normalizers.of(dataset.embodiment)
    horizon, dim = dataset.shapes["actions"]
    learned = mask(parse(dataset.settings["dataset"]["action"], "action"), dim)
    learned = np.broadcast_to(learned, (horizon, dim)).astype(np.float32)
    if mask_padding:
        check_padding_is_told([dataset])

    def vectors(record: Window) -> Window:
        inside = learned
        if mask_padding:
            inside = learned * ~record["actions_padded"][:, None]
        values = {key: normalizer.normalize(key, record[key]) for key in VECTORS}
        return values | {"action_mask": inside}

    return vectors


def _check(datasets: Sequence[RecordDataset], weights: Sequence[float], with_actions: bool) -> None:
    if not datasets or len(datasets) != len(weights) or min(weights) <= 0:
        raise ValueError(
            f"{len(datasets)} datasets and the weights {list(weights)} given; every dataset needs "
            "one positive weight."
        )
    acting = [dataset for dataset in datasets if "actions" in dataset.shapes]
    if with_actions and not acting:
        raise ValueError(f"Dataset {datasets[0].name!r} has no actions; train on video only.")
    _check_shapes(datasets, ("latents",))
    if with_actions:
        _check_shapes(acting, tuple(VECTORS))
    first = datasets[0]
    for dataset in datasets:
        if dataset.text(0).shape != first.text(0).shape:
            raise ValueError(
                f"Datasets cannot be mixed: text is {dataset.text(0).shape} in {dataset.name!r} "
                f"and {first.text(0).shape} in {first.name!r}; encode both with one text encoder."
            )


def _check_shapes(datasets: Sequence[RecordDataset], keys: Sequence[str]) -> None:
    first = datasets[0]
    for dataset in datasets:
        for key in keys:
            if key not in dataset.shapes:
                raise ValueError(f"Dataset {dataset.name!r} has no {key}; train on video only.")
            if dataset.shapes[key] != first.shapes[key]:
                raise ValueError(
                    f"Datasets cannot be mixed: {key} is {dataset.shapes[key]} in "
                    f"{dataset.name!r} and {first.shapes[key]} in {first.name!r}."
                )


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
