"""The encoding job on small episodes in memory: records, bad episodes, resuming, sampled clips."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from encode_toys import (
    CLIP,
    HUMAN,
    POLICY_IO,
    ROBOT,
    BrokenFrames,
    Frames,
    TextEncoder,
    Tokenizer,
    assert_same,
    assert_same_files,
    encode,
    episode,
)
from forked import Program
from ml_collections import ConfigDict

from data_pipelines.cutting import StreamMismatch, cut_episode
from data_pipelines.episode import Section, Stream, TooManyBad, split_of
from data_pipelines.episode_cutter import sample_clips
from data_pipelines.frames import resize_area
from data_pipelines.inspect_records import inspect_records
from data_pipelines.loader import make_loader
from data_pipelines.normalize import make_normalizers
from data_pipelines.records import RecordDataset
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


def test_observed_views_are_encoded_beside_the_video(tmp_path, caplog):
    """Their observed frames alone; the rest of a record is what it is without them."""
    episodes = [episode(i) for i in range(3)]
    clip = ConfigDict(CLIP.to_dict() | dict(views=dict(wrist=dict(height=16, width=32))))
    dataset = ConfigDict(ROBOT.to_dict() | dict(views=dict(wrist="front", other="nowhere")))
    plain, seen = (
        encode(episodes, tmp_path / "plain"),
        encode(episodes, tmp_path / "seen", dataset, clip=clip),
    )
    assert "datasets.robot.views.other is not used" in caplog.text
    assert "datasets.robot.views.wrist" not in caplog.text
    assert seen.shapes["views/wrist"] == (2, 2, 4, 16)
    assert seen.settings["dataset"]["views"] == {"wrist": "front"}
    for index in (0, 40, 89):
        record = seen[index]
        view = record.pop("views/wrist")
        for key, value in plain[index].items():
            np.testing.assert_array_equal(record[key], value)
        frame = index % 30
        shown = np.clip(frame + 2 * np.arange(-4, 1), 0, 29)
        frames = resize_area(episodes[index // 30].streams["front"].values.data[shown], 16, 32)
        latents = Tokenizer().encode((frames / 127.5 - 1)[None].astype(np.float32))[0]
        np.testing.assert_allclose(view.astype(np.float32), latents, atol=0.01)
    with pytest.raises(ValueError, match=r"clip.views is None there, .*'wrist'"):
        encode(episodes, tmp_path / "plain", dataset, clip=clip)
    other = ConfigDict(dataset.to_dict() | dict(views=dict(wrist=("front", ""))))
    with pytest.raises(ValueError, match=r"dataset\.views\.wrist is 'front' there"):
        encode(episodes, tmp_path / "seen", other, clip=clip)
    batches = make_loader([seen], [1.0], 4, seed=0, split="train")
    assert next(batches)["views/wrist"].shape == (4, 2, 2, 4, 16)
    with pytest.raises(ValueError, match="'robot' has no views/wrist; encode them with the same"):
        make_loader([seen, plain], [1.0, 1.0], 4, seed=0, split="train")


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


def test_what_the_source_found_is_in_the_manifest(tmp_path):
    """Findings are counted and cost nothing: the windows and the fingerprint stay the same."""
    plain = [episode(i) for i in range(3)]
    found = [replace(plain[0], findings=("a", "b")), plain[1], replace(plain[2], findings=("b",))]
    records = encode(found, tmp_path / "found")
    assert records.findings == {"a": [0], "b": [0, 2]}
    before = encode(plain, tmp_path / "plain")
    assert before.findings == {} and before.fingerprint == records.fingerprint
    problems = inspect_records(tmp_path / "found").problems_by_kind()["finding"]
    assert {(p.episode, p.text) for p in problems} == {
        ("episode 0", "a"),
        ("episode 0 and 1 more", "b"),
    }


def test_the_texts_of_sections_are_stored_with_their_windows(tmp_path):
    parts = (Section(0, ("reach",)), Section(10**9 // 4, ("lift", "raise")))
    one = replace(episode(0, instructions=("reach", "lift", "raise")), sections=parts)
    dataset = encode([one], tmp_path)
    texts = [dataset.instructions[int(dataset[i]["text"])] for i in range(30)]
    assert texts == ["reach"] * 10 + ["lift", "raise"] * 10


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


def test_bad_episodes_are_named_and_the_rest_is_encoded(tmp_path):
    episodes = [episode(0), episode(1, reader=BrokenFrames), episode(2, n=2), episode(3)]
    with pytest.raises(TooManyBad, match=r"2 of 4 episodes of 'robot'.*= 0.05 allows: episode 1 "):
        encode(episodes, tmp_path)
    rest = Tokenizer()
    dataset = encode(episodes, tmp_path, max_bad_share=0.5, tokenizer=rest)
    assert rest.calls == 0  # nothing of what was read before is read again
    assert [row.count for row in dataset.episodes] == [30, 0, 0, 30]
    assert [bad["id"] for bad in dataset.skipped] == ["episode 1", "episode 2"]
    assert "moov atom" in dataset.skipped[0]["reason"]
    assert int(dataset[30]["episode"]) == 3
    assert dataset.columns("anchor")["anchor"].shape == (60,)
    with pytest.raises(ValueError, match=r"no episode.*moov atom"):
        encode([episode(1, reader=BrokenFrames)], tmp_path / "none", max_bad_share=1.0)


def test_episodes_that_are_not_wanted_are_neither_windows_nor_bad(tmp_path):
    """The others are the records that they are alone; the list is said, and costs nothing."""
    episodes = [episode(i) for i in range(5)]
    some = [replace(e, unwanted="it failed") if i != 3 else e for i, e in enumerate(episodes)]
    some[4] = replace(episodes[4], ranges=((250_000_000, 350_000_000), (700_000_000, 10**12)))
    dataset = encode(some, tmp_path / "some", max_bad_share=0.0)
    assert [row.count for row in dataset.episodes] == [0, 0, 0, 30, 6]
    assert dataset.skipped == [] and dataset.findings == {"it failed": [0, 1, 2]}
    assert dataset.instructions == [episodes[3].instructions[0], episodes[4].instructions[0]]
    anchors = [int(dataset[i]["anchor"]) for i in range(30, 36)]
    assert anchors == [n * 25_000_000 for n in (10, 11, 12, 13, 28, 29)]  # 40 Hz
    alone = encode(episodes[3:], tmp_path / "alone")
    for key, value in alone[7].items():
        if key != "episode":
            np.testing.assert_array_equal(dataset[7][key], value)
    assert inspect_records(tmp_path / "some").readable == 2
    with pytest.raises(ValueError, match=r"no episode of 'robot' is wanted: it failed \(3 "):
        encode(some[:3], tmp_path / "none")
    nowhere = replace(episodes[0], ranges=((10**12, 10**13),))
    with pytest.raises(ValueError, match="do not overlap in time within the ranges"):
        cut_episode(nowhere, ROBOT, CLIP, POLICY_IO)
    for wrong in (((5, 5),), ((5, 9), (8, 10)), ((9, 5),)):
        with pytest.raises(ValueError, match="in order of time, and not overlap"):
            replace(episodes[0], ranges=wrong)


def test_many_bad_episodes_stop_the_job_early(tmp_path):
    episodes = [episode(i, reader=Frames if i % 4 else BrokenFrames) for i in range(40)]
    opened = []

    class Counted(list):
        def __getitem__(self, index):
            opened.append(index)
            return super().__getitem__(index)

    with pytest.raises(TooManyBad, match=r"6 of 21 episodes of 'robot'.* and 3 more"):
        encode(Counted(episodes), tmp_path)
    assert max(opened) < 30
    with pytest.raises(TooManyBad):  # what was finished counts when it goes on
        encode(episodes, tmp_path, max_bad_share=0.2)


def test_an_episode_with_non_finite_numbers_is_bad(tmp_path):
    episodes = [episode(i) for i in range(3)]
    episodes[1].streams["action"].values[7, 2] = np.nan
    dataset = encode(episodes, tmp_path, max_bad_share=0.5)
    assert [(bad["id"], "actions" in bad["reason"]) for bad in dataset.skipped] == [
        ("episode 1", True)
    ]


def test_a_single_episode_without_a_stream_is_bad(tmp_path):
    episodes = [episode(0), episode(1, acting=False), episode(2)]
    dataset = encode(episodes, tmp_path, max_bad_share=0.5)
    assert [bad["id"] for bad in dataset.skipped] == ["episode 1"]


def test_an_episode_whose_columns_may_mean_something_else_is_bad(tmp_path):
    """The same columns of streams of other shapes are not the same numbers."""
    episodes = [episode(i) for i in range(4)]
    for i, shape in ((1, (5,)), (2, (1, 4)), (3, (2, 2))):  # [1, 4] is [4]
        old = episodes[i].streams["action"]
        values = np.resize(old.values, (len(old.timestamps), *shape))
        streams = {**episodes[i].streams, "action": Stream(old.timestamps, values)}
        episodes[i] = replace(episodes[i], streams=streams)
    part = dict(stream="action", columns=(0, 1, 2, 3))
    dataset = ConfigDict(dict(ROBOT.to_dict(), action=(part,)))
    records = encode(episodes, tmp_path, dataset, max_bad_share=0.5)
    assert [bad["id"] for bad in records.skipped] == ["episode 1", "episode 3"]
    assert "action has the shape [5], but [4] in the episode episode 0" in str(records.skipped)


def test_configs_that_do_not_fit_stop_the_job(tmp_path):
    with pytest.raises(StreamMismatch, match=r"\['action', 'state'\].*\['front'\]"):
        encode([episode(0, acting=False)], tmp_path / "a")
    wide = POLICY_IO.copy_and_resolve_references()
    wide.action.dim = 7
    with pytest.raises(StreamMismatch, match="4 dimensions, but policy_io says 7"):
        cut_episode(episode(0), ROBOT, CLIP, wide)
    timeless = replace(episode(0), unknown_rate="a.hdf5 does not say how many steps a second has")
    with pytest.raises(StreamMismatch, match=r"a\.hdf5 does not say"):
        encode([timeless], tmp_path / "c")
    short = CLIP.copy_and_resolve_references()
    short.future_frames = 7
    with pytest.raises(ValueError, match="future_frames"):
        encode([episode(0)], tmp_path / "b", clip=short)


def _some_broken(*broken):
    return [episode(i, reader=BrokenFrames if i in broken else Frames) for i in range(8)]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_repaired_episodes_are_tried_again_and_only_their_shards_are_made(tmp_path, processes):
    whole = encode(_some_broken(4), tmp_path / "whole", max_bad_share=0.5)
    before = encode(_some_broken(3, 4, 7), tmp_path / "again", max_bad_share=0.5)
    assert len(before.skipped) == 3
    barrier, tokenizers = threading.Barrier(processes), [Tokenizer() for _ in range(processes)]

    def work(process):
        return encode(
            _some_broken(4),  # in the third of four shards, which stays as it is
            tmp_path / "again",
            max_bad_share=0.5,
            tokenizer=tokenizers[process],
            retry_skipped=True,
            process=process,
            processes=processes,
            meet=barrier.wait,
        )

    with ThreadPoolExecutor(processes) as pool:
        for records in pool.map(work, range(processes)):
            assert_same(whole, records)
    assert_same_files(tmp_path / "whole", tmp_path / "again")
    assert sum(t.calls for t in tokenizers) == 8  # two shards of 60 windows, 16 at a time


def test_a_retry_without_repaired_episodes_writes_nothing(tmp_path):
    before = encode(_some_broken(4), tmp_path, max_bad_share=0.5)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert_same(before, encode(_some_broken(4), tmp_path, retry_skipped=True))
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def test_too_many_bad_episodes_can_be_repaired(tmp_path):
    """The limit stops the job when all is read; nothing of that is read again."""
    with pytest.raises(TooManyBad, match=r"2 of 8 .* Repair them and encode with --retry_skipped,"):
        encode(_some_broken(2, 5), tmp_path)
    with pytest.raises(TooManyBad):  # by itself it is not tried again
        encode(_some_broken(), tmp_path)
    some = Tokenizer()
    assert encode(_some_broken(), tmp_path, tokenizer=some, retry_skipped=True).skipped == []
    assert some.calls == 8


def test_a_killed_retry_can_be_continued(tmp_path):
    whole = encode(_some_broken(), tmp_path / "whole")
    encode(_some_broken(1, 6), tmp_path / "again", max_bad_share=0.5)
    with pytest.raises(KeyboardInterrupt):
        encode(
            _some_broken(), tmp_path / "again", tokenizer=Tokenizer(fail_at=6), retry_skipped=True
        )
    with pytest.raises(FileNotFoundError, match="is not finished"):
        RecordDataset(tmp_path / "again")
    assert_same(whole, encode(_some_broken(), tmp_path / "again"))


def test_a_killed_job_continues_and_gives_the_same_records(tmp_path):
    episodes = [episode(i) for i in range(5)]
    whole = encode(episodes, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        encode(episodes, tmp_path / "killed", tokenizer=Tokenizer(fail_at=6))
    assert not (tmp_path / "killed" / "manifest.json").exists()
    # What SIGKILL can leave behind: half a file, and a whole one that was not yet accounted for.
    (tmp_path / "killed" / "shard_00001.arrayrecord.partial").write_bytes(b"half")
    (tmp_path / "killed" / "shard_00002.arrayrecord").write_bytes(b"stale")
    rest = Tokenizer()
    resumed = encode(episodes, tmp_path / "killed", tokenizer=rest)
    assert rest.calls == 6  # the second and third shard: 60 and 30 windows
    assert_same(whole, resumed)
    again = Tokenizer()
    assert_same(whole, encode(episodes, tmp_path / "killed", tokenizer=again))
    assert again.calls == 0
    assert not list((tmp_path / "killed").glob("*.partial"))


def test_a_deleted_shard_is_made_again(tmp_path):
    episodes = [episode(i) for i in range(5)]
    first = encode(episodes, tmp_path / "a")
    encode(episodes, tmp_path / "b")
    (tmp_path / "b" / "shard_00001.arrayrecord").unlink()
    some = Tokenizer()
    assert_same(first, encode(episodes, tmp_path / "b", tokenizer=some))
    assert some.calls == 4
    assert_same_files(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("first", [0, 1])
def test_a_deleted_shard_is_made_again_by_its_process_whichever_comes_first(tmp_path, first):
    """None takes the manifest that is there for the new one, nor waits for one that did."""
    episodes = [episode(i) for i in range(5)]
    whole = encode(episodes, tmp_path / "a")
    encode(episodes, tmp_path / "b")
    (tmp_path / "b" / "shard_00001.npz").unlink()  # of process 1

    def work(process):
        return encode([episode(i) for i in range(5)], tmp_path / "b", process=process, processes=2)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(work, first)
        time.sleep(0.3)
        for records in (pool.submit(work, 1 - first).result(20), one.result(20)):
            assert_same(whole, records)
    assert_same_files(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_work_and_leave_the_same_files(tmp_path, processes):
    episodes = [episode(i) for i in range(9)]
    whole, tokenizers = encode(episodes, tmp_path / "one"), [Tokenizer() for _ in range(processes)]

    def work(process):
        return encode(
            [episode(i) for i in range(9)],
            tmp_path / "many",
            tokenizer=tokenizers[process],
            process=process,
            processes=processes,
        )

    with ThreadPoolExecutor(processes) as pool:
        for records in pool.map(work, range(processes)):
            assert_same(whole, records)
    assert_same_files(tmp_path / "one", tmp_path / "many")
    once = Tokenizer()
    encode(episodes, tmp_path / "again", tokenizer=once)
    assert all(t.calls for t in tokenizers) and sum(t.calls for t in tokenizers) == once.calls


def test_another_number_of_processes_continues(tmp_path):
    episodes = [episode(i) for i in range(8)]
    encode(episodes, tmp_path / "one")
    for process, calls in ((0, 5), (2, 2)):  # killed; the second of them has not even begun
        with pytest.raises(KeyboardInterrupt):
            encode(
                episodes,
                tmp_path / "many",
                tokenizer=Tokenizer(fail_at=calls),
                process=process,
                processes=3,
            )
    rest = Tokenizer()
    encode(episodes, tmp_path / "many", tokenizer=rest)
    assert_same_files(tmp_path / "one", tmp_path / "many")
    assert rest.calls == 12  # one of four shards was finished


def test_killed_anywhere_and_resumed_gives_the_same_bytes(tmp_path):
    """A real process and SIGKILL, at moments that the clock chooses; it waits for a late one."""
    for seen in ("shard_00000.npz", "shard_00002.arrayrecord.partial", "shard_00003.npz"):
        with Program("encode_toys", tmp_path / "killed", seen) as process:
            while not (tmp_path / "killed" / seen).exists():
                assert process.poll() is None, process.err
                time.sleep(0.002)
    assert not (tmp_path / "killed" / "manifest.json").exists()
    for name in ("whole", "killed"):
        encode([episode(i) for i in range(12)], tmp_path / name)
    assert_same_files(tmp_path / "whole", tmp_path / "killed")


def _sample(*sources, episodes=3, **options):
    options = dict(episodes_per_source=episodes, clips_per_episode=4) | options
    return list(sample_clips(sources, CLIP, POLICY_IO, **options))


def test_episodes_and_windows_are_spread_evenly_over_every_source():
    robot = [episode(i) for i in range(5)]
    human = [episode(10 + i, acting=False) for i in range(2)]
    clips = _sample((robot, ROBOT), (human, HUMAN))
    assert len(clips) == 5
    for ours, (source, dataset) in zip(clips, [(robot[i], ROBOT) for i in (0, 2, 4)]):
        cuts = cut_episode(source, dataset, CLIP, POLICY_IO)
        theirs = cuts.video.frames[cuts.video.clips[[0, 9, 19, 29]]].astype(np.float32) / 127.5 - 1
        np.testing.assert_array_equal(ours, theirs)
    short = _sample(([episode(0, n=3)], ROBOT))  # has fewer windows than are wanted
    assert short[0].shape == (3, 13, 16, 16, 3)


def test_broken_episodes_are_named_and_left_out(capsys):
    episodes = [episode(0), episode(1, reader=BrokenFrames), episode(2)]
    assert len(_sample((episodes, ROBOT), max_bad_share=0.4)) == 2
    assert "skipped episode episode 1: OSError: moov atom not found" in capsys.readouterr().err
    with pytest.raises(TooManyBad, match=r"1 of 3 sampled episodes could not be read.*Repair"):
        _sample((episodes, ROBOT))
    with pytest.raises(StreamMismatch, match="acton"):
        _sample((episodes, ConfigDict(dict(ROBOT.to_dict(), action="acton"))))
