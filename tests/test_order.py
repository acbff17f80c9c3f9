"""The order of samples: whatever the number of processes and wherever a run is stopped."""

from collections import Counter

import numpy as np
import pytest
from record_folders import ids, make_records, take

from data_pipelines.loader import make_loader

BATCH = 8


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """90 and 150 records of the training split."""
    folder = tmp_path_factory.mktemp("order")
    small = make_records(folder / "small", 1, shards=3)
    return [small, make_records(folder / "large", 2, records=200, shards=4)]


def _loader(datasets, rows=None, **options):
    # As many batches ahead as there are: the position must not follow what threads have read.
    options = dict(weights=[1.0, 2.0], seed=7, split="train", num_threads=2) | options
    return make_loader(datasets, batch_size=BATCH, rows=rows, **options)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_together_make_the_same_batches(datasets, processes):
    whole = take(_loader(datasets), 10)
    parts = [
        take(_loader(datasets, rows), 10) for rows in np.array_split(np.arange(BATCH), processes)
    ]
    for number, batch in enumerate(whole):
        for key, values in batch.items():
            together = np.concatenate([part[number][key] for part in parts])
            np.testing.assert_array_equal(together, values)


def test_stopped_anywhere_and_with_any_number_of_processes_nothing_is_lost_or_repeated(datasets):
    """60 stops at random places; each time another number of processes goes on."""
    rng = np.random.default_rng(0)
    straight = ids(take(_loader(datasets), 120))
    seen, state = [], None
    while len(seen) < len(straight):
        processes = int(rng.choice([1, 2, 4]))
        loaders = [_loader(datasets, rows) for rows in np.array_split(range(BATCH), processes)]
        for loader in loaders:
            if state is not None:
                loader.set_state(state)
        for _ in range(min(int(rng.integers(1, 4)), 120 - len(seen) // BATCH)):
            for loader in loaders:
                seen += ids([next(loader)])
        states = [loader.get_state() for loader in loaders]
        assert all(other == states[0] for other in states)
        state = states[0]  # what a checkpoint stores, whoever reads it
    assert seen == straight
    # In every epoch of every dataset, each record once.
    for number, dataset in enumerate(datasets, start=1):
        train = dataset.record_indices("train").tolist()
        own = [index for which, index in straight if which == number]
        for start in range(0, len(own) - len(train) + 1, len(train)):
            assert sorted(own[start : start + len(train)]) == train
        assert len(own) >= 3 * len(train)


@pytest.mark.parametrize("seed", range(5))
def test_an_epoch_is_whole_for_any_seed_and_weights(datasets, seed):
    weights = np.random.default_rng(seed).uniform(0.2, 3.0, 2).tolist()
    seen = ids(take(_loader(datasets, seed=seed, weights=weights), 60))
    for number, dataset in enumerate(datasets, start=1):
        train = dataset.record_indices("train").tolist()
        own = [index for which, index in seen if which == number][: len(train)]
        # As much of the first epoch as was reached: nothing twice, nothing foreign.
        assert max(Counter(own).values()) == 1 and set(own) <= set(train)
    share = sum(which == 1 for which, _ in seen) / len(seen)
    assert share == pytest.approx(weights[0] / sum(weights), abs=0.01)
