"""The training loader: batch n is a pure function of the seed and n.

`record_mixture` is the endless, shuffled, weighted stream of windows of several record datasets;
`make_loader` reads one process's batches from it.
"""

import hashlib
import itertools
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from data_pipelines.episode import BadShare, PerTask
from data_pipelines.normalize import VECTORS, Normalizers, require_padding_marks
from data_pipelines.records import DamagedRecord, RecordDataset, is_latents
from data_pipelines.vectors import mask, parse

LEAST_SAMPLES = 200  # read before the share of damaged ones can stop a run
_TRIES = 1000  # the most damaged samples in a row

Window = dict[str, np.ndarray]

log = logging.getLogger(__name__)


class Batches(Iterator[Window]):
    """Endless batches of a mixture, for one process; see `make_loader`.

    Its position (`get_state`, `set_state`) counts samples, whatever was prefetched. Batch size,
    processes, devices and threads can change with a resume, and each sample is still seen once in
    every epoch of its dataset. With other weights each dataset goes on where it was.
    """

    def __init__(
        self,
        mixture: Callable[[Mapping[str, int]], grain.MapDataset],
        order: Mapping[str, Any],
        batch_size: int,
        rows: Sequence[int],
        options: grain.ReadOptions,
    ):
        """Begins with the first sample.

        Args:
            mixture: from the place at which each dataset begins to the samples from there on.
            order: what decides the order of the samples: `seed`, `episodes_per_task`, and
                `weights` by the names of the datasets.
            batch_size, rows: as of `make_loader`.
            options: threads and prefetched batches.
        """
        self._mixture, self._order, self._options = mixture, dict(order), options
        self._batch_size, self._rows = batch_size, rows
        self._names = list(order["weights"])
        self._first: dict[str, int] = {}
        self._begin(dict.fromkeys(self._names, 0), 0)

    def _begin(self, first: dict[str, int], samples: int) -> None:
        if first != self._first:
            self._first, self._source = first, self._mixture(first)
        self._samples, self._iterator = samples, None

    def __next__(self) -> Window:
        if self._iterator is None:  # not before, since the position may be moved first
            self._iterator = self._read_from(self._samples)
        batch = next(self._iterator)
        self._samples += self._batch_size
        return batch

    def _read_from(self, start: int) -> Iterator[Window]:
        mixture = self._source

        def read(number: int) -> Window:
            batch: Window = {}
            for place, row in enumerate(self._rows):
                for key, value in mixture[start + number * self._batch_size + row].items():
                    if place == 0:  # not `np.stack`: a second copy would cost as much again
                        batch[key] = np.empty((len(self._rows), *np.shape(value)), np.float32)
                    batch[key][place] = value
            return batch

        batches = grain.MapDataset.range((len(mixture) - start) // self._batch_size).map(read)
        # Threads suffice: reading releases the interpreter lock, and decoding copies nothing.
        return iter(batches.to_iter_dataset(self._options))

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch, the same in all processes."""
        return {"samples": self._samples, "first": self._first, **self._order}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Moves to a position.

        Raises:
            ValueError: it belongs to another order of the data.
        """
        if "next_index" in state:  # of an earlier version, in batches
            start = self._batch_size * state["next_index"]
            self._begin(dict.fromkeys(self._names, 0), start)
            return
        before = {**state, "weights": sorted(state["weights"])}
        now = {**self._order, "weights": sorted(self._names)}
        changed = [
            f"{setting} is {before[name]!r} there, {now[name]!r} here"
            for name, setting in _ORDER.items()
            if before[name] != now[name]
        ]
        if changed:
            raise ValueError(
                f"this run would read its data in another order than its checkpoint did: "
                f"{'; '.join(changed)}. Restore that, or start another run with config.init_from."
            )
        first, samples = {name: state["first"][name] for name in self._names}, state["samples"]
        if state["weights"] != self._order["weights"]:
            # From here on another mixture, of what is left of each dataset.
            weights = [state["weights"][name] for name in self._names]
            taken = samples_of_each(weights, samples)
            first = {name: first[name] + n for name, n in zip(self._names, taken)}
            samples = 0
        self._begin(first, samples)


# What decides the order of the samples -> the setting.
_ORDER = {
    "seed": "training.seed",
    "episodes_per_task": "training.episodes_per_task",
    "weights": "the list of datasets",
}


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
) -> Batches:
    """Endless batches for one process.

    Global batch n is elements n * batch_size, ... of the mixture, whatever the number of processes.

    Args:
        datasets, weights, seed, split, normalizers, episodes_per_task, mask_padding: see
            `record_mixture`.
        batch_size: global batch size.
        max_bad_share: see `record_mixture`; each process counts what it reads.
        rows: the rows of each global batch to read; None for all.
        num_threads: reader threads.
        prefetch_batches: batches to prefetch.

    Returns:
        An iterator over the dicts of `record_mixture`, batched, all float32.
    """
    further = dict(mask_padding=mask_padding, max_bad_share=max_bad_share)
    # A name may be given twice; each has a place of its own all the same.
    before = [[d.name for d in datasets[:i]].count(one.name) for i, one in enumerate(datasets)]
    names = [f"{d.name} {n + 1}" if n else d.name for d, n in zip(datasets, before)]

    def mixture(first: Mapping[str, int]) -> grain.MapDataset:
        chosen = normalizers, episodes_per_task, [first.get(name, 0) for name in names]
        return record_mixture(datasets, weights, seed, split, *chosen, **further)

    order = dict(seed=seed, episodes_per_task=episodes_per_task)
    order["weights"] = {name: float(weight) for name, weight in zip(names, weights)}
    chosen = range(batch_size) if rows is None else [int(row) for row in rows]
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch_batches)
    return Batches(mixture, order, batch_size, chosen, options)


