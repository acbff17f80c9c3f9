"""Statistics and normalisation against the release's numbers."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.normalize import Normalizer, load_normalizers
from data_pipelines.representations import Mode
from data_pipelines.statistics import compute_statistics, concat_statistics

GOLDEN = np.load(Path(__file__).parent / "golden" / "normalizer.npz")
DATA = GOLDEN["in.data"]
STATISTICS = {k.removeprefix("stats."): GOLDEN[k] for k in GOLDEN if k.startswith("stats.")}
MODES = [Mode.VARIANCE, Mode.SQUASH, Mode.SQUASH_HARD, Mode.IDENTITY]


def _error(ours, theirs):
    return np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(np.square(theirs, dtype=np.float64)))


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_equal_the_release(name):
    assert _error(compute_statistics(DATA)[name], STATISTICS[name]) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_modes_equal_the_release(mode):
    normalizer = Normalizer({"actions": STATISTICS}, {"actions": mode})
    normalized = normalizer.normalize("actions", DATA)
    assert normalized.dtype == np.float32
    assert _error(normalized, GOLDEN[f"{mode}.normalized"]) < 1e-6
    raw = normalizer.unnormalize("actions", GOLDEN[f"{mode}.normalized"])
    assert _error(raw, GOLDEN[f"{mode}.unnormalized"]) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_values_within_the_clamps_come_back(mode):
    normalizer = Normalizer({"a": STATISTICS}, {"a": mode})
    inside = np.clip(DATA, STATISTICS["percentiles"][20], STATISTICS["percentiles"][980])
    back = normalizer.unnormalize("a", normalizer.normalize("a", inside))
    np.testing.assert_allclose(back, inside, rtol=1e-5, atol=1e-5)


def test_constant_dimensions_are_shifted_not_scaled():
    data = np.full((50, 2, 1), 3.25, np.float32)
    for mode in (Mode.VARIANCE, Mode.SQUASH, Mode.SQUASH_HARD):
        normalizer = Normalizer({"a": compute_statistics(data)}, {"a": mode})
        normalized = normalizer.normalize("a", data)
        np.testing.assert_allclose(normalized, 0.0, atol=1e-6)
        np.testing.assert_allclose(normalizer.unnormalize("a", normalized), data)


def test_modes_per_dimension_join_positions_and_rotations():
    parts = {"pos": compute_statistics(DATA[..., :3]), "rot": compute_statistics(DATA[..., 3:])}
    joined = concat_statistics(parts, ["pos", "rot"])
    both = Normalizer({"a": joined}, {"a": [Mode.VARIANCE] * 3 + [Mode.IDENTITY]})
    alone = Normalizer({"a": compute_statistics(DATA)}, {"a": Mode.VARIANCE})
    normalized = both.normalize("a", DATA)
    np.testing.assert_allclose(normalized[..., :3], alone.normalize("a", DATA)[..., :3], rtol=1e-5)
    np.testing.assert_array_equal(normalized[..., 3], DATA[..., 3])


def test_none_lets_anything_through():
    normalizer = Normalizer({}, {"a": Mode.NONE})
    np.testing.assert_array_equal(normalizer.normalize("a", DATA), DATA)


def test_save_and_load(tmp_path):
    modes = {"actions": Mode.VARIANCE, "proprio": [Mode.SQUASH] * 4}
    saved = Normalizer({"actions": STATISTICS, "proprio": STATISTICS}, modes, "abc")
    saved.save(tmp_path / "deep" / "normalizer.json")
    loaded = load_normalizers(tmp_path / "deep" / "normalizer.json").of()
    assert loaded.fingerprint == "abc"
    for key in modes:
        np.testing.assert_array_equal(loaded.normalize(key, DATA), saved.normalize(key, DATA))
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["normalizer.json"]


def test_released_statistics_need_modes(tmp_path):
    released = {"action/eef": {name: value.tolist() for name, value in STATISTICS.items()}}
    (tmp_path / "bridge.json").write_text(json.dumps(released))
    with pytest.raises(ValueError, match="no modes"):
        load_normalizers(tmp_path / "bridge.json")


def test_a_damaged_normalizer_is_named(tmp_path):
    path = tmp_path / "normalizer.json"
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 40\n"
    for text, words in (
        (pointer, "git lfs pull"),
        ("", "Expecting value"),
        ("[]", "no statistics"),
    ):
        path.write_text(text)
        with pytest.raises(OSError, match=rf"normalizer\.json is damaged \(.*{words}"):
            load_normalizers(path)


def test_wrong_shapes_and_keys_are_explained():
    normalizer = Normalizer({"actions": STATISTICS}, {"actions": Mode.VARIANCE})
    with pytest.raises(ValueError, match=r"\(800, 2, 4\).*\[\.\.\., 3, 4\]"):
        normalizer.normalize("actions", DATA[:, :2])
    with pytest.raises(KeyError, match="proprio"):
        normalizer.normalize("proprio", DATA)
    with pytest.raises(ValueError, match="lacks the statistics"):
        Normalizer({"actions": {"mean": 0}}, {"actions": Mode.VARIANCE})
    with pytest.raises(ValueError, match="size 0"):
        compute_statistics(DATA[:0])
