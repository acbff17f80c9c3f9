"""adaLN-LoRA: how the noise level steers every sublayer."""

import jax
import jax.numpy as jnp
from flax import nnx

from mvjax.models.layers import Linear, layer_norm, silu, zeros

Array = jax.Array


class Modulation(nnx.Module):
    """SiLU → Linear(d_embedding → rank) → Linear(rank → chunks · d), plus the shared term.

    The second kernel starts at zero; the gates are nevertheless not zero at the start, because
    the term shared by all sublayers is not (Cosmos-Predict2, `use_adaln_lora`).
    """

    def __init__(self, key: Array, d_embedding: int, d: int, rank: int, chunks: int):
        keys = jax.random.split(key)
        self.chunks = chunks
        self.down = Linear(keys[0], d_embedding, rank, ("embed", None))
        self.up = Linear(keys[1], rank, chunks * d, (None, "embed"), init=zeros)

    def __call__(self, embedding: Array, shared: Array) -> list[Array]:
        """Shift, scale and (with three chunks) gate, each [b, t, d].

        Args:
            embedding: time embedding [b, t, d_embedding].
            shared: the term all sublayers share [b, t, 3 d]; its first chunks are used.
        """
        m = self.up(self.down(silu(embedding)))
        return jnp.split(m + shared[..., : m.shape[-1]], self.chunks, axis=-1)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """LN(x) · (1 + scale) + shift."""
    return layer_norm(x) * (1 + scale) + shift