def record_mixture(
    datasets: Sequence[RecordDataset],
    weights: Sequence[float],
    seed: int,
    split: str,
    normalizers: Normalizers | None = None,
    episodes_per_task: PerTask = None,
    first: Sequence[int] | None = None,
    *,
    mask_padding: bool = False,
    max_bad_share: float = 0.05,
) -> grain.MapDataset:
    """Mixes datasets; element n is a pure function of the arguments and n.

    Each dataset is shuffled and repeated by itself (every epoch in another order), then the
    datasets are interleaved in proportion to their weights. Of a window with n variants an epoch
    shows one, and n epochs in a row show each once; the validation split shows variant 0. A
    damaged record is replaced by the next one in this order; each is counted, and logged once.

    Args:
        datasets: datasets whose latents and texts have the same shapes.
        weights: positive relative frequencies of the datasets, not scaled by their sizes.
        seed: seed of the order and of the choice of episodes.
        split: "train" or "validation".
        normalizers: also yield actions and proprio, normalised; None for video alone.
        episodes_per_task: number of episodes per distinct instruction; see `episode.kept`.
        first: the place at which each dataset begins; None for the beginning.
        mask_padding: also mask the time steps past an episode's end (the release learns them).
        max_bad_share: the share of damaged records above which the stream raises an error.

    Returns:
        An endless Grain dataset of dicts: latents bfloat16 [t', h', w', 16], those of every
        observed view (views/<name>), text float32 [l, d],
        and with normalizers, float32: actions [H, A], proprio [P, D], and action_mask [H, A], 1
        where an action is to be learned. For a dataset without actions all three are zeros.

    Raises:
        ValueError: the datasets cannot be mixed, or one has no records in this split.
    """
    acting = [dataset for dataset in datasets if "actions" in dataset.shapes]
    _check(datasets, weights, None if normalizers is None else acting)
    samples, remedy = f"samples of the {split} split", "Encode those files again"
    bad = BadShare(max_bad_share, samples, LEAST_SAMPLES, remedy)

    def stream(dataset: RecordDataset, start: int) -> grain.MapDataset:
        indices = dataset.record_indices(split, episodes_per_task, seed)
        if len(indices) == 0:
            raise ValueError(
                f"Dataset {dataset.name!r} has no records in its {split!r} split; use a larger "
                "validation share or more episodes."
            )
        # The seed depends on the name, so datasets of equal size are not shuffled alike.
        digest = hashlib.md5(f"{seed}/{dataset.name}".encode()).digest()
        name_seed = int.from_bytes(digest[:4], "big")
        order = grain.MapDataset.source(indices).seed(name_seed).shuffle().repeat()
        variant = _variant(dataset, len(indices), seed, split)
        read, vectors = _reader(dataset, order, variant, bad), lambda record: {}
        if normalizers is not None:
            vectors = _vectors(dataset, normalizers, acting, mask_padding)

        def window(place: int) -> Window:
            record = read(int(place))
            text = dataset.text(int(record["text"]))
            latents = {name: value for name, value in record.items() if is_latents(name)}
            return latents | {"text": text} | vectors(record)

        return grain.MapDataset.range(start, len(order)).map(window)

    streams = [
        stream(dataset, start) for dataset, start in zip(datasets, first or [0] * len(datasets))
    ]
    return _mix(streams, weights)


