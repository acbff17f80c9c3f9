"""One episode of the encoding job as its row of the manifest and its windows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.clips import EpisodeWindows, StreamMismatch, cut_episode
from data_pipelines.encoding.shard import Row, Window
from data_pipelines.encoding.text_table import StoredTexts, TextEncoder
from data_pipelines.episode import Episode
from data_pipelines.selection import split_of


@dataclass
class EpisodeCutter:
    """Cuts episodes by their number; one that cannot be read has a reason and no windows.

    Attributes:
        episodes: the source.
        dataset, clip, policy_io, anchor_fps: of `cut_episode`.
        text_encoder: instructions to embeddings; one that finds them in the episodes is asked here.
        validation_share: share of the episodes in the validation split.
        config_fits: some episode has shown that the config fits this dataset. Before, a stream that
            is not as the config says is the config's fault and stops the job; then the episode's.
    """

    episodes: Sequence[Episode]
    dataset: ConfigDict
    clip: ConfigDict
    policy_io: ConfigDict
    anchor_fps: float | None
    text_encoder: TextEncoder | StoredTexts | None
    validation_share: float
    config_fits: bool = False

    def __call__(self, index: int) -> tuple[Row, Iterator[Window]]:
        """The row and the windows of an episode.

        Raises:
            StreamMismatch: if the config does not fit it, and did not yet fit any other.
        """
        row: Row = {"id": f"number {index}", "instructions": [], "count": 0}
        cuts = None
        try:
            episode = self.episodes[index]
            row["id"], row["instructions"] = episode.id, list(episode.instructions) or [""]
            cuts = self._cut(episode, row["instructions"])
        except Exception as error:  # decoders raise types of their own
            if isinstance(error, StreamMismatch) and not self.config_fits:
                raise
            row["reason"] = f"{type(error).__name__}: {error}"
        row["split"] = split_of(row["id"], self.validation_share)
        if cuts is None:
            return row, iter(())
        self.config_fits = True
        row |= {"count": len(cuts.clips), "digest": cuts.digest()}
        return row, _windows(index, cuts, len(row["instructions"]))

    def _cut(self, episode: Episode, instructions: Sequence[str]) -> EpisodeWindows:
        if isinstance(self.text_encoder, StoredTexts):
            for text in instructions:  # what is missing is noticed here, not at the end
                self.text_encoder.embedding(episode, text)
        cuts = cut_episode(episode, self.dataset, self.clip, self.policy_io, self.anchor_fps)
        for name, column in cuts.columns.items():
            if not np.all(np.isfinite(column)):
                raise ValueError(f"{name} hold numbers that are not finite (NaN or infinity)")
        return cuts


def _windows(index: int, cuts: EpisodeWindows, texts: int) -> Iterator[Window]:
    for i, shown in enumerate(cuts.clips):
        numbers = {name: column[i] for name, column in cuts.columns.items()}
        # Windows of an episode with several instructions take them in turn.
        numbers |= {"episode": np.int64(index), "text": np.int64(i % texts)}
        yield cuts.frames[shown], numbers
