"""Where the embeddings of the instructions come from: a text encoder, or the dataset itself."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from data_pipelines.episode import Episode

_BATCH = 64


class TextEncoder(Protocol):
    """Maps n instructions to float32 [n, length, dim], zeros past the text's end."""

    def encode(self, texts: list[str]) -> np.ndarray:
        """Embeddings."""
        ...


class StoredTexts:
    """In place of a text encoder: the embeddings that the dataset holds (`Episode.embeddings`)."""

    def __init__(self, length: int, dim: int):
        """Takes the size of the padded table: `config.text`."""
        self._length, self._dim = length, dim
        self.identity = f"stored {length}x{dim}"

    def embedding(self, episode: Episode, text: str) -> np.ndarray:
        """Of an instruction of an episode: float32 [length, dim], zeros past the text's end.

        Raises:
            ValueError: if the episode has none, or one of another size.
        """
        where = f"episode {episode.id!r} of {episode.source!r}"
        if text not in episode.embeddings:
            raise ValueError(
                f"{where} stores no embedding of its instruction {text!r}; name a text encoder as "
                "config.text_encoder instead of 'stored'"
            )
        stored = np.asarray(episode.embeddings[text], np.float32)
        if stored.ndim != 2 or stored.shape[1] != self._dim or len(stored) > self._length:
            raise ValueError(
                f"{where} stores an embedding of shape {list(stored.shape)}, but config.text has "
                f"length {self._length} and dim {self._dim}"
            )
        return np.pad(stored, ((0, self._length - len(stored)), (0, 0)))


def embed(
    instructions: Mapping[str, int], encoder: TextEncoder | StoredTexts, episodes: Sequence[Episode]
) -> np.ndarray:
    """The embeddings of distinct instructions.

    Args:
        instructions: each with the number of an episode that has it.
        encoder: where they come from.
        episodes: the source; only read for stored ones.

    Returns:
        float32 [n, length, dim].
    """
    if isinstance(encoder, StoredTexts):
        return np.stack([encoder.embedding(episodes[i], text) for text, i in instructions.items()])
    texts = list(instructions)
    groups = [texts[i : i + _BATCH] for i in range(0, len(texts), _BATCH)]
    return np.concatenate([np.asarray(encoder.encode(group), np.float32) for group in groups])
