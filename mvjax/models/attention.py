"""Attention: one function for the arithmetic, one module for the projections around it."""

import jax
from flax import nnx

from mvjax.models.layers import Linear, RMSNorm
from mvjax.models.lora import LoRA
from mvjax.models.rope import rotate
from mvjax.parallel.rules import constrain

Array = jax.Array
KeysValues = tuple[Array, Array]


def attend(q_blhd: Array, k_bmhd: Array, v_bmhd: Array) -> Array:
    """softmax(q kᵀ / √d) v for every head, without mask.

    Under a mesh the query sequence is sharded over `context` and keys and values are gathered,
    so full attention needs no other communication.

    Args:
        q_blhd: queries [batch, queries, heads, head_dim].
        k_bmhd, v_bmhd: keys and values [batch, keys, heads, head_dim].

    Returns:
        [batch, queries, heads, head_dim] in the dtype of the queries.
    """
    q = constrain(q_blhd, "batch", "length", "heads", None)
    k = constrain(k_bmhd, "batch", None, "heads", None)
    v = constrain(v_bmhd, "batch", None, "heads", None)
    return jax.nn.dot_product_attention(q, k, v, implementation="xla")


class Attention(nnx.Module):
    """Multi-head attention with RMS-normalised queries and keys, no biases.

    Args:
        key: PRNG key of the initialisation.
        d: width of the queries and of the output.
        d_context: width of what keys and values are read from (`d` for self-attention).
        num_heads: number of heads; `d` is split evenly among them.
        lora: adapters on q_proj, k_proj, v_proj, output_proj where targeted.
    """

    def __init__(
        self, key: Array, d: int, d_context: int, num_heads: int, lora: LoRA | None = None
    ):
        q, k, v, out = jax.random.split(key, 4)
        self.num_heads = num_heads
        self.q_proj = Linear(q, d, d, ("embed", "heads"), name="q_proj", lora=lora)
        self.k_proj = Linear(k, d_context, d, ("embed", "heads"), name="k_proj", lora=lora)
        self.v_proj = Linear(v, d_context, d, ("embed", "heads"), name="v_proj", lora=lora)
        self.output_proj = Linear(out, d, d, ("heads", "embed"), name="output_proj", lora=lora)
        self.q_norm = RMSNorm(d // num_heads)
        self.k_norm = RMSNorm(d // num_heads)

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.num_heads, -1)

    def keys_values(self, context: Array, rope: tuple[Array, Array] | None = None) -> KeysValues:
        """Keys and values [b, m, heads, head_dim] of a context [b, m, d_context]."""
        k = self.k_norm(self._heads(self.k_proj(context)))
        if rope is not None:
            k = rotate(k, *rope)
        return k, self._heads(self.v_proj(context))

    def __call__(
        self, x: Array, keys_values: KeysValues, rope: tuple[Array, Array] | None = None
    ) -> Array:
        """Attends from `x` [b, l, d] to precomputed keys and values; returns [b, l, d]."""
        q = self.q_norm(self._heads(self.q_proj(x)))
        if rope is not None:
            q = rotate(q, *rope)
        y = attend(q, *keys_values)
        return self.output_proj(y.reshape(*x.shape))
