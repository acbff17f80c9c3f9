"""A text encoder without weights: hashed character n-grams, the stand-in for T5."""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np


class NgramTextEncoder:
    """One token per word: the normalised sum of the pseudo-random ±1 vectors of its n-grams.

    Words with common pieces ("drawer", "drawers") get similar vectors; the same text gives the
    same numbers on every machine. Same interface as T5: padding is zeros.

    Args:
        length: tokens per text; longer texts are cut.
        dim: width of a token, a multiple of 8.
    """

    def __init__(self, length: int, dim: int):
        if dim % 8 or not 8 <= dim <= 512:
            raise ValueError(
                f"The n-gram encoder's dim must be a multiple of 8 up to 512, got {dim}."
            )
        self.length, self.dim = length, dim

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts: float32 [n, length, dim], zeros past a text's end."""
        out = np.zeros((len(texts), self.length, self.dim), np.float32)
        for row, text in zip(out, texts):
            for token, word in zip(row, text.lower().split()):
                token[:] = self._word(word.strip(".,;:!?\"'"))
        return out

    def _word(self, word: str) -> np.ndarray:
        marked = f"<{word}>"
        grams = {marked} | {marked[i : i + n] for n in (3, 4) for i in range(len(marked) - n + 1)}
        return sum(self._gram(gram) for gram in grams) / np.sqrt(len(grams))

    def _gram(self, gram: str) -> np.ndarray:
        digest = blake2b(gram.encode(), digest_size=self.dim // 8).digest()
        bits = np.unpackbits(np.frombuffer(digest, np.uint8))
        return bits.astype(np.float32) * 2 - 1
