"""The encoding job on small in-memory episodes: content, resuming, bad input."""

import ml_dtypes
import numpy as np
import pytest
from ml_collections import ConfigDict

from data_pipelines.clips import StreamMismatch, cut_episode
from data_pipelines.encode import encode_dataset, split_of
from data_pipelines.episode import Episode, Stream
from data_pipelines.mixture import action_statistics
from data_pipelines.normalizer import Mode

SIZE, FPS, CONTROL = 48, 40, 80
CLIP = ConfigDict(dict(height=16, width=16, observed_frames=5, future_frames=8, fps=20))
POLICY_IO = ConfigDict(
    dict(action=dict(horizon=4, fps=80, shift=0.0, dim=4), proprio=dict(horizon=1, fps=80, dim=4))
)
ROBOT = ConfigDict(dict(name="robot", video="front", action="action", proprio="state"))
HUMAN = ConfigDict(dict(name="human", video="front", action="", proprio=""))
IDENTITY = {"tokenizer": "toy", "text_encoder": "toy"}


class Frames:
    """Frames in memory that count how often each is decoded."""

    def __init__(self, seed, n):
        self.data = np.random.default_rng(seed).integers(0, 256, (n, SIZE, SIZE, 3), np.uint8)
        self.reads = np.zeros(n, int)

    def __len__(self):
        return len(self.data)

    def read(self, indices):
        np.add.at(self.reads, indices, 1)
        return self.data[indices]


class BrokenFrames(Frames):
    def read(self, indices):
        raise OSError("moov atom not found")


