"""Statistics from the records' numbers: exact, flat in memory, resumable."""

import numpy as np
import pytest
from record_folders import make_records

from data_pipelines import statistics as module
from data_pipelines.normalize import make_normalizers
from data_pipelines.records import RecordDataset
from data_pipelines.statistics import column_statistics, compute_statistics


@pytest.fixture
def sources(tmp_path):
    """The training records of two datasets in seven shards, of which one has none."""
    datasets = [
        make_records(tmp_path / "one", 1, shards=12),
        make_records(tmp_path / "two", 2, records=40, shards=2, scale=5.0),
    ]
    return [(dataset, dataset.record_indices("train")) for dataset in datasets]


def _expected(sources, key):
    rows = [dataset.columns(key)[key][indices] for dataset, indices in sources]
    return compute_statistics(np.concatenate(rows))


def _assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.parametrize("key", ["actions", "proprio"])
def test_a_pass_over_shards_equals_all_rows_at_once(sources, tmp_path, key):
    ours = column_statistics(sources, key, tmp_path / "scratch")
    _assert_equal(ours, _expected(sources, key))
    assert ours["percentiles"].shape == (1001, *sources[0][0].shapes[key])


@pytest.mark.parametrize("stop_after", range(14))
def test_a_stopped_pass_is_continued(sources, tmp_path, stop_after, monkeypatch):
    """Stopped after so many shards or, past the last, while columns are reduced."""
    monkeypatch.setattr(module, "_SAVED_EVERY", 3)
    real_columns, real_row, left = RecordDataset.shard_columns, module.row_statistics, [stop_after]
    read = []

    def count(what):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return what

    def shard_columns(self, *names):
        for part in real_columns(self, *names):
            read.append(count(part))
            yield part

    monkeypatch.setattr(RecordDataset, "shard_columns", shard_columns)
    monkeypatch.setattr(module, "row_statistics", lambda row: count(real_row(row)))
    with pytest.raises(KeyboardInterrupt):
        column_statistics(sources, "actions", tmp_path / "scratch")
    left[0] = -1  # nothing stops it any more
    ours = column_statistics(sources, "actions", tmp_path / "scratch")
    _assert_equal(ours, _expected(sources, "actions"))


def test_normalizers_leave_nothing_behind_and_ignore_what_others_left(sources, tmp_path):
    datasets = [dataset for dataset, _ in sources]
    scratch = tmp_path / "scratch"
    (scratch / "0").mkdir(parents=True)
    (scratch / "0" / "actions.columns").write_bytes(b"of other data")
    (scratch / "0" / "actions.json").write_text("3")
    made = make_normalizers(datasets, scratch=scratch)
    _assert_equal(made.of().statistics["actions"], _expected(sources, "actions"))
    assert not scratch.exists()
    assert make_normalizers(datasets).fingerprint == made.fingerprint


def test_percentiles_are_those_of_numpy():
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 1000, 1234):
        data = rng.normal(size=(n, 3))
        expected = np.percentile(data, np.linspace(0, 100, 1001), axis=0)
        np.testing.assert_allclose(compute_statistics(data)["percentiles"], expected, rtol=1e-12)


@pytest.fixture
def ending(tmp_path):
    """A dataset whose third step is mostly padding, the fourth always, and its training records."""
    padded = np.random.default_rng(0).random((120, 4)) < [0.0, 0.2, 0.9, 1.0]
    dataset = make_records(tmp_path / "ending", 1, shards=5, actions_padded=padded)
    return dataset, dataset.record_indices("train"), padded


def test_masked_padding_does_not_count(ending):
    """With `mask_padding`; without, padded steps count, as in the release."""
    dataset, indices, padded = ending
    actions = dataset.columns("actions")["actions"]
    made = make_normalizers([dataset], mask_padding=True)
    ours, nearest = made.of().statistics["actions"], [0, 1, 2, 2]
    for step in range(4):
        inside = indices[~padded[indices, nearest[step]]]
        theirs = compute_statistics(actions[inside, nearest[step]])
        _assert_equal({name: value[..., step, :] for name, value in ours.items()}, theirs)
    everything = make_normalizers([dataset])
    _assert_equal(everything.of().statistics["actions"], compute_statistics(actions[indices]))
    _assert_equal(made.of().statistics["proprio"], everything.of().statistics["proprio"])
    assert made.fingerprint != everything.fingerprint


def test_nothing_but_padding_is_an_error(tmp_path):
    padded = np.ones((40, 4), bool)
    dataset = make_records(tmp_path / "a", 1, records=40, actions_padded=padded)
    with pytest.raises(ValueError, match="all actions are padding"):
        make_normalizers([dataset], mask_padding=True)
