"""What the encoding job writes, of small episodes in memory."""

import ml_dtypes
import numpy as np
import pytest
from encode_toys import CLIP, HUMAN, ROBOT, TextEncoder, Tokenizer, encode, episode
from ml_collections import ConfigDict

from data_pipelines.clips import StreamMismatch
from data_pipelines.episode import split_of
from data_pipelines.normalize import make_normalizers
from data_pipelines.representations import Mode


def test_a_record_is_its_window(tmp_path):
    episodes = [episode(i) for i in range(3)]
    dataset = encode(episodes, tmp_path)
    assert [row.count for row in dataset.episodes] == [30, 30, 30]
    assert dataset.shapes["latents"] == (4, 2, 2, 16)
    # 40 Hz video, 20 Hz clips: every second frame, ends repeated.
    for index, frame in ((0, 0), (37, 7), (59, 29)):
        record, source = dataset[index], episodes[index // 30]
        shown = np.clip(frame + 2 * np.arange(-4, 9), 0, 29)
        frames = source.streams["front"].values.data[shown]
        pooled = frames.reshape(13, 16, 3, 16, 3, 3).mean((2, 4))
        latents = Tokenizer().encode((pooled / 127.5 - 1)[None].astype(np.float32))[0]
        assert record["latents"].dtype == ml_dtypes.bfloat16
        np.testing.assert_allclose(record["latents"].astype(np.float32), latents, atol=0.01)
        chunk = np.minimum(2 * frame + np.arange(4), 59)
        np.testing.assert_array_equal(record["actions"], source.streams["action"].values[chunk])
        np.testing.assert_array_equal(
            record["proprio"], source.streams["state"].values[[2 * frame]]
        )
        assert record["anchor"] == source.streams["front"].timestamps[frame]
        assert dataset.instructions[int(record["text"])] == source.instructions[0]
        np.testing.assert_array_equal(
            dataset.text(int(record["text"])), TextEncoder().encode(source.instructions)[0]
        )


def test_every_frame_is_decoded_once_and_batches_have_one_shape(tmp_path):
    episodes, tokenizer = [episode(i) for i in range(3)], Tokenizer()
    encode(episodes, tmp_path, tokenizer=tokenizer)
    assert all(np.all(e.streams["front"].values.reads == 1) for e in episodes)
    assert tokenizer.shapes == {(16, 13, 16, 16, 3)}


def test_video_only_episodes_and_fewer_anchors(tmp_path):
    episodes = [episode(i, acting=False) for i in range(2)]
    every = encode(episodes, tmp_path / "every", HUMAN)
    assert len(every) == 60 and "actions" not in every.shapes
    half = encode(episodes, tmp_path / "half", HUMAN, anchor_fps=20)
    assert len(half) == 30
    np.testing.assert_array_equal(half[1]["latents"], every[2]["latents"])


def test_several_instructions_take_turns(tmp_path):
    dataset = encode([episode(0, instructions=("push it", "push"))], tmp_path)
    assert [int(dataset[i]["text"]) for i in range(4)] == [0, 1, 0, 1]


def test_split_is_stable_under_added_data(tmp_path):
    few = encode([episode(i) for i in range(4)], tmp_path / "few")
    many = encode([episode(i) for i in range(8)], tmp_path / "many")
    assert [row.split for row in many.episodes[:4]] == [row.split for row in few.episodes]
    share = np.mean([split_of(f"{i}", 0.2) == "validation" for i in range(5000)])
    assert 0.18 < share < 0.22


def test_the_fingerprint_follows_the_data(tmp_path):
    episodes = [episode(i) for i in range(2)]
    first = encode(episodes, tmp_path / "first").fingerprint
    assert encode(episodes, tmp_path / "again").fingerprint == first
    episodes[0].streams["front"].values.data[3] += 1
    assert encode(episodes, tmp_path / "changed").fingerprint != first
    with pytest.raises(ValueError, match="other data: episode 'episode 0'"):
        encode(episodes, tmp_path / "first")


def test_statistics_come_from_the_training_windows(tmp_path):
    dataset = encode([episode(i) for i in range(8)], tmp_path)
    normalizers = make_normalizers([dataset])
    normalizer = normalizers.of("arm")
    actions = np.stack([dataset[int(i)]["actions"] for i in dataset.record_indices("train")])
    np.testing.assert_allclose(normalizer.statistics["actions"]["mean"], actions.mean(0), rtol=1e-5)
    assert normalizer.modes["proprio"] is Mode.VARIANCE
    assert make_normalizers([dataset], 1).fingerprint != normalizers.fingerprint


def test_other_settings_are_refused_by_name(tmp_path):
    episodes = [episode(0)]
    encode(episodes, tmp_path)
    slower = CLIP.copy_and_resolve_references()
    slower.fps = 10
    with pytest.raises(ValueError, match=r"clip.*20.*10"):
        encode(episodes, tmp_path, clip=slower)


def test_after_a_mistake_in_the_settings_the_same_folder_can_be_used(tmp_path):
    wrong = ConfigDict(dict(ROBOT.to_dict(), action="acton"))
    with pytest.raises(StreamMismatch, match="acton"):
        encode([episode(0)], tmp_path, wrong)
    assert len(encode([episode(0)], tmp_path)) == 30
