"""Mixtures: damaged records, masks, embodiments, shares of every task."""

import numpy as np
import pytest
from record_folders import PER_EPISODE, flip_bits, ids, make_records, take

from data_pipelines.episode import TooManyBad, kept
from data_pipelines.loader import LEAST_SAMPLES, make_loader
from data_pipelines.normalize import Normalizers, load_normalizers, make_normalizers
from data_pipelines.records import RecordDataset

PADDED_PART = (dict(stream="action", columns=(0,)), dict(pad=1))


def _loader(datasets, batches=None, **options):
    options = dict(weights=[1.0] * len(datasets), batch_size=8, seed=3, split="train") | options
    loader = make_loader(datasets, **options)
    return loader if batches is None else take(loader, batches)


def _record_bytes(dataset):
    """About how long a record is in its file."""
    return sum(file.stat().st_size for file in dataset.path.glob("*.arrayrecord")) // len(dataset)


@pytest.fixture
def damaged(tmp_path):
    """(sound, with one flipped byte range, the record in which it lies)."""
    sound = make_records(tmp_path / "a", 1, latent_size=300)
    (tmp_path / "b").mkdir()
    spoiled = make_records(tmp_path / "b" / "a", 1, latent_size=300)
    flip_bits(spoiled.path / "shard_0.arrayrecord", _record_bytes(spoiled) * 25)
    spoiled = RecordDataset(spoiled.path)
    bad = [i for i in range(len(spoiled)) if not _readable(spoiled, i)]
    assert len(bad) == 1
    return sound, spoiled, bad[0]


def _readable(dataset, index):
    try:
        return dataset[index] is not None
    except ValueError:
        return False


def test_a_corrupt_record_is_replaced_by_the_next_one_in_order(damaged, caplog):
    sound, spoiled, bad = damaged
    before = [i for _, i in ids(_loader([sound], 23))]
    after = [i for _, i in ids(_loader([spoiled], 23))]
    assert before.count(bad) >= 2  # in two epochs
    for place, (index, instead) in enumerate(zip(before[:-1], after[:-1])):
        assert instead == (before[place + 1] if index == bad else index)
    assert after == [i for _, i in ids(_loader([spoiled], 23))]  # the same every time
    said = caplog.text
    assert (
        said.count("replaced a sample") == 2 and said.count(f"record {bad} of ") == 2
    )  # once per run
    assert "run the encoding job again" in said


@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_a_truncated_shard_spoils_only_itself(tmp_path, damage):
    dataset = make_records(tmp_path / "a", 1, shards=6, latent_size=300)
    file = dataset.path / "shard_0.arrayrecord"  # the first, from which shapes would be read
    data = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    dataset = RecordDataset(dataset.path)
    assert len(dataset) == 120 and dataset.shapes["latents"] == (2, 300, 2, 4)
    assert [_readable(dataset, i) for i in (0, 19, 20, 119)] == [False, False, True, True]
    seen = ids(_loader([dataset], 12, max_bad_share=1.0))
    assert {i // 20 for _, i in seen} == {1, 2, 3, 4, 5}
    # A sixth is too much, which is said as soon as enough was seen to tell.
    with pytest.raises(TooManyBad, match=r"of the train split could not be read, more than"):
        _loader([dataset], LEAST_SAMPLES, max_bad_share=0.05)


def test_damaged_numbers_are_said_when_the_folder_is_opened(tmp_path):
    dataset = make_records(tmp_path / "a", 1)
    file = dataset.path / "shard_0.npz"
    flip_bits(file, file.read_bytes().index(b"anchor.npy") + 200)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"0.npz is damaged .* run the encoding job again"):
            RecordDataset(dataset.path)
        file.write_bytes(b"")  # as a machine that lost its power leaves it


def test_nothing_readable_is_an_error(tmp_path):
    dataset = make_records(tmp_path / "a", 1)
    (dataset.path / "shard_0.arrayrecord").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no shard in .* can be read"):
        RecordDataset(dataset.path)


def test_padded_dimensions_are_masked_and_padded_steps_if_wished(tmp_path):
    padded = np.random.default_rng(0).random((120, 4)) < 0.3
    one = make_records(tmp_path / "one", 1, action=PADDED_PART, actions_padded=padded)
    two = make_records(tmp_path / "two", 2, actions_padded=padded, embodiment="other")
    normalizers = make_normalizers([one, two])
    for mask_padding in (False, True):
        batches = _loader([one, two], 6, normalizers=normalizers, mask_padding=mask_padding)
        for batch in batches:
            for row, (number, index) in enumerate(ids([batch])):
                expected = np.ones((4, 2), bool) if number == 2 else np.array([[1, 0]] * 4, bool)
                expected &= ~(mask_padding & padded[index])[:, None]
                np.testing.assert_array_equal(batch["action_mask"][row], expected)
    old = make_records(tmp_path / "old", 3)
    made = make_normalizers([old])
    for use in (make_normalizers, lambda old, **masked: _loader(old, normalizers=made, **masked)):
        with pytest.raises(ValueError, match="'old' do not mark padded actions"):
            use([old], mask_padding=True)


