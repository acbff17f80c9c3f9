"""The encoding job on small in-memory episodes: content, resuming, bad input."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from ml_collections import ConfigDict

from data_pipelines.bad_share import TooManyBad
from data_pipelines.clips import StreamMismatch, cut_episode
from data_pipelines.encoding.finish import encode_texts
from data_pipelines.encoding.job import encode_dataset, split_of
from data_pipelines.encoding.text_table import StoredTexts
from data_pipelines.episode import Episode, Stream
from data_pipelines.normalization.normalizer import Mode
from data_pipelines.normalization.per_embodiment import make_normalizers
from data_pipelines.records.dataset import RecordDataset

SIZE, FPS, CONTROL = 48, 40, 80
CLIP = ConfigDict(dict(height=16, width=16, observed_frames=5, future_frames=8, fps=20))
POLICY_IO = ConfigDict(
    dict(action=dict(horizon=4, fps=80, shift=0.0, dim=4), proprio=dict(horizon=1, fps=80, dim=4))
)
ROBOT = ConfigDict(
    dict(name="robot", video="front", action="action", proprio="state", embodiment="arm")
)
HUMAN = ConfigDict(dict(name="human", video="front", action="", proprio="", embodiment="human"))
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


class OtherTextEncoder(TextEncoder):
    def encode(self, texts):
        return 2 * super().encode(texts)


def _episode(i, n=30, acting=True, instructions=None, reader=Frames, embeddings=None):
    rng = np.random.default_rng(100 + i)
    streams = {"front": Stream(np.arange(n, dtype=np.int64) * 10**9 // FPS, reader(i, n))}
    if acting:
        stamps = np.arange(2 * n, dtype=np.int64) * 10**9 // CONTROL
        for name in ("action", "state"):
            streams[name] = Stream(stamps, rng.normal(size=(2 * n, 4)).astype(np.float32))
    instructions = instructions or (f"task {'x' * (i % 3)}",)
    cameras = ("front",)
    return Episode(f"episode {i}", "toy", "arm", instructions, streams, cameras, embeddings or {})


def _encode(episodes, path, dataset=ROBOT, tokenizer=None, clip=CLIP, text_encoder=None, **options):
    defaults = dict(batch_size=16, episodes_per_shard=2, validation_share=0.3, identity=IDENTITY)
    options = defaults | options
    return encode_dataset(
        episodes,
        dataset,
        clip,
        POLICY_IO,
        tokenizer or Tokenizer(),
        text_encoder or TextEncoder(),
        path,
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


def test_after_a_mistake_in_the_settings_the_same_folder_can_be_used(tmp_path):
    wrong = ConfigDict(dict(ROBOT.to_dict(), action="acton"))
    with pytest.raises(StreamMismatch, match="acton"):
        _encode([_episode(0)], tmp_path, wrong)
    assert len(_encode([_episode(0)], tmp_path)) == 30


def test_other_settings_are_refused_by_name(tmp_path):
    episodes = [_episode(0)]
    _encode(episodes, tmp_path)
    slower = CLIP.copy_and_resolve_references()
    slower.fps = 10
    with pytest.raises(ValueError, match=r"clip.*20.*10"):
        _encode(episodes, tmp_path, clip=slower)


def test_bad_episodes_are_named_and_the_rest_is_encoded(tmp_path):
    episodes = [_episode(0), _episode(1, reader=BrokenFrames), _episode(2, n=2), _episode(3)]
    with pytest.raises(TooManyBad, match=r"2 of 4 episodes of 'robot'.*= 0.05 allows: episode 1 "):
        _encode(episodes, tmp_path)
    rest = Tokenizer()
    dataset = _encode(episodes, tmp_path, max_bad_share=0.5, tokenizer=rest)
    assert rest.calls == 0  # nothing of what was read before is read again
    assert [row.count for row in dataset.episodes] == [30, 0, 0, 30]
    assert [bad["id"] for bad in dataset.skipped] == ["episode 1", "episode 2"]
    assert "moov atom" in dataset.skipped[0]["reason"]
    assert int(dataset[30]["episode"]) == 3
    assert dataset.columns("anchor")["anchor"].shape == (60,)
    with pytest.raises(ValueError, match=r"no episode.*moov atom"):
        _encode([_episode(1, reader=BrokenFrames)], tmp_path / "none", max_bad_share=1.0)


def test_many_bad_episodes_stop_the_job_early(tmp_path):
    episodes = [_episode(i, reader=Frames if i % 4 else BrokenFrames) for i in range(40)]
    opened = []

    class Counted(list):
        def __getitem__(self, index):
            opened.append(index)
            return super().__getitem__(index)

    with pytest.raises(TooManyBad, match=r"6 of 21 episodes of 'robot'.* and 3 more"):
        _encode(Counted(episodes), tmp_path)
    assert max(opened) < 30
    with pytest.raises(TooManyBad):  # what was finished counts when it goes on
        _encode(episodes, tmp_path, max_bad_share=0.2)


def test_numbers_that_are_not_finite_spoil_their_episode(tmp_path):
    episodes = [_episode(i) for i in range(3)]
    episodes[1].streams["action"].values[7, 2] = np.nan
    dataset = _encode(episodes, tmp_path, max_bad_share=0.5)
    assert [(bad["id"], "actions" in bad["reason"]) for bad in dataset.skipped] == [
        ("episode 1", True)
    ]


def test_an_episode_that_alone_lacks_a_stream_is_bad_not_the_config(tmp_path):
    episodes = [_episode(0), _episode(1, acting=False), _episode(2)]
    dataset = _encode(episodes, tmp_path, max_bad_share=0.5)
    assert [bad["id"] for bad in dataset.skipped] == ["episode 1"]


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
    normalizers = make_normalizers([dataset])
    normalizer = normalizers.of("arm")
    actions = np.stack([dataset[int(i)]["actions"] for i in dataset.record_indices("train")])
    np.testing.assert_allclose(normalizer.statistics["actions"]["mean"], actions.mean(0), rtol=1e-5)
    assert normalizer.modes["proprio"] is Mode.VARIANCE
    assert make_normalizers([dataset], 1).fingerprint != normalizers.fingerprint


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_work_and_leave_the_same_files(tmp_path, processes):
    episodes = [_episode(i) for i in range(9)]
    whole, tokenizers = _encode(episodes, tmp_path / "one"), [Tokenizer() for _ in range(processes)]

    def work(process):
        return _encode(
            [_episode(i) for i in range(9)],
            tmp_path / "many",
            tokenizer=tokenizers[process],
            process=process,
            processes=processes,
        )

    with ThreadPoolExecutor(processes) as pool:
        for records in pool.map(work, range(processes)):
            _same(whole, records)
    _assert_same_files(tmp_path / "one", tmp_path / "many")
    once = Tokenizer()
    _encode(episodes, tmp_path / "again", tokenizer=once)
    assert all(t.calls for t in tokenizers) and sum(t.calls for t in tokenizers) == once.calls


def test_another_number_of_processes_goes_on(tmp_path):
    episodes = [_episode(i) for i in range(8)]
    _encode(episodes, tmp_path / "one")
    for process, calls in ((0, 5), (2, 2)):  # killed; the second of them has not even begun
        with pytest.raises(KeyboardInterrupt):
            _encode(
                episodes,
                tmp_path / "many",
                tokenizer=Tokenizer(fail_at=calls),
                process=process,
                processes=3,
            )
    rest = Tokenizer()
    _encode(episodes, tmp_path / "many", tokenizer=rest)
    _assert_same_files(tmp_path / "one", tmp_path / "many")
    assert rest.calls == 12  # one of four shards was finished


def test_killed_anywhere_and_resumed_gives_the_same_bytes(tmp_path):
    """A real process and SIGKILL, at moments that the clock chooses."""
    program = "import sys, test_encode; test_encode.encode_slowly(sys.argv[1])"
    command = [sys.executable, "-c", program, str(tmp_path / "killed")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for seen in ("shard_00000.npz", "shard_00002.arrayrecord.partial", "shard_00003.npz"):
        process = subprocess.Popen(command, env=environment)
        while not (tmp_path / "killed" / seen).exists():
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
        process.wait()
    assert not (tmp_path / "killed" / "manifest.json").exists()
    encode_slowly(tmp_path / "killed")
    encode_slowly(tmp_path / "whole")
    _assert_same_files(tmp_path / "whole", tmp_path / "killed")


def encode_slowly(path):
    class Slow(Tokenizer):
        def encode(self, video):
            time.sleep(0.02)
            return super().encode(video)

    _encode([_episode(i) for i in range(12)], path, tokenizer=Slow())


def test_a_deleted_shard_is_made_again(tmp_path):
    episodes = [_episode(i) for i in range(5)]
    first = _encode(episodes, tmp_path / "a")
    _encode(episodes, tmp_path / "b")
    (tmp_path / "b" / "shard_00001.arrayrecord").unlink()
    some = Tokenizer()
    _same(first, _encode(episodes, tmp_path / "b", tokenizer=some))
    assert some.calls == 4
    _assert_same_files(tmp_path / "a", tmp_path / "b")


def test_texts_alone_are_made_again(tmp_path):
    episodes, other = [_episode(i) for i in range(5)], {**IDENTITY, "text_encoder": "other"}
    before = _encode(episodes, tmp_path)
    texts_before = [before.text(i) for i in range(len(before.instructions))]
    bytes_before = {path: path.read_bytes() for path in tmp_path.glob("shard_*")}
    with pytest.raises(ValueError, match=r"identity: .*toy.*other.*--only=text"):
        _encode(episodes, tmp_path, identity=other)
    after = encode_texts(tmp_path, OtherTextEncoder(), "other")
    assert after.fingerprint != before.fingerprint and after.settings["identity"] == other
    for index, text in enumerate(texts_before):
        np.testing.assert_array_equal(after.text(index), 2 * text)
    assert bytes_before == {path: path.read_bytes() for path in tmp_path.glob("shard_*")}
    _same(after, _encode(episodes, tmp_path, identity=other))
    _same(after, encode_texts(tmp_path, None, "other"))  # nothing is left to do
    # The same as encoding everything with it.
    whole = _encode(episodes, tmp_path / "whole", text_encoder=OtherTextEncoder(), identity=other)
    assert whole.fingerprint == after.fingerprint


def test_texts_killed_on_the_way_are_finished_by_either_command(tmp_path):
    class Killed(TextEncoder):
        def encode(self, texts):
            raise KeyboardInterrupt

    episodes, other = [_episode(i) for i in range(3)], {**IDENTITY, "text_encoder": "other"}
    for name, finish in (
        ("a", lambda path: encode_texts(path, OtherTextEncoder(), "other")),
        (
            "b",
            lambda path: _encode(episodes, path, text_encoder=OtherTextEncoder(), identity=other),
        ),
    ):
        path = tmp_path / name
        _encode(episodes, path)
        with pytest.raises(KeyboardInterrupt):
            encode_texts(path, Killed(), "other")
        with pytest.raises(FileNotFoundError, match="is not finished"):
            RecordDataset(path)
        assert finish(path).settings["identity"] == other
    with pytest.raises(ValueError, match="is not finished; encode without --only"):
        encode_texts(tmp_path / "nothing", TextEncoder(), "other")


def test_embeddings_that_the_dataset_stores(tmp_path):
    rng, texts = np.random.default_rng(0), [f"task {i}" for i in range(3)]
    stored = {text: rng.normal(size=(2 + i, 4)).astype(np.float16) for i, text in enumerate(texts)}

    def episode(i, **options):
        text = texts[i % 3]
        return _episode(i, instructions=(text,), embeddings={text: stored[text]}, **options)

    encoder = StoredTexts(length=8, dim=4)
    episodes = [episode(i) for i in range(6)]
    options = dict(text_encoder=encoder, identity={**IDENTITY, "text_encoder": encoder.identity})
    dataset = _encode(episodes, tmp_path / "a", **options)
    assert dataset.instructions == texts
    for i, text in enumerate(texts):
        np.testing.assert_array_equal(dataset.text(i)[: 2 + i], stored[text].astype(np.float32))
        assert not dataset.text(i)[2 + i :].any()
    # The same from records that were made with an encoder.
    _encode(episodes, tmp_path / "b")
    _same(dataset, encode_texts(tmp_path / "b", encoder, encoder.identity, episodes))
    # An episode without is bad, and named.
    lacking = [*episodes, _episode(7)]
    dataset = _encode(lacking, tmp_path / "c", max_bad_share=0.2, **options)
    assert dataset.skipped[0]["id"] == "episode 7" and len(dataset.instructions) == 3
    assert "stores no embedding of its instruction 'task x'" in dataset.skipped[0]["reason"]
    with pytest.raises(ValueError, match=r"shape \[2, 4\], but config.text has length 1"):
        StoredTexts(1, 4).embedding(episodes[0], texts[0])


def _assert_same_files(a, b):
    files = sorted(path.name for path in a.iterdir())
    assert files == sorted(path.name for path in b.iterdir())
    for name in files:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
