"""Episodes that cannot be encoded: left out, counted, named, and tried again when repaired."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from encode_toys import (
    CLIP,
    POLICY_IO,
    ROBOT,
    BrokenFrames,
    Frames,
    Tokenizer,
    assert_same,
    assert_same_files,
    encode,
    episode,
)

from data_pipelines.clips import StreamMismatch, cut_episode
from data_pipelines.episode import TooManyBad
from data_pipelines.records import RecordDataset


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


def test_numbers_that_are_not_finite_spoil_their_episode(tmp_path):
    episodes = [episode(i) for i in range(3)]
    episodes[1].streams["action"].values[7, 2] = np.nan
    dataset = encode(episodes, tmp_path, max_bad_share=0.5)
    assert [(bad["id"], "actions" in bad["reason"]) for bad in dataset.skipped] == [
        ("episode 1", True)
    ]


def test_an_episode_that_alone_lacks_a_stream_is_bad_not_the_config(tmp_path):
    episodes = [episode(0), episode(1, acting=False), episode(2)]
    dataset = encode(episodes, tmp_path, max_bad_share=0.5)
    assert [bad["id"] for bad in dataset.skipped] == ["episode 1"]


def test_configs_that_do_not_fit_stop_the_job(tmp_path):
    with pytest.raises(StreamMismatch, match=r"\['action', 'state'\].*\['front'\]"):
        encode([episode(0, acting=False)], tmp_path / "a")
    wide = POLICY_IO.copy_and_resolve_references()
    wide.action.dim = 7
    with pytest.raises(StreamMismatch, match="4 dimensions, but policy_io says 7"):
        cut_episode(episode(0), ROBOT, CLIP, wide)
    short = CLIP.copy_and_resolve_references()
    short.future_frames = 7
    with pytest.raises(ValueError, match="12 together"):
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


def test_nothing_is_made_again_where_nothing_was_repaired(tmp_path):
    before = encode(_some_broken(4), tmp_path, max_bad_share=0.5)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert_same(before, encode(_some_broken(4), tmp_path, retry_skipped=True))
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def test_too_many_bad_ones_can_be_repaired(tmp_path):
    """The limit stops the job when all is read; nothing of that is read again."""
    with pytest.raises(TooManyBad, match=r"2 of 8 .* Repair them and encode with --retry_skipped,"):
        encode(_some_broken(2, 5), tmp_path)
    with pytest.raises(TooManyBad):  # by itself it is not tried again
        encode(_some_broken(), tmp_path)
    some = Tokenizer()
    assert encode(_some_broken(), tmp_path, tokenizer=some, retry_skipped=True).skipped == []
    assert some.calls == 8


def test_a_retry_that_is_killed_goes_on(tmp_path):
    whole = encode(_some_broken(), tmp_path / "whole")
    encode(_some_broken(1, 6), tmp_path / "again", max_bad_share=0.5)
    with pytest.raises(KeyboardInterrupt):
        encode(
            _some_broken(), tmp_path / "again", tokenizer=Tokenizer(fail_at=6), retry_skipped=True
        )
    with pytest.raises(FileNotFoundError, match="is not finished"):
        RecordDataset(tmp_path / "again")
    assert_same(whole, encode(_some_broken(), tmp_path / "again"))
