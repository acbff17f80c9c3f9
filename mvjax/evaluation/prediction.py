"""Predicted against true future: pairs of videos for held-out episodes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.clips import cut_episode
from data_pipelines.episode import Episode
from data_pipelines.video import write_video
from mvjax.evaluation.held_out import held_out_episodes
from mvjax.policy.observation import Observation
from mvjax.policy.policy import Policy

UPSCALE = 3  # tiny frames are hard to look at; every pixel becomes 3x3


def write_predictions(
    policy: Policy,
    episodes: Sequence[Episode],
    dataset: ConfigDict,
    config: ConfigDict,
    folder: Path,
    count: int,
) -> None:
    """Writes `<name>_predicted.mp4` and `<name>_true.mp4` of `count` validation episodes.

    The clip starts a third into the episode: observed frames first, then the fully denoised
    future, or the true one.

    Args:
        policy: supplies the video model; its resolution is the videos'.
        episodes: the dataset's episodes.
        dataset: its config section.
        config: `clip`, `policy_io`, `validation_share`.
        folder: where the videos go.
        count: how many pairs, spread over the held-out episodes.
    """
    held_out = list(held_out_episodes(episodes, dataset, config.validation_share))
    chosen = np.linspace(0, len(held_out) - 1, min(count, len(held_out))).astype(int)
    folder.mkdir(parents=True, exist_ok=True)
    observed = config.clip.observed_frames
    for episode in (episodes[held_out[i]] for i in chosen):
        cuts = cut_episode(episode, dataset, config.clip, config.policy_io)
        true = cuts.frames[cuts.clips[len(cuts.clips) // 3]]
        proprio = np.zeros((config.policy_io.proprio.horizon, config.policy_io.proprio.dim))
        query = Observation(true[:observed], proprio.astype(np.float32), episode.instructions[0])
        predicted = policy.predict_video([query])[0]
        for kind, frames in (("predicted", predicted), ("true", true)):
            large = frames.repeat(UPSCALE, axis=1).repeat(UPSCALE, axis=2)
            name = f"{episode.instructions[0].replace(' ', '_')}_{episode.id}_{kind}.mp4"
            write_video(folder / name, large, fps=max(round(config.clip.fps / 4), 1), crf=18)