def _mix(streams: Sequence[grain.MapDataset], weights: Sequence[float]) -> grain.MapDataset:
    return grain.MapDataset.mix(streams, list(weights)) if len(streams) > 1 else streams[0]


def samples_of_each(weights: Sequence[float], samples: int) -> list[int]:
    """How many of the first samples of a mixture came from each dataset."""
    places = [
        grain.MapDataset.range(sys.maxsize).map(lambda place, i=i: (i, place))
        for i in range(len(weights))
    ]
    mixture, taken = _mix(places, weights), {}
    for number in reversed(range(samples)):  # the last sample of each tells its number
        i, place = mixture[number]
        taken.setdefault(i, place + 1)
        if len(taken) == len(weights):
            break
    return [taken.get(i, 0) for i in range(len(weights))]


def _variant(
    dataset: RecordDataset, windows: int, seed: int, split: str
) -> Callable[[int, int], int]:
    """From a place of the order and the window there to its variant.

    Args:
        dataset, seed, split: as of `record_mixture`.
        windows: in an epoch.
    """
    if dataset.variants == 1 or split == "validation":
        return lambda place, index: 0

    def variant(place: int, index: int) -> int:
        # Each window begins with another one, so every epoch shows all kinds.
        digest = hashlib.md5(f"{seed}/{dataset.name}/{index}".encode()).digest()
        return (int.from_bytes(digest[:4], "big") + place // windows) % dataset.variants

    return variant


def _reader(
    dataset: RecordDataset,
    order: grain.MapDataset,
    variant: Callable[[int, int], int],
    bad: BadShare,
) -> Callable[[int], Window]:
    """Reads the record at a place of the order, or the next undamaged one."""
    named: set[tuple[int, int]] = set()
    lock = threading.Lock()

    def read(place: int) -> Window:
        damage = None
        for step in range(_TRIES):
            at = (place + step) % len(order)
            index = int(order[at])
            shown = variant(at, index)
            try:
                record = dataset.read(index, shown)
            except DamagedRecord as error:
                if damage is None:  # a sample counts once, however many records it takes
                    bad.count_bad(f"record {index} of {dataset.name!r}", str(error))
                damage = error
                with lock:  # several threads may read it at once
                    is_new = (index, shown) not in named
                    named.add((index, shown))
                if is_new:
                    log.warning("replaced a sample that cannot be read: %s.", error)
                continue
            if damage is None:
                bad.count_good()
            return record
        raise ValueError(f"{_TRIES} records in a row could not be read, the last: {damage}")

    return read


def _vectors(
    dataset: RecordDataset,
    normalizers: Normalizers,
    acting: Sequence[RecordDataset],
    mask_padding: bool,
) -> Callable[[Window], Window]:
    """Returns a function from a record to its normalised vectors and action mask."""
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
        require_padding_marks([dataset])

    def vectors(record: Window) -> Window:
        inside = learned * ~record["actions_padded"][:, None] if mask_padding else learned
        values = {key: normalizer.normalize(key, record[key]) for key in VECTORS}
        return values | {"action_mask": inside}

    return vectors


def _check(
    datasets: Sequence[RecordDataset],
    weights: Sequence[float],
    acting: Sequence[RecordDataset] | None,
) -> None:
    """Raises ValueError unless the datasets mix; `acting` are those with actions, if needed."""
    if not datasets or len(datasets) != len(weights) or min(weights) <= 0:
        raise ValueError(
            f"got {len(datasets)} datasets and the weights {list(weights)}; every dataset needs "
            "one positive weight."
        )
    if acting is not None and not acting:
        raise ValueError(f"Dataset {datasets[0].name!r} has no actions; train on video only.")

    latents = dict.fromkeys(key for one in datasets for key in one.shapes if is_latents(key))
    for alike, keys in ((datasets, (*latents, "text")), (acting or (), VECTORS)):
        for dataset, key in itertools.product(alike, keys):
            if key not in dataset.shapes and is_latents(key):
                raise ValueError(
                    f"Datasets cannot be mixed: {dataset.name!r} has no {key}; encode them with "
                    "the same settings."
                )
            if key not in dataset.shapes:
                raise ValueError(f"Dataset {dataset.name!r} has no {key}; train on video only.")
            shape, first = (
                one.text(0).shape if key == "text" else one.shapes[key]
                for one in (dataset, alike[0])
            )
            if shape != first:
                raise ValueError(
                    f"Datasets cannot be mixed: {key} is {shape} in {dataset.name!r} and {first} "
                    f"in {alike[0].name!r}; encode them with the same settings."
                )
