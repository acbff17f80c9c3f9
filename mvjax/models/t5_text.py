"""Prompts to the text embeddings that the video DiT was trained with."""

from collections.abc import Sequence

import jax
import numpy as np

from mvjax.models.param_tree import Params
from mvjax.models.parameters import Network
from mvjax.models.text_tokenizer import T5Tokenizer

BATCH = 8  # texts per pass; the attention logits of 8 x 512 tokens of t5-11b take 1 GiB
SHORTEST = 64  # tokens per pass at least; an instruction to a robot has 10 to 20


class T5TextEncoder:
    """Embeds texts with a T5 encoder. Same interface as `NgramTextEncoder`.

    A pass is as long as its longest text, rounded up to a power of two (64, 128, ..., length), not
    the published 512 always: padding is masked, so the numbers are the same up to rounding, and
    an instruction costs an eighth. A batch always has 8 rows. So there are a few compilations
    (four for 512), whatever the texts.

    Args:
        network: a `T5Encoder` without weights.
        params: its parameters, on the device, in float32 or bfloat16; sharded or not.
        tokenizer: from `load_t5_tokenizer`; its length becomes the length here.

    Raises:
        ValueError: the tokenizer has more ids than the network has embeddings.
    """

    def __init__(self, network: Network, params: Params, tokenizer: T5Tokenizer):
        if tokenizer.vocab_size > network.config.vocab_size:
            raise ValueError(
                f"The tokenizer has {tokenizer.vocab_size} ids, but the T5 encoder has embeddings "
                f"for {network.config.vocab_size}; use the tokenizer that belongs to the weights."
            )
        self.length, self.dim = tokenizer.length, network.config.width
        self._params, self._tokenizer = params, tokenizer
        self._forward = jax.jit(lambda params, *inputs: network.bind(params)(*inputs))

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts: float32 [n, length, dim], zeros past a text's end."""
        out = np.zeros((len(texts), self.length, self.dim), np.float32)
        for start in range(0, len(texts), BATCH):
            rows = out[start : start + BATCH]
            tokens, mask = self._tokenizer(texts[start : start + BATCH])
            length = self._padded_length(mask.sum(axis=1).max())
            fill = ((0, BATCH - len(rows)), (0, 0))
            inputs = (np.pad(x[:, :length], fill) for x in (tokens, mask))
            rows[:, :length] = np.asarray(self._forward(self._params, *inputs))[: len(rows)]
        return out

    def _padded_length(self, longest: int) -> int:
        return min(self.length, max(SHORTEST, 1 << (int(longest) - 1).bit_length()))
