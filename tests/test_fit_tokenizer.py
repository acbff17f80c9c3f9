"""The sample of clips that a tokenizer is fitted to."""

import numpy as np
import pytest
from encode_toys import CLIP, HUMAN, POLICY_IO, ROBOT, BrokenFrames, episode
from ml_collections import ConfigDict

from data_pipelines.clips import StreamMismatch, cut_episode
from data_pipelines.episode import TooManyBad
from mvjax.encode import sample_clips


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
        theirs = cuts.frames[cuts.clips[[0, 9, 19, 29]]].astype(np.float32) / 127.5 - 1
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
