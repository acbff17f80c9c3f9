"""Clips for fitting a video tokenizer: a fixed sample of windows from every dataset."""

from collections.abc import Iterator, Sequence

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from data_pipelines.episode import BadShare, Episode
from mvjax.encode import LEAST_EPISODES, EpisodeCutter, count, say_skipped


def sample_clips(
    sources: Sequence[tuple[Sequence[Episode], ConfigDict]],
    clip: ConfigDict,
    policy_io: ConfigDict,
    *,
    episodes_per_source: int,
    clips_per_episode: int,
    max_bad_share: float = 0.05,
) -> Iterator[np.ndarray]:
    """Yields the clips of one episode at a time, evenly spread over every source.

    Episodes that cannot be read are reported and left out, as in the encoding job.

    Args:
        sources: pairs of episodes and their dataset's config section.
        clip, policy_io: as for `encode_dataset`.
        episodes_per_source: episodes read from each source, evenly spaced.
        clips_per_episode: windows taken from each, evenly spaced.
        max_bad_share: share of unreadable episodes among them that is too much.

    Yields:
        float32 [n, frames, h, w, 3] in [-1, 1].

    Raises:
        StreamMismatch: if a config does not fit its episodes.
        TooManyBad: if more than `max_bad_share` cannot be read.
    """
    bad = BadShare(max_bad_share, "sampled episodes", LEAST_EPISODES, "Repair them")
    cutters = [
        EpisodeCutter(episodes, dataset, clip, policy_io, None, None, 0.0)
        for episodes, dataset in sources
    ]
    chosen = [
        (cut, int(i))
        for cut in cutters
        for i in np.linspace(0, len(cut.episodes) - 1, min(episodes_per_source, len(cut.episodes)))
    ]
    with tqdm(chosen, desc="fit tokenizer", unit="episode") as progress:
        for cut, index in progress:
            row, windows = cut(index)
            say_skipped(row, progress)
            count(row, bad)
            rows = set(np.linspace(0, row["count"] - 1, clips_per_episode).astype(int))
            clips = [frames for n, (frames, _) in enumerate(windows) if n in rows]
            if clips:
                yield np.stack(clips).astype(np.float32) / 127.5 - 1
    bad.check()
