"""From the few numbers of an action or of proprioception to the width of the action decoder."""

from functools import partial
from itertools import pairwise
from math import log, sqrt

import jax
from flax import nnx

from mvjax.models.layers import Linear, gelu, kaiming_uniform

Array = jax.Array


def embedder_widths(d_in: int, d: int) -> list[int]:
    """Widths of an embedder's layers, about ×4 each from `d_in` to `d` (release, `target_mult`)."""
    ratio = d / d_in
    hops = max(1, round(log(ratio, 4)))
    widths = [d_in]
    for _ in range(hops - 1):
        widths.append(round(widths[-1] * ratio ** (1 / hops)))
    return [*widths, d]


class Embedder(nnx.Module):
    """Lifts actions or proprioception to the width: linears with GELU between, times 1/√d.

    Kernels start uniform, with the gain of a ReLU but for the last (the release, `ActionEmbedder`).
    """

    def __init__(self, key: Array, d_in: int, d: int):
        widths = embedder_widths(d_in, d)
        self.d, self.depth = d, len(widths) - 1
        for i, sizes in enumerate(pairwise(widths)):
            init = partial(kaiming_uniform, gain=1.0 if i == self.depth - 1 else sqrt(2))
            layer_key = jax.random.fold_in(key, i)
            layer = Linear(layer_key, *sizes, (None, None), bias=True, init=init)
            setattr(self, f"layer{i}", layer)

    def __call__(self, x: Array) -> Array:
        """Maps [b, n, d_in] to [b, n, d]."""
        for i in range(self.depth):
            x = getattr(self, f"layer{i}")(gelu(x) if i else x)
        return x * self.d**-0.5
