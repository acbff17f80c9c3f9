"""RLDS: what a record or a name says about its own values, beside the values."""

import json
from pathlib import Path

import pytest
from test_source_rlds import ARM, IMAGE, WRIST, copy, open_rlds, rewrite, shards, with_changed


def renamed(folder: Path, old: str, new: str) -> None:
    """Gives a feature of the whole episode another name."""
    from tensorflow_datasets.proto import tf_example_pb2

    def change(data: bytes) -> bytes:
        example = tf_example_pb2.Example.FromString(data)
        stored = example.features.feature
        stored[f"episode_metadata/{new}"].CopyFrom(stored.pop(f"episode_metadata/{old}"))
        return example.SerializeToString()

    file = folder / "features.json"
    file.write_text(file.read_text().replace(f'"{old}"', f'"{new}"'))
    for shard in shards(folder):
        rewrite(shard, change)


def test_a_camera_that_an_episode_does_not_have_is_left_out(tmp_path):
    """BridgeData V2 as RLDS fills missing cameras with black pictures; `has_image_1` tells."""
    folder = copy(ARM, tmp_path)
    renamed(folder, "episode_id", "has_image_0")  # the numbers of the episodes, from 0
    episodes = open_rlds(folder)
    assert sorted(episode.cameras for episode in episodes) == [*[(IMAGE, WRIST)] * 3, (WRIST,)]
    (without,) = (episode for episode in episodes if IMAGE not in episode.streams)
    assert without.left_out[IMAGE] == (
        "episode_metadata/has_image_0 says that the episode does not have it"
    )


def test_an_episode_that_failed_is_a_finding(tmp_path):
    """QT-Opt and DROID hold failures, too."""
    folder = copy(ARM, tmp_path)
    renamed(folder, "episode_id", "success")
    episodes = open_rlds(folder)
    (failed,) = (episode for episode in episodes if episode.findings)
    assert failed.findings == (
        "episode_metadata/success says that the episode failed; it was taken all the same",
    )
    assert all(not episode.left_out.keys() - {"steps/observation/depth"} for episode in episodes)


@pytest.mark.parametrize(("flag", "inner"), [("is_first", [1, 0, 1]), ("is_last", [0, 1, 1])])
def test_borders_within_a_record_are_a_finding(tmp_path, flag, inner):
    flags = {flag: inner}
    folder = copy(ARM, tmp_path)
    rewrite(shards(folder)[1], with_changed(lambda name, values: flags.get(name, values)))
    episodes = open_rlds(folder)
    assert len(episodes[2].findings) == 1 and not episodes[0].findings
    assert f"steps/{flag} marks borders within a record" in episodes[2].findings[0]
    for nothing in ([0, 0, 0], [1, 1, 1]):  # as in published data
        flags[flag] = nothing
        rewrite(shards(folder)[1], with_changed(lambda name, values: flags.get(name, values)))
        assert not open_rlds(folder)[2].findings


def test_stored_times_of_another_rate_are_a_finding(tmp_path):
    folder = copy(ARM, tmp_path)
    file = folder / "features.json"
    file.write_text(file.read_text().replace('"reward"', '"timestamp"'))
    period = [0.1]

    def change(data: bytes) -> bytes:
        from tensorflow_datasets.proto import tf_example_pb2

        example = tf_example_pb2.Example.FromString(data)
        stored = example.features.feature
        count = len(stored.pop("steps/reward").float_list.value)
        times = [period[0] * i for i in range(count)]
        stored["steps/timestamp"].float_list.value.extend(times)
        return example.SerializeToString()

    shard, backup = shards(folder)[0], shards(ARM)[0].read_bytes()
    for period[0], fps, said in ((0.1, 10, 0), (100, 10, 0), (0.1, 5, 1), (0.0, 5, 0)):
        shard.write_bytes(backup)
        rewrite(shard, change)
        findings = open_rlds(folder, fps=fps)[0].findings
        assert ["not 1 / fps apart" in text for text in findings] == [True] * said


def test_texts_of_other_names_are_a_finding(tmp_path):
    folder = copy(ARM, tmp_path)
    file = folder / "features.json"
    file.write_text(file.read_text().replace("language_instruction", "language_goal"))
    episode = open_rlds(folder)[0]
    assert episode.instructions == ("",)
    assert "'steps/language_goal'" in episode.findings[0]
    assert "name it in dataset.options.instruction" in episode.findings[0]


def test_published_pictures_in_bgr_are_a_finding(tmp_path):
    folder = copy(ARM, tmp_path, name="utaustin_mutex")
    for file in folder.glob("arm-*"):
        file.rename(folder / file.name.replace("arm-", "utaustin_mutex-"))
    (finding,) = open_rlds(folder)[0].findings
    assert "red and blue exchanged in both cameras" in finding
    assert json.loads((folder / "dataset_info.json").read_text())["name"] in finding
