"""The loader: determinism, exact restart, parts of a batch, mixing."""

import ml_dtypes
import numpy as np
import pytest

from data_pipelines.loader import make_loader
from data_pipelines.mixture import action_statistics, record_mixture
from data_pipelines.records import (
    RecordDataset,
    RecordWriter,
    write_json,
    write_npz,
    write_texts,
)

RECORDS, PER_EPISODE = 120, 10


def _dataset(path, number, acting=True, latent_size=2):
    """Records whose latents hold (dataset, record), so that batches can be traced."""
    rng, rows = np.random.default_rng(number), []
    columns = {"anchor": np.arange(RECORDS)}
    if acting:
        columns["actions"] = rng.normal(size=(RECORDS, 4, 2)).astype(np.float32)
        columns["proprio"] = rng.normal(size=(RECORDS, 1, 3)).astype(np.float32)
    path.mkdir()
    with RecordWriter(path / "shard_0.arrayrecord") as writer:
        for i in range(RECORDS):
            latents = np.zeros((2, latent_size, 2, 4), ml_dtypes.bfloat16)
            latents[0], latents[1] = number, i
            row = {"latents": latents, "episode": np.int64(i // PER_EPISODE), "text": np.int64(0)}
            writer.write(row | {key: value[i] for key, value in columns.items()})
    for e in range(RECORDS // PER_EPISODE):
        split = "validation" if e % 4 == 3 else "train"
        row = dict(id=f"{e}", instructions=[e % 2], first=e * PER_EPISODE, count=PER_EPISODE)
        rows.append(row | {"split": split})
    write_npz(path / "shard_0.npz", **columns)
    write_texts(path / "texts.npz", ["a", "b"], np.arange(1, 25.0).reshape(2, 3, 4))
    manifest = dict(settings={"dataset": {"name": path.name}}, fingerprint=path.name)
    manifest |= dict(shards=["shard_0.arrayrecord"], skipped=[], episodes=rows)
    write_json(path / "manifest.json", manifest)
    return RecordDataset(path)


@pytest.fixture
def datasets(tmp_path):
    return [_dataset(tmp_path / "one", 1), _dataset(tmp_path / "two", 2)]


def _loader(datasets, **options):
    options = dict(weights=[1.0] * len(datasets), batch_size=8, seed=3, split="train") | options
    return make_loader(datasets, **options)


def _take(loader, n):
    return [next(loader) for _ in range(n)]


def _ids(batches):
    """[(dataset, record)] of every element, read back from the latents."""
    return [(int(x[0, 0, 0, 0]), int(x[1, 0, 0, 0])) for b in batches for x in b["latents"]]


def _assert_equal(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_batches_are_the_records_in_float32(datasets):
    one = datasets[:1]
    normalizer = action_statistics(one)
    batch = next(_loader(one, with_actions=True, normalizer=normalizer))
    assert {key: (value.dtype, value.shape) for key, value in batch.items()} == {
        "latents": (np.float32, (8, 2, 2, 2, 4)),
        "text": (np.float32, (8, 3, 4)),
        "actions": (np.float32, (8, 4, 2)),
        "proprio": (np.float32, (8, 1, 3)),
    }
    for row, (_, index) in enumerate(_ids([batch])):
        record = one[0][index]
        for key in ("actions", "proprio"):
            expected = normalizer.normalize(key, record[key])
            np.testing.assert_array_equal(batch[key][row], expected)
        np.testing.assert_array_equal(batch["text"][row], one[0].text(int(record["text"])))
    assert next(_loader(one)).keys() == {"latents", "text"}


def test_an_epoch_visits_every_training_record_once_and_epochs_differ(datasets):
    batches = _take(_loader(datasets[:1], batch_size=9), 20)  # 90 training records, two epochs
    ids = [index for _, index in _ids(batches)]
    train = datasets[0].record_indices("train").tolist()
    assert sorted(ids[:90]) == sorted(ids[90:]) == train
    assert ids[:90] != train and ids[:90] != ids[90:]


def test_the_seed_decides_the_order(datasets):
    first, same, other = (_take(_loader(datasets, seed=seed), 4) for seed in (3, 3, 4))
    _assert_equal(first, same)
    assert _ids(first) != _ids(other)


def test_restoring_the_state_repeats_the_following_batches(datasets):
    loader = _loader(datasets)
    _take(loader, 7)
    state = loader.get_state()  # reader threads are several batches ahead of this position
    following = _take(loader, 30)
    loader.set_state(state)
    _assert_equal(_take(loader, 30), following)
    fresh = _loader(datasets, num_threads=1, prefetch_batches=1)
    fresh.set_state(state)
    _assert_equal(_take(fresh, 30), following)


@pytest.mark.parametrize("parts", [[range(4), range(4, 8)], [[0, 1, 4, 5], [2, 3, 6, 7]]])
def test_processes_together_see_the_single_process_batches(datasets, parts):
    whole = _take(_loader(datasets), 12)
    for rows in parts:
        part = [{key: value[list(rows)] for key, value in batch.items()} for batch in whole]
        _assert_equal(_take(_loader(datasets, rows=rows), 12), part)


def test_a_state_survives_a_change_of_process_count(datasets):
    whole = _loader(datasets)
    _take(whole, 5)
    second = _loader(datasets, rows=range(4, 8))
    second.set_state(whole.get_state())
    half = {key: value[4:] for key, value in next(whole).items()}
    _assert_equal([next(second)], [half])
    assert second.get_state() == whole.get_state()


def test_weights_are_frequencies_not_sizes(datasets):
    ids = _ids(_take(_loader(datasets, weights=[3.0, 1.0]), 40))
    assert sum(number == 1 for number, _ in ids) == 240
    # Equal sizes, yet the datasets are not shuffled alike.
    ids = _ids(_take(_loader(datasets), 10))
    assert [i for n, i in ids if n == 1] != [i for n, i in ids if n == 2]


def test_splits_do_not_meet_and_tasks_can_be_thinned(datasets):
    seen = {s: set(_ids(_take(_loader(datasets, split=s), 40))) for s in ("train", "validation")}
    assert not seen["train"] & seen["validation"]
    few = {i for _, i in _ids(_take(_loader(datasets[:1], episodes_per_task=1), 20))}
    assert len(few) == 2 * PER_EPISODE
    assert len({i // PER_EPISODE % 2 for i in few}) == 2


def test_video_only_data_mixes_without_actions(tmp_path, datasets):
    human = _dataset(tmp_path / "human", 3, acting=False)
    assert {number for number, _ in _ids(_take(_loader([*datasets, human]), 6))} == {1, 2, 3}
    normalizer = action_statistics(datasets)
    with pytest.raises(ValueError, match="'human' has no actions"):
        _loader([*datasets, human], with_actions=True, normalizer=normalizer)


def test_mistakes_are_explained(tmp_path, datasets):
    with pytest.raises(ValueError, match="without a normalizer"):
        _loader(datasets, with_actions=True)
    with pytest.raises(ValueError, match="one positive weight"):
        _loader(datasets, weights=[1.0])
    with pytest.raises(ValueError, match="'test' split"):
        _loader(datasets, split="test")
    odd = _dataset(tmp_path / "odd", 4, latent_size=3)
    with pytest.raises(ValueError, match=r"latents is \(2, 3, 2, 4\) in 'odd'"):
        _loader([*datasets, odd])


def test_elements_are_a_function_of_their_index(datasets):
    options = dict(seed=1, split="train", with_actions=False)
    mixture = record_mixture(datasets, [1.0, 2.0], **options)
    again = record_mixture(datasets, [1.0, 2.0], **options)
    for index in (1_000_000_007, 5, 77):
        np.testing.assert_array_equal(mixture[index]["latents"], again[index]["latents"])
