"""Clips for fitting a video tokenizer: a fixed sample of windows from every dataset."""

from collections.abc import Iterator, Sequence

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from data_pipelines.clips import cut_episode
from data_pipelines.episode import Episode


def sample_clips(
    sources: Sequence[tuple[Sequence[Episode], ConfigDict]],
    clip: ConfigDict,
    policy_io: ConfigDict,
    *,
    episodes_per_source: int,
    clips_per_episode: int,
) -> Iterator[np.ndarray]:
    """Yields the clips of one episode at a time, evenly spread over every source.

    Args:
        sources: pairs of episodes and their dataset's config section.
        clip, policy_io: as for `encode_dataset`.
        episodes_per_source: episodes read from each source, evenly spaced.
        clips_per_episode: windows taken from each, evenly spaced.

    Yields:
        float32 [n, frames, h, w, 3] in [-1, 1].
    """
    chosen = [
        (episodes, dataset, int(i))
        for episodes, dataset in sources
        for i in np.linspace(0, len(episodes) - 1, min(episodes_per_source, len(episodes)))
    ]
    for episodes, dataset, i in tqdm(chosen, desc="fit tokenizer", unit="episode"):
        cuts = cut_episode(episodes[i], dataset, clip, policy_io)
        rows = np.linspace(0, len(cuts.clips) - 1, clips_per_episode).astype(int)
        yield cuts.frames[cuts.clips[np.unique(rows)]].astype(np.float32) / 127.5 - 1
