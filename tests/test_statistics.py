"""Statistics from the records' numbers: exact, flat in memory, resumable."""

import numpy as np
import pytest
from record_folders import make_records

from data_pipelines import statistics as module
from data_pipelines.atomic import write_npz
from data_pipelines.normalize import Normalizer, make_normalizers
from data_pipelines.records import RecordDataset
from data_pipelines.statistics import collapsed, column_statistics, compute_statistics

ACTION = [dict(stream="hand", columns=[0]), dict(stream="hand", columns=[6])]


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


# What a mode loses, or blows up.

N = 4000
STEP, NOISE = np.arange(N), np.random.default_rng(0).normal(size=N)
RARE = (STEP % 80 == 0) * 1.0  # 1.25 %
LOST = {  # name -> values, the modes that lose them, a word of what is said
    "a suction command": (RARE, "VARIANCE", "is 0 except in 1.3 %"),
    "the same, negative": (-RARE, "VARIANCE", "reach -1"),
    "rarely open": (1 - RARE, "VARIANCE", "is 1 except"),
    "both ways": (RARE - (STEP % 80 == 1), "VARIANCE", "except"),
    "pressed once": ((STEP == 7) * 1.0, "VARIANCE", "reach 1"),
    "rarely 1, else -1": (2 * RARE - 1, "VARIANCE SQUASH SQUASH_HARD", "is -1 except"),
    "in per cent": (100 * RARE, "VARIANCE SQUASH SQUASH_HARD", "reach 100"),
    "on noise": (RARE + 1e-3 * NOISE, "VARIANCE SQUASH SQUASH_HARD", "leaves only"),
    "mostly still": (NOISE * (STEP % 40 == 0), "VARIANCE", "is 0 except"),
    "one huge value": (np.where(STEP == 7, 1e6, NOISE), "VARIANCE", "reach 1e+06"),
    "noise": (3e-5 * NOISE, "VARIANCE SQUASH SQUASH_HARD", "is noise"),
    "rounding": (1000 + 1e-4 * NOISE, "VARIANCE SQUASH SQUASH_HARD", "is noise"),
    "kilometres": (4e-6 * np.sin(STEP), "VARIANCE SQUASH SQUASH_HARD", "smaller unit"),
}
KEPT = {
    "normal": NOISE,
    "constant": np.full(N, 0.25),
    "rounding that is not scaled": 1 + 2e-8 * NOISE,
    "every second": STEP % 2 * 1.0,
    "3 % and 97 %": (STEP % 100 < 3) * 1.0,
    "long tails": np.random.default_rng(1).laplace(size=N),
    "skewed": np.random.default_rng(1).lognormal(size=N),
    "small motions": 5e-4 * NOISE,
}


@pytest.mark.parametrize("mode", ["VARIANCE", "SQUASH", "SQUASH_HARD", "IDENTITY"])
def test_what_a_mode_loses_is_named(mode):
    values = [column for column, *_ in LOST.values()] + list(KEPT.values())
    data = np.stack(values, 1).astype(np.float32)[:, None]
    statistics = compute_statistics(data)
    found = dict(collapsed(statistics, mode))
    expected = [i for i, (_, modes, _) in enumerate(LOST.values()) if mode in modes.split()]
    assert list(found) == expected
    for i, what in found.items():
        assert list(LOST.values())[i][2] in what
    # What is not named does come back, but for the ends of a distribution.
    normalizer = Normalizer({"a": statistics}, {"a": mode})
    back = normalizer.unnormalize("a", normalizer.normalize("a", data))
    far = np.abs(back - data) > 0.5 * np.ptp(data, axis=0)
    for i in {*range(len(values))} - {9}:  # the huge value itself is clamped
        assert (far[:, 0, i].mean() > 2e-3) <= (i in found)


def test_the_mode_that_keeps_a_rare_command_is_named():
    data = np.stack([NOISE, RARE], 1)[:, None]
    ((dimension, what),) = collapsed(compute_statistics(data), "VARIANCE")
    assert dimension == 1
    assert "VARIANCE leaves only -0.00625" in what and "normalize='SQUASH'" in what
    assert collapsed(compute_statistics(data), ["VARIANCE", "SQUASH"]) == []
    assert collapsed(compute_statistics(data), "NONE") == []


def test_training_statistics_say_by_name_what_they_lose(tmp_path, caplog):
    dataset = make_records(tmp_path / "suction_arm", 1, action=ACTION)
    (tmp_path / "suction_arm" / "shard_0.npz").unlink()
    columns = {"actions": np.zeros((120, 4, 2)), "proprio": NOISE[:360].reshape(120, 1, 3).copy()}
    columns["actions"][..., 0] = NOISE[:480].reshape(120, 4)
    columns["actions"][5, :, 1] = 1  # in one training window of 90
    held_out = dataset.record_indices("validation")
    columns["proprio"][:, :, 1] = 0.5
    columns["proprio"][held_out, :, 1] = 0.75
    write_npz(tmp_path / "suction_arm" / "shard_0.npz", **columns)
    make_normalizers([dataset])
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 2
    assert "suction_arm: dimension 1 of the action (hand[6]) is 0 except" in said[0]
    assert "suction_arm: dimension 1 of the proprio (state[1]) is always 0.5" in said[1]


def test_records_with_nan_have_no_statistics(tmp_path):
    dataset = make_records(tmp_path / "a", 1, records=40)
    columns = dataset.columns("actions", "proprio")
    columns["actions"][3] = np.nan
    write_npz(tmp_path / "a" / "shard_0.npz", **columns)
    with pytest.raises(ValueError, match="actions of 'a' hold NaN"):
        make_normalizers([dataset])
