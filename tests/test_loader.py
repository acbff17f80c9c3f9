"""The loader: determinism, exact restart, parts of a batch, mixing, the order of samples."""

import json
from collections import Counter

import numpy as np
import pytest
from record_folders import PER_EPISODE, ids, make_records, take

from data_pipelines.loader import make_loader, record_mixture
from data_pipelines.normalize import make_normalizers


@pytest.fixture
def datasets(tmp_path):
    return [make_records(tmp_path / "one", 1), make_records(tmp_path / "two", 2)]


def _loader(datasets, **options):
    options = dict(weights=[1.0] * len(datasets), batch_size=8, seed=3, split="train") | options
    return make_loader(datasets, **options)


def _assert_equal(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_batches_are_the_records_in_float32(datasets):
    one = datasets[:1]
    normalizers = make_normalizers(one)
    batch = next(_loader(one, normalizers=normalizers))
    assert {key: (value.dtype, value.shape) for key, value in batch.items()} == {
        "latents": (np.float32, (8, 2, 2, 2, 4)),
        "text": (np.float32, (8, 3, 4)),
        "actions": (np.float32, (8, 4, 2)),
        "proprio": (np.float32, (8, 1, 3)),
        "action_mask": (np.float32, (8, 4, 2)),
    }
    assert batch["action_mask"].all()
    for row, (_, index) in enumerate(ids([batch])):
        record = one[0][index]
        for key in ("actions", "proprio"):
            expected = normalizers.of("arm").normalize(key, record[key])
            np.testing.assert_array_equal(batch[key][row], expected)
        np.testing.assert_array_equal(batch["text"][row], one[0].text(int(record["text"])))
    assert next(_loader(one)).keys() == {"latents", "text"}


def test_an_epoch_visits_every_training_record_once_and_epochs_differ(datasets):
    batches = take(_loader(datasets[:1], batch_size=9), 20)  # 90 training records, two epochs
    seen = [index for _, index in ids(batches)]
    train = datasets[0].record_indices("train").tolist()
    assert sorted(seen[:90]) == sorted(seen[90:]) == train
    assert seen[:90] != train and seen[:90] != seen[90:]


def test_the_seed_decides_the_order(datasets):
    first, same, other = (take(_loader(datasets, seed=seed), 4) for seed in (3, 3, 4))
    _assert_equal(first, same)
    assert ids(first) != ids(other)


def test_restoring_the_state_repeats_the_following_batches(datasets):
    loader = _loader(datasets)
    take(loader, 7)
    state = loader.get_state()  # reader threads are several batches ahead of this position
    following = take(loader, 30)
    loader.set_state(state)
    _assert_equal(take(loader, 30), following)
    fresh = _loader(datasets, num_threads=1, prefetch_batches=1)
    fresh.set_state(state)
    _assert_equal(take(fresh, 30), following)


@pytest.mark.parametrize("parts", [[range(4), range(4, 8)], [[0, 1, 4, 5], [2, 3, 6, 7]]])
def test_processes_together_see_the_single_process_batches(datasets, parts):
    whole = take(_loader(datasets), 12)
    for rows in parts:
        part = [{key: value[list(rows)] for key, value in batch.items()} for batch in whole]
        _assert_equal(take(_loader(datasets, rows=rows), 12), part)


def test_a_state_survives_a_change_of_process_count(datasets):
    whole = _loader(datasets)
    take(whole, 5)
    second = _loader(datasets, rows=range(4, 8))
    second.set_state(whole.get_state())
    half = {key: value[4:] for key, value in next(whole).items()}
    _assert_equal([next(second)], [half])
    assert second.get_state() == whole.get_state()


def test_a_state_survives_a_change_of_batch_size(datasets):
    """Also of one that is no multiple: what comes next is what would have come."""
    straight = ids(take(_loader(datasets, weights=[3.0, 1.0]), 60))
    seen, state = [], None
    for size, batches in ((8, 5), (16, 3), (4, 7), (6, 4), (16, 4)):
        loader = _loader(datasets, weights=[3.0, 1.0], batch_size=size)
        if state is not None:
            loader.set_state(json.loads(json.dumps(state, sort_keys=True)))
        seen += ids(take(loader, batches))
        state = loader.get_state()
    assert seen == straight[: len(seen)] and len(seen) == 204


def test_other_weights_go_on_with_what_is_left_of_each_dataset(datasets):
    seen, state = [], None
    for weights, batches in (([3.0, 1.0], 9), ([1.0, 5.0], 4), ([1.0, 5.0], 3), ([1.0, 1.0], 20)):
        loader = _loader(datasets, weights=weights)
        if state is not None:
            loader.set_state(state)
        seen += ids(take(loader, batches))
        state = loader.get_state()
    assert sum(number == 1 for number, _ in seen[:72]) == 54
    assert sum(number == 1 for number, _ in seen[72 : 72 + 56]) == pytest.approx(56 / 6, abs=1)
    for number, dataset in enumerate(datasets, start=1):
        own = [index for which, index in seen if which == number]
        alone = ids(take(_loader([dataset], batch_size=1), len(own)))
        assert own == [index for _, index in alone]


def test_two_datasets_of_one_name_have_places_of_their_own(datasets):
    """As in a configuration whose second section was copied from the first."""
    datasets[1].name = datasets[0].name
    before, after = (_loader(datasets, weights=w, batch_size=1) for w in ([3.0, 1.0], [1.0, 3.0]))
    take(before, 20)
    after.set_state(json.loads(json.dumps(before.get_state())))
    assert sorted(after.get_state()["first"].values()) == [5, 15]


def test_a_state_of_another_order_is_refused(datasets):
    state = _loader(datasets).get_state()
    for change, setting in (
        (dict(seed=4), "training.seed is 3 there, 4 here"),
        (dict(episodes_per_task=2), "training.episodes_per_task is None there, 2 here"),
    ):
        with pytest.raises(ValueError, match="in another order") as error:
            _loader(datasets, **change).set_state(state)
        assert setting in str(error.value)
    with pytest.raises(ValueError, match="the list of datasets is"):
        _loader(datasets[:1]).set_state(state)


def test_a_state_of_an_earlier_version_is_read(datasets):
    """It counted batches."""
    loader, fresh = _loader(datasets), _loader(datasets)
    take(loader, 7)
    fresh.set_state({"next_index": 7})
    assert fresh.get_state() == loader.get_state()
    _assert_equal([next(fresh)], [next(loader)])


def test_weights_are_frequencies_not_sizes(datasets):
    seen = ids(take(_loader(datasets, weights=[3.0, 1.0]), 40))
    assert sum(number == 1 for number, _ in seen) == 240
    # Equal sizes, yet the datasets are not shuffled alike.
    seen = ids(take(_loader(datasets), 10))
    assert [i for n, i in seen if n == 1] != [i for n, i in seen if n == 2]


def test_splits_do_not_meet_and_tasks_can_be_thinned(datasets):
    seen = {s: set(ids(take(_loader(datasets, split=s), 40))) for s in ("train", "validation")}
    assert not seen["train"] & seen["validation"]
    few = {i for _, i in ids(take(_loader(datasets[:1], episodes_per_task=1), 20))}
    assert len(few) == 2 * PER_EPISODE
    assert len({i // PER_EPISODE % 2 for i in few}) == 2


def test_video_only_data_mixes_without_actions(tmp_path, datasets):
    human = make_records(tmp_path / "human", 3, acting=False)
    assert {number for number, _ in ids(take(_loader([*datasets, human]), 6))} == {1, 2, 3}
    normalizers = make_normalizers(datasets)
    with pytest.raises(ValueError, match="'human' has no actions"):
        _loader([human], normalizers=normalizers)
    # Beside data with actions its own are zeros that no loss sees.
    for batch in take(_loader([*datasets, human], normalizers=normalizers), 6):
        for row, (number, _) in enumerate(ids([batch])):
            assert batch["action_mask"][row].all() == (number != 3)
            assert batch["actions"][row].any() == (number != 3)
            assert batch["proprio"].shape == (8, 1, 3)


def test_mistakes_are_explained(tmp_path, datasets):
    with pytest.raises(ValueError, match="one positive weight"):
        _loader(datasets, weights=[1.0])
    with pytest.raises(ValueError, match="'test' split"):
        _loader(datasets, split="test")
    odd = make_records(tmp_path / "odd", 4, latent_size=3)
    with pytest.raises(ValueError, match=r"latents is \(2, 3, 2, 4\) in 'odd'"):
        _loader([*datasets, odd])


def test_elements_are_a_function_of_their_index(datasets):
    options = dict(seed=1, split="train")
    mixture = record_mixture(datasets, [1.0, 2.0], **options)
    again = record_mixture(datasets, [1.0, 2.0], **options)
    for index in (1_000_000_007, 5, 77):
        np.testing.assert_array_equal(mixture[index]["latents"], again[index]["latents"])


# The order of samples: whatever the number of processes and wherever a run is stopped. As many
# batches are read ahead as by default: the position must not follow what threads have read.

UNEVEN = dict(weights=[1.0, 2.0], seed=7, num_threads=2)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """90 and 150 records of the training split."""
    folder = tmp_path_factory.mktemp("order")
    small = make_records(folder / "small", 1, shards=3)
    return [small, make_records(folder / "large", 2, records=200, shards=4)]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_together_make_the_same_batches(uneven, processes):
    whole = take(_loader(uneven, **UNEVEN), 10)
    parts = [
        take(_loader(uneven, **UNEVEN, rows=rows), 10)
        for rows in np.array_split(np.arange(8), processes)
    ]
    for number, batch in enumerate(whole):
        for key, values in batch.items():
            together = np.concatenate([part[number][key] for part in parts])
            np.testing.assert_array_equal(together, values)


def test_stopped_anywhere_and_with_any_number_of_processes_nothing_is_lost_or_repeated(uneven):
    """60 stops at random places; each time another number of processes goes on."""
    rng = np.random.default_rng(0)
    straight = ids(take(_loader(uneven, **UNEVEN), 120))
    seen, state = [], None
    while len(seen) < len(straight):
        processes = int(rng.choice([1, 2, 4]))
        loaders = [
            _loader(uneven, **UNEVEN, rows=rows) for rows in np.array_split(range(8), processes)
        ]
        for loader in loaders:
            if state is not None:
                loader.set_state(state)
        for _ in range(min(int(rng.integers(1, 4)), 120 - len(seen) // 8)):
            for loader in loaders:
                seen += ids([next(loader)])
        states = [loader.get_state() for loader in loaders]
        assert all(other == states[0] for other in states)
        state = states[0]  # what a checkpoint stores, whoever reads it
    assert seen == straight
    # In every epoch of every dataset, each record once.
    for number, dataset in enumerate(uneven, start=1):
        train = dataset.record_indices("train").tolist()
        own = [index for which, index in straight if which == number]
        for start in range(0, len(own) - len(train) + 1, len(train)):
            assert sorted(own[start : start + len(train)]) == train
        assert len(own) >= 3 * len(train)


@pytest.mark.parametrize("seed", range(5))
def test_an_epoch_is_whole_for_any_seed_and_weights(uneven, seed):
    weights = np.random.default_rng(seed).uniform(0.2, 3.0, 2).tolist()
    seen = ids(take(_loader(uneven, **UNEVEN | dict(seed=seed, weights=weights)), 60))
    for number, dataset in enumerate(uneven, start=1):
        train = dataset.record_indices("train").tolist()
        own = [index for which, index in seen if which == number][: len(train)]
        # As much of the first epoch as was reached: nothing twice, nothing foreign.
        assert max(Counter(own).values()) == 1 and set(own) <= set(train)
    share = sum(which == 1 for which, _ in seen) / len(seen)
    assert share == pytest.approx(weights[0] / sum(weights), abs=0.01)
