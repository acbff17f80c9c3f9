"""The episode of a number as the encoding job takes it: a row, and windows or why there are none.

`sample_clips` yields some windows of every dataset, to which a linear tokenizer is fitted.
"""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product, starmap
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.augment import Augment, without_augment
from data_pipelines.cutting import (
    EpisodeWindows,
    StreamMismatch,
    check_finite,
    cut_episode,
    vector_streams,
)
from data_pipelines.episode import BadShare, Episode, split_of
from data_pipelines.progress import Bar
from data_pipelines.shards import Row, StoredTexts, TextEncoder, count

# View -> its pictures uint8 [t, h, w, 3], and the numeric columns.
Window = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]

# That augment pictures. With 61 frames of 480x640, each holds up to 200 MB.
_THREADS = min(8, os.cpu_count() or 1)
LEAST_EPISODES = 20  # read before the share of bad ones may stop the job


@dataclass
class EpisodeCutter:
    """Cuts the episode of a number into windows; one that cannot be read has a reason and none.

    Attributes:
        episodes: The source.
        dataset, clip, policy_io, anchor_fps: As of `cut_episode`.
        text_encoder: Instructions to embeddings; stored ones are checked here.
        validation_share: Share of the episodes in the validation split.
        config_fits: Some episode has shown that the config fits this dataset. Before that, a stream
            that differs from the config is a mistake in the config and stops the job; afterwards
            it makes the episode a bad one.
    """

    episodes: Sequence[Episode]
    dataset: ConfigDict
    clip: ConfigDict
    policy_io: ConfigDict
    anchor_fps: float | None
    text_encoder: TextEncoder | StoredTexts | None
    validation_share: float
    config_fits: bool = False
    # Of the streams in the vectors: the first episode's id, and the shape there without ones.
    _shapes: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)

    def __call__(self, index: int) -> tuple[Row, Iterator[Window]]:
        """The row and the windows of an episode; StreamMismatch if the config fitted none yet.

        The variants of a window follow each other, and `count` in the row counts them once.
        """
        row: Row = {"id": f"number {index}", "instructions": [], "count": 0}
        cuts, findings = None, []
        try:
            episode = self.episodes[index]
            row["id"] = episode.id
            findings += episode.findings
            if not episode.unwanted:
                row["instructions"] = list(episode.instructions) or [""]
                cuts = self.windows(episode)
                findings += cuts.findings
        except Exception as error:  # decoders raise types of their own
            if isinstance(error, StreamMismatch) and not self.config_fits:
                raise
            row["reason"] = f"{type(error).__name__}: {error}"
        row["split"] = split_of(row["id"], self.validation_share)
        if findings:
            row["findings"] = findings
        if cuts is None:
            return row, iter(())
        self.config_fits = True
        row |= {"count": len(cuts.texts), "digest": cuts.digest()}
        return row, _windows(index, cuts, Augment.of(self.dataset).variants)

    def windows(self, episode: Episode) -> EpisodeWindows:
        """The windows of an episode; ValueError if it cannot be used."""
        if isinstance(self.text_encoder, StoredTexts):  # or it would raise at the end of the job
            self.text_encoder.check(episode)
        settings = self.dataset, self.clip, self.policy_io, self.anchor_fps
        cuts = cut_episode(episode, *settings, variants=True)
        check_finite(cuts.columns)
        self._check_shapes(episode)
        return cuts

    def _check_shapes(self, episode: Episode) -> None:
        """ValueError if numbers have another shape than before: columns would mean others."""
        for name in vector_streams(self.dataset):
            here = tuple(n for n in episode.streams[name].values.shape[1:] if n != 1)
            first, shape = self._shapes.setdefault(name, (episode.id, here))
            if shape != here:
                raise ValueError(
                    f"{name} has the shape {list(here)}, but {list(shape)} in the episode {first}, "
                    "so its columns may mean something else"
                )


def _windows(index: int, cuts: EpisodeWindows, variants: int) -> Iterator[Window]:
    shown = product(range(len(cuts.texts)), range(variants))
    made = starmap(cuts.pictures, shown) if variants == 1 else _ahead(cuts.pictures, shown)
    for i, text in enumerate(cuts.texts):
        numbers = {name: column[i] for name, column in cuts.columns.items()}
        numbers |= {"episode": np.int64(index), "text": text}
        for _ in range(variants):
            yield next(made), numbers


def _ahead(function: Callable[..., Any], tasks: Iterable[tuple]) -> Iterator[Any]:
    """As `starmap`, some tasks ahead: Pillow changes pictures outside the interpreter's lock."""
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting = deque()
        for task in tasks:
            waiting.append(pool.submit(function, *task))
            if len(waiting) > _THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def report_skipped(row: Row, progress: Bar) -> None:
    """Prints why an episode was skipped, above the progress bar."""
    if "reason" in row:
        progress.write(f"skipped episode {row['id']}: {row['reason']}", file=sys.stderr)


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

    Episodes that cannot be read are reported and left out, as in the encoding job. Pictures are
    not augmented, so that a tokenizer does not depend on it.

    Args:
        sources: Pairs of episodes and their dataset's config section.
        clip, policy_io: As for `encode_dataset`.
        episodes_per_source: Episodes read from each source, evenly spaced.
        clips_per_episode: Windows taken from each, evenly spaced.
        max_bad_share: Highest permitted share of unreadable episodes among them.

    Yields:
        float32 [n, frames, h, w, 3] in [-1, 1], of one view after the other.

    Raises:
        StreamMismatch: If a config does not fit its episodes.
        TooManyBad: If more than `max_bad_share` cannot be read.
    """
    bad = BadShare(max_bad_share, "sampled episodes", LEAST_EPISODES, "Repair them")
    cutters = [
        EpisodeCutter(episodes, without_augment(dataset), clip, policy_io, None, None, 0.0)
        for episodes, dataset in sources
    ]
    chosen = [
        (cut, int(i))
        for cut in cutters
        for i in np.linspace(0, len(cut.episodes) - 1, min(episodes_per_source, len(cut.episodes)))
    ]
    with Bar(chosen, desc="fit tokenizer", unit="episode") as progress:
        for cut, index in progress:
            row, windows = cut(index)
            report_skipped(row, progress)
            count(row, bad)
            rows = set(np.linspace(0, row["count"] - 1, clips_per_episode).astype(int))
            chosen = [pictures for n, (pictures, _) in enumerate(windows) if n in rows]
            for name in chosen[0] if chosen else ():
                clips = np.stack([pictures[name] for pictures in chosen])
                yield clips.astype(np.float32) / 127.5 - 1
    bad.check()
