"""Damaged RLDS datasets: each fault costs its own episodes, and is named."""

import shutil

import numpy as np
import pytest
from rlds_datasets import ARM, ARM_ARRAY, CELL, copy, damage, open_rlds, readable, rewrite, shards

from data_pipelines.sources.formats import detect
from data_pipelines.sources.rlds import RecordFiles, read_index, read_record


def test_a_truncated_file_costs_its_last_episodes_only(tmp_path):
    folder = copy(ARM, tmp_path)
    last = shards(folder)[1]
    last.write_bytes(last.read_bytes()[:-5])
    good, reasons = readable(open_rlds(folder))
    assert good == [0, 1, 2]
    assert reasons == [f"{last}: no record 1, the file ends within record 1; copy the file again"]


def test_damaged_bytes_cost_their_episode_only(tmp_path):
    folder = copy(ARM, tmp_path)
    first = shards(folder)[0]
    damage(first, 500)
    good, reasons = readable(open_rlds(folder))
    assert good == [1, 2, 3]
    assert reasons == [f"{first}: record 0 is damaged (checksum); copy the file again"]
    damage(first, 2)  # its length: what follows cannot be found
    good, reasons = readable(open_rlds(folder))
    assert good == [2, 3]
    assert "no record 1, the header of record 0 is damaged" in reasons[1]


def test_a_missing_file_costs_its_episodes_only(tmp_path):
    folder = copy(ARM, tmp_path)
    missing = shards(folder)[0]
    missing.unlink()
    good, reasons = readable(open_rlds(folder))
    assert good == [2, 3]
    assert reasons == [f"{missing} is missing; copy it again"] * 2


def test_damaged_array_record_files_are_named(tmp_path):
    folder = copy(ARM_ARRAY, tmp_path)
    (file,) = shards(folder)
    whole = file.read_bytes()
    file.write_bytes(whole[:70_000])
    good, reasons = readable(open_rlds(folder))
    assert good == [] and all(reason.startswith(f"{file}: record") for reason in reasons)
    file.write_bytes(whole)
    damage(file, 200)
    good, reasons = readable(open_rlds(folder))
    assert len(good) == 1 and "copy the file again" in reasons[0]


def test_what_cannot_be_opened_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"has no split 'test', but train, val; set"):
        open_rlds(ARM, split="test")
    folder = copy(ARM, tmp_path)
    features = (folder / "features.json").read_text()
    info = (folder / "dataset_info.json").read_text()
    (folder / "features.json").unlink()
    assert detect(folder) == "rlds"
    with pytest.raises(ValueError, match=r"features\.json is missing"):
        open_rlds(folder)
    for damaged, message in {
        features[:100]: "JSONDecodeError",
        features.replace("image_feature.Image", "sound.Sound"): "Unrecognized FeatureConnector",
        '{"type": "FeaturesDict", "content": {}}': "ValueError",
    }.items():
        (folder / "features.json").write_text(damaged)
        with pytest.raises(ValueError, match=rf"{folder}: .* is damaged.*{message}"):
            open_rlds(folder)
    (folder / "features.json").write_bytes(b'{"name": "\xe9"}')
    with pytest.raises(ValueError, match=r"is damaged.*UnicodeDecodeError"):
        open_rlds(folder)
    (folder / "features.json").write_text(features.replace('"steps"', '"frames"'))
    with pytest.raises(ValueError, match="not made of steps"):
        open_rlds(folder)
    (folder / "features.json").write_text(features)
    for damaged in ("{}", info[:100]):
        (folder / "dataset_info.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"dataset_info\.json .*is damaged"):
            open_rlds(folder)
    (folder / "dataset_info.json").write_text(info.replace("shardLengths", "numBytes"))
    with pytest.raises(ValueError, match=r"is damaged|has no split"):
        open_rlds(folder)
    (folder / "dataset_info.json").unlink()
    with pytest.raises(ValueError, match="there is none; give <name>/<version>"):
        open_rlds(folder)


def test_several_versions_and_other_formats_are_refused(tmp_path):
    shutil.copytree(ARM, tmp_path / "arm/1.0.0")
    assert detect(tmp_path / "arm") == "rlds"
    shutil.copytree(ARM, tmp_path / "arm/1.1.0")
    with pytest.raises(ValueError, match=r"several versions, \['1\.0\.0', '1\.1\.0'\]"):
        open_rlds(tmp_path / "arm")
    with pytest.raises(ValueError, match="is kept as riegeli; tfrecord and array_record can be"):
        open_rlds(copy(ARM, tmp_path, fileFormat="riegeli"))
    (tmp_path / "hub").mkdir()  # the datasets library of Hugging Face has the same file name
    (tmp_path / "hub/dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match="is of no format known here"):
        detect(tmp_path / "hub")


def test_text_in_another_encoding_is_refused(tmp_path):
    folder = copy(ARM, tmp_path)
    rewrite(
        shards(folder)[0],
        lambda data: data.replace("it — gently".encode(), b"it \xe9\xe9\xe9 gently"),
    )
    with pytest.raises(
        ValueError, match=r"record 0: steps/language_instruction\w* of step 0: not UTF-8"
    ):
        open_rlds(folder)[0]


def test_an_episode_without_steps_and_one_without_a_promised_value_are_refused(tmp_path):
    from tensorflow_datasets.proto import tf_example_pb2

    def without_steps(data: bytes) -> bytes:
        example = tf_example_pb2.Example.FromString(data)
        for name, feature in example.features.feature.items():
            if name.startswith("steps/"):
                del getattr(feature, feature.WhichOneof("kind")).value[:]
        return example.SerializeToString()

    folder = copy(ARM, tmp_path)
    rewrite(shards(folder)[0], without_steps)
    with pytest.raises(ValueError, match="record 0: the episode has no steps"):
        open_rlds(folder)[0]
    rewrite(shards(folder)[1], lambda data: data.replace(b"steps/reward", b"steps/rewerd"))
    with pytest.raises(ValueError, match="there is no 'steps/reward' in it"):
        open_rlds(folder)[2]


def test_broken_messages_are_errors_and_nothing_worse(monkeypatch):
    index = read_index(shards(CELL)[0])
    data = read_record(shards(CELL)[0], index, 0)
    episodes, rng = open_rlds(CELL), np.random.default_rng(0)
    whole = 0
    for _ in range(300):
        broken = bytearray(data[: rng.integers(1, len(data))] if rng.random() < 0.5 else data)
        broken[rng.integers(len(broken))] ^= 1 << int(rng.integers(8))
        monkeypatch.setattr(RecordFiles, "read", lambda *_, content=bytes(broken): content)
        try:
            whole += bool(episodes[0].streams)
        except ValueError as error:
            assert str(shards(CELL)[0]) in str(error)
    assert 0 < whole < 150  # where a number or a picture is another one, nothing can tell
