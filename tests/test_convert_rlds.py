"""The conversion of RLDS datasets to ArrayRecord, without TensorFlow."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rlds_datasets import (
    ARM,
    ARM_ARRAY,
    CELL,
    COUNTS,
    check_episode,
    copy,
    damage,
    open_rlds,
    shards,
    truth,
)

from data_pipelines import convert_rlds as converter
from data_pipelines.convert_rlds import convert_rlds


def test_a_converted_dataset_is_the_same_for_us_and_for_tfds(tmp_path):
    convert_rlds(CELL, tmp_path / "out")
    for split in COUNTS:
        episodes = open_rlds(tmp_path / "out", split=split)
        assert [e.id for e in episodes] == [e.id for e in open_rlds(CELL, split=split)]
        for number, episode in enumerate(episodes):
            check_episode(episode, truth("cell", split, number))
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(tmp_path / "out").as_data_source(split="train")
    assert "tensorflow" not in sys.modules
    for number, episode in enumerate(source):
        steps, ours = list(episode["steps"]), open_rlds(CELL)[number].streams
        assert len(steps) == len(ours["steps/action/world_vector"].values)
        for camera in ("image", "raw_image"):
            theirs = np.stack([step["observation"][camera] for step in steps])
            frames = ours[f"steps/observation/{camera}"].values
            np.testing.assert_array_equal(frames.read(range(len(frames))), theirs)
        theirs = np.stack([step["action"]["world_vector"] for step in steps])
        np.testing.assert_array_equal(ours["steps/action/world_vector"].values, theirs)


def test_a_stopped_conversion_goes_on(tmp_path, monkeypatch):
    written, convert_file = [], converter._convert_file

    def stop_at_the_third(path, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        return convert_file(path, *rest)

    monkeypatch.setattr(converter, "_convert_file", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        convert_rlds(ARM, tmp_path / "out")
    assert not (tmp_path / "out/dataset_info.json").exists()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.array_record-*")}
    assert len(before) == 2
    monkeypatch.setattr(converter, "_convert_file", convert_file)
    folder = convert_rlds(ARM, tmp_path / "out")
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert {k: len(v) for k, v in folder.splits.items()} == {"train": 4, "val": 2}
    assert folder.info == json.loads((ARM / "dataset_info.json").read_text()) | {
        "fileFormat": "array_record"
    }
    assert convert_rlds(ARM, tmp_path / "out").info == folder.info  # finished: nothing to do
    with pytest.raises(ValueError, match="was begun from another dataset"):
        convert_rlds(CELL, tmp_path / "out")


def test_damage_stops_a_conversion_unless_it_is_to_be_left_out(tmp_path, capsys):
    source, out = copy(ARM, tmp_path), tmp_path / "out"
    damage(shards(source)[0], 500)
    shards(source)[1].unlink()
    with pytest.raises(ValueError, match=r"has 2 faults, the first: .*record 0 is damaged"):
        convert_rlds(source, out)
    assert len(list(out.glob("*.array_record-*"))) == 2  # those of "val"
    folder = convert_rlds(source, out, leave_out_damaged=True)
    assert f"damaged: {shards(source)[0]}: record 0" in capsys.readouterr().err
    assert folder.splits["train"].lengths == (1, 0)
    left_out = json.loads((out / "conversion.json").read_text())["left_out"]
    assert left_out == {f"arm-train.array_record-{i:05d}-of-00002": n for i, n in ((0, 1), (1, 2))}
    (episode,) = open_rlds(out)
    check_episode(episode, truth("arm", "train", 1))


def test_the_command_says_what_it_did(tmp_path):
    command = [sys.executable, "-m", "data_pipelines.convert_rlds"]
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [*command, ARM, tmp_path / "out"], cwd=root, check=True, capture_output=True, text=True
    )
    assert "is complete (train: 4 episodes, val: 2 episodes)" in done.stdout
    with pytest.raises(ValueError, match="kept as array_record already; use it as it is"):
        convert_rlds(ARM_ARRAY, tmp_path / "other")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").touch()
    with pytest.raises(ValueError, match="holds other files; choose an empty folder"):
        convert_rlds(ARM, tmp_path / "full")