class Tokenizer:
    """Pools frames: the first alone, then groups of four; 8x8 pixels; channels repeated to 16."""

    def __init__(self, fail_at=None):
        self.calls, self.fail_at, self.shapes = 0, fail_at, set()

    def encode(self, video):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        self.shapes.add(video.shape)
        assert video.dtype == np.float32 and video.min() >= -1 and video.max() <= 1
        b, t, h, w, _ = video.shape
        first, rest = video[:, :1], video[:, 1:].reshape(b, (t - 1) // 4, 4, h, w, 3).mean(2)
        small = np.concatenate([first, rest], 1)
        small = small.reshape(b, -1, h // 8, 8, w // 8, 8, 3).mean((3, 5))
        return np.tile(small, 6)[..., :16]


class TextEncoder:
    def encode(self, texts):
        out = np.zeros((len(texts), 8, 4), np.float32)
        for row, text in zip(out, texts):
            row[: min(len(text), 8)] = len(text)
        return out


def _episode(i, n=30, acting=True, instructions=None, reader=Frames):
    rng = np.random.default_rng(100 + i)
    streams = {"front": Stream(np.arange(n, dtype=np.int64) * 10**9 // FPS, reader(i, n))}
    if acting:
        stamps = np.arange(2 * n, dtype=np.int64) * 10**9 // CONTROL
        for name in ("action", "state"):
            streams[name] = Stream(stamps, rng.normal(size=(2 * n, 4)).astype(np.float32))
    instructions = instructions or (f"task {'x' * (i % 3)}",)
    return Episode(f"episode {i}", "toy", "arm", instructions, streams, ("front",))


def _encode(episodes, path, dataset=ROBOT, tokenizer=None, clip=CLIP, **options):
    options = dict(batch_size=16, episodes_per_shard=2, validation_share=0.3) | options
    return encode_dataset(
        episodes,
        dataset,
        clip,
        POLICY_IO,
        tokenizer or Tokenizer(),
        TextEncoder(),
        path,
        identity=IDENTITY,
        **options,
    )


def _same(a, b):
    assert (a.fingerprint, len(a), a.episodes) == (b.fingerprint, len(b), b.episodes)
    for i in range(len(a)):
        for key, value in a[i].items():
            np.testing.assert_array_equal(value, b[i][key])


def test_a_record_is_its_window(tmp_path):
    episodes = [_episode(i) for i in range(3)]
    dataset = _encode(episodes, tmp_path)
    assert [row.count for row in dataset.episodes] == [30, 30, 30]
    assert dataset.shapes["latents"] == (4, 2, 2, 16)
    # 40 Hz video, 20 Hz clips: every second frame, ends repeated.
    for index, frame in ((0, 0), (37, 7), (59, 29)):
        record, episode = dataset[index], episodes[index // 30]
        shown = np.clip(frame + 2 * np.arange(-4, 9), 0, 29)
        frames = episode.streams["front"].values.data[shown]
        pooled = frames.reshape(13, 16, 3, 16, 3, 3).mean((2, 4))
        latents = Tokenizer().encode((pooled / 127.5 - 1)[None].astype(np.float32))[0]
        assert record["latents"].dtype == ml_dtypes.bfloat16
        np.testing.assert_allclose(record["latents"].astype(np.float32), latents, atol=0.01)
        chunk = np.minimum(2 * frame + np.arange(4), 59)
        np.testing.assert_array_equal(record["actions"], episode.streams["action"].values[chunk])
        np.testing.assert_array_equal(
            record["proprio"], episode.streams["state"].values[[2 * frame]]
        )
        assert record["anchor"] == episode.streams["front"].timestamps[frame]
        assert dataset.instructions[int(record["text"])] == episode.instructions[0]
        np.testing.assert_array_equal(
            dataset.text(int(record["text"])), TextEncoder().encode(episode.instructions)[0]
        )


def test_every_frame_is_decoded_once_and_batches_have_one_shape(tmp_path):
    episodes, tokenizer = [_episode(i) for i in range(3)], Tokenizer()
    _encode(episodes, tmp_path, tokenizer=tokenizer)
    assert all(np.all(e.streams["front"].values.reads == 1) for e in episodes)
    assert tokenizer.shapes == {(16, 13, 16, 16, 3)}


def test_video_only_episodes_and_fewer_anchors(tmp_path):
    episodes = [_episode(i, acting=False) for i in range(2)]
    every = _encode(episodes, tmp_path / "every", HUMAN)
    assert len(every) == 60 and "actions" not in every.shapes
    half = _encode(episodes, tmp_path / "half", HUMAN, anchor_fps=20)
    assert len(half) == 30
    np.testing.assert_array_equal(half[1]["latents"], every[2]["latents"])


def test_a_killed_job_continues_and_gives_the_same_records(tmp_path):
    episodes = [_episode(i) for i in range(5)]
    whole = _encode(episodes, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _encode(episodes, tmp_path / "killed", tokenizer=Tokenizer(fail_at=6))
    assert not (tmp_path / "killed" / "manifest.json").exists()
    # What SIGKILL can leave behind: half a file, and a whole one that was not yet accounted for.
    (tmp_path / "killed" / "shard_00001.arrayrecord.partial").write_bytes(b"half")
    (tmp_path / "killed" / "shard_00002.arrayrecord").write_bytes(b"stale")
    rest = Tokenizer()
    resumed = _encode(episodes, tmp_path / "killed", tokenizer=rest)
    assert rest.calls == 6  # the second and third shard: 60 and 30 windows
    _same(whole, resumed)
    again = Tokenizer()
    _same(whole, _encode(episodes, tmp_path / "killed", tokenizer=again))
    assert again.calls == 0
    assert not list((tmp_path / "killed").glob("*.partial"))


def test_other_settings_are_refused_by_name(tmp_path):
    episodes = [_episode(0)]
    _encode(episodes, tmp_path)
    slower = CLIP.copy_and_resolve_references()
    slower.fps = 10
    with pytest.raises(ValueError, match=r"clip.*20.*10"):
        _encode(episodes, tmp_path, clip=slower)


def test_bad_episodes_are_named_and_the_rest_is_encoded(tmp_path):
    episodes = [_episode(0), _episode(1, reader=BrokenFrames), _episode(2, n=2), _episode(3)]
    dataset = _encode(episodes, tmp_path)
    assert [row.count for row in dataset.episodes] == [30, 0, 0, 30]
    assert [bad["id"] for bad in dataset.skipped] == ["episode 1", "episode 2"]
    assert "moov atom" in dataset.skipped[0]["reason"]
    assert int(dataset[30]["episode"]) == 3
    assert dataset.columns("anchor")["anchor"].shape == (60,)
    with pytest.raises(ValueError, match=r"no episode.*moov atom"):
        _encode([_episode(1, reader=BrokenFrames)], tmp_path / "none")


def test_configs_that_do_not_fit_stop_the_job(tmp_path):
    with pytest.raises(StreamMismatch, match=r"\['action', 'state'\].*\['front'\]"):
        _encode([_episode(0, acting=False)], tmp_path / "a")
    wide = POLICY_IO.copy_and_resolve_references()
    wide.action.dim = 7
    with pytest.raises(StreamMismatch, match="4 dimensions, but policy_io says 7"):
        cut_episode(_episode(0), ROBOT, CLIP, wide)
    short = CLIP.copy_and_resolve_references()
    short.future_frames = 7
    with pytest.raises(ValueError, match="12 together"):
        _encode([_episode(0)], tmp_path / "b", clip=short)


def test_several_instructions_take_turns(tmp_path):
    dataset = _encode([_episode(0, instructions=("push it", "push"))], tmp_path)
    assert [int(dataset[i]["text"]) for i in range(4)] == [0, 1, 0, 1]


def test_split_is_stable_under_added_data(tmp_path):
    few = _encode([_episode(i) for i in range(4)], tmp_path / "few")
    many = _encode([_episode(i) for i in range(8)], tmp_path / "many")
    assert [row.split for row in many.episodes[:4]] == [row.split for row in few.episodes]
    share = np.mean([split_of(f"{i}", 0.2) == "validation" for i in range(5000)])
    assert 0.18 < share < 0.22


def test_the_fingerprint_follows_the_data(tmp_path):
    episodes = [_episode(i) for i in range(2)]
    first = _encode(episodes, tmp_path / "first").fingerprint
    assert _encode(episodes, tmp_path / "again").fingerprint == first
    episodes[0].streams["front"].values.data[3] += 1
    assert _encode(episodes, tmp_path / "changed").fingerprint != first
    with pytest.raises(ValueError, match="other data: episode 'episode 0'"):
        _encode(episodes, tmp_path / "first")


def test_statistics_come_from_the_training_windows(tmp_path):
    dataset = _encode([_episode(i) for i in range(8)], tmp_path)
    normalizer = action_statistics([dataset])
    actions = np.stack([dataset[int(i)]["actions"] for i in dataset.record_indices("train")])
    np.testing.assert_allclose(normalizer.statistics["actions"]["mean"], actions.mean(0), rtol=1e-5)
    assert normalizer.modes["proprio"] is Mode.VARIANCE
    assert action_statistics([dataset], 1).fingerprint != normalizer.fingerprint