def test_every_embodiment_has_its_own_normalizer(tmp_path):
    one = make_records(tmp_path / "one", 1)
    more = make_records(tmp_path / "more", 2, scale=3.0)
    big = make_records(tmp_path / "big", 3, scale=1000.0, embodiment="giant")
    datasets = [one, more, big]
    normalizers = make_normalizers(datasets)
    assert set(normalizers.by_embodiment) == {"arm", "giant"}
    for batch in _loader(datasets, 3, normalizers=normalizers):
        for row, (number, index) in enumerate(ids([batch])):
            normalizer = normalizers.of("giant" if number == 3 else "arm")
            raw = datasets[number - 1][index]
            for key in ("actions", "proprio"):
                np.testing.assert_array_equal(batch[key][row], normalizer.normalize(key, raw[key]))
            assert np.abs(batch["actions"][row]).max() < 5
    # Statistics of several datasets of one embodiment are those of their windows together.
    both = np.concatenate(
        [d.columns("actions")["actions"][d.record_indices("train")] for d in (one, more)]
    )
    np.testing.assert_allclose(
        normalizers.of("arm").statistics["actions"]["mean"], both.mean(0), atol=1e-5
    )

    normalizers.save(tmp_path / "normalizer.json")
    loaded = load_normalizers(tmp_path / "normalizer.json")
    assert loaded.fingerprint == normalizers.fingerprint
    values = big.columns("actions")["actions"]
    for name in ("arm", "giant"):
        np.testing.assert_array_equal(
            loaded.of(name).normalize("actions", values),
            normalizers.of(name).normalize("actions", values),
        )
    with pytest.raises(ValueError, match="arm, giant; choose one"):
        loaded.of()
    with pytest.raises(ValueError, match="arm, giant; there is none of 'dwarf'"):
        loaded.of("dwarf")


def test_one_embodiment_needs_no_name(tmp_path):
    made = make_normalizers([make_records(tmp_path / "one", 1)])
    made.save(tmp_path / "normalizer.json")
    loaded = load_normalizers(tmp_path / "normalizer.json")
    assert loaded.of().fingerprint == loaded.of("arm").fingerprint == made.fingerprint
    with pytest.raises(ValueError, match=r"arm; there is none of 'leg' \(--config.embodiment"):
        loaded.of("leg")
    # Statistics that name no embodiment (released ones) serve any.
    unnamed = Normalizers({"": loaded.of()}, "")
    assert unnamed.of("leg") is unnamed.of()


def test_datasets_of_an_embodiment_must_agree_on_modes(tmp_path):
    squash = (dict(stream="action", normalize="SQUASH"),)
    datasets = [
        make_records(tmp_path / "one", 1),
        make_records(tmp_path / "two", 2, action=squash),
    ]
    with pytest.raises(ValueError, match="'one' and 'two' have the embodiment 'arm' but norm"):
        make_normalizers(datasets)
    assert make_normalizers(datasets[1:]).of().modes == {"actions": "SQUASH", "proprio": "VARIANCE"}


def test_shares_of_every_task():
    assert [kept(50, name) for name in ("one", "tenth", "half", "full", None)] == [1, 5, 25, 50, 50]
    assert [kept(7, name) for name in ("one", "tenth", "half", 3, 30)] == [1, 1, 4, 3, 7]
    for wrong in ("third", 0, -1, 2.5, True):
        with pytest.raises(ValueError, match=r"give a number of episodes .* one, tenth, half"):
            kept(7, wrong)


def test_shares_are_of_each_task_and_nested(tmp_path):
    dataset = make_records(tmp_path / "a", 1, records=400)  # 40 episodes, 30 of them for training
    chosen = {
        name: {i // PER_EPISODE for i in dataset.record_indices("train", name, 5)}
        for name in ("one", "tenth", "half", "full")
    }
    tasks = {name: sorted(e % 2 for e in episodes) for name, episodes in chosen.items()}
    assert tasks["one"] == [0, 1]
    assert [tasks["half"].count(task) for task in (0, 1)] == [10, 5]
    assert [tasks["tenth"].count(task) for task in (0, 1)] == [2, 1]
    assert chosen["one"] < chosen["tenth"] < chosen["half"] < chosen["full"]
    assert len(chosen["full"]) == 30
