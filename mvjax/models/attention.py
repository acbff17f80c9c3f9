"""Attention: one function for the arithmetic, one module for the projections around it."""

import functools

import jax
from flax import nnx

from mvjax.models.attention_kernels import FEW_LOGITS, Kernel, choose_kernel, cudnn, splash, xla
from mvjax.models.layers import Linear, RMSNorm
from mvjax.models.lora import LoRA
from mvjax.models.remat import ATTENTION
from mvjax.models.rope import rotate
from mvjax.parallel.rules import activation_spec, constrain

Array = jax.Array
KeysValues = tuple[Array, Array]


def attend(
    q_blhd: Array, k_bmhd: Array, v_bmhd: Array, kernel: str = "auto", name: str | None = None
) -> Array:
    """softmax(q kᵀ / √d) v for every head, without mask.

    Under a mesh the query sequence is sharded over `context` and keys and values are gathered,
    so full attention needs no other communication.

    Args:
        q_blhd: queries [batch, queries, heads, head_dim].
        k_bmhd, v_bmhd: keys and values [batch, keys, heads, head_dim].
        kernel: see `attention_kernels.choose_kernel`.
        name: by which a rematerialisation policy may keep the result (`mvjax.models.remat`).

    Returns:
        [batch, queries, heads, head_dim] in the dtype of the queries.
    """
    kernel = choose_kernel(kernel, q_blhd, k_bmhd)
    if kernel == "xla":
        q = constrain(q_blhd, "batch", "length", "heads", None)
        k = constrain(k_bmhd, "batch", None, "heads", None)
        v = constrain(v_bmhd, "batch", None, "heads", None)
        return xla(q, k, v, name)
    on_device = functools.partial({"cudnn": cudnn, "splash": splash}[kernel], name=name)
    return on_shards(on_device, q_blhd, k_bmhd, v_bmhd)


def on_shards(kernel: Kernel, q_blhd: Array, k_bmhd: Array, v_bmhd: Array) -> Array:
    """A kernel for one device on every device's share of `attend`'s arguments.

    The compiler cannot split such a kernel: each device calls it with its samples, heads and
    queries, and with all keys and values of those, gathered over `context`. The gradients of keys
    and values are summed and scattered on the way back.
    """
    axes = ("batch", "length", "heads", None)
    queries, keys = (activation_spec(x.shape, *axes) for x in (q_blhd, k_bmhd))
    if queries is None:
        return kernel(q_blhd, k_bmhd, v_bmhd)

    def local(q, k, v):
        if keys[1] is not None:
            k, v = (jax.lax.all_gather(x, keys[1], axis=1, tiled=True) for x in (k, v))
        return kernel(q, k, v)

    # Pallas kernels do not say over which axes their results vary, so it is not checked.
    shards = jax.shard_map(
        local, in_specs=(queries, keys, keys), out_specs=queries, check_vma=False
    )
    return shards(q_blhd, k_bmhd, v_bmhd)


def check_context(tokens: int) -> None:
    """Raises ValueError if a long sequence cannot be split over the mesh axis `context`.

    It would be left whole, and every device would do the work of all.
    """
    ways = jax.sharding.get_abstract_mesh().shape.get("context", 1)
    if tokens % ways and tokens**2 > FEW_LOGITS:
        divisors = ", ".join(str(n) for n in range(1, 4 * ways) if tokens % n == 0)
        raise ValueError(
            f"{tokens} tokens cannot be split over context={ways} devices; set config.mesh.context "
            f"to a divisor of the tokens ({divisors}, ...)."
        )


class Attention(nnx.Module):
    """Multi-head attention with RMS-normalised queries and keys, no biases.

    Args:
        key: PRNG key of the initialisation.
        d: width of the queries and of the output.
        d_context: width of what keys and values are read from (`d` for self-attention).
        num_heads: number of heads; `d` is split evenly among them.
        lora: adapters on q_proj, k_proj, v_proj, output_proj where targeted.
        kernel: see `attention_kernels.choose_kernel`.
        kept: whether rematerialisation may keep the result. It is as large for a few keys as for
            many, so it should be worth the memory.
    """

    def __init__(
        self,
        key: Array,
        d: int,
        d_context: int,
        num_heads: int,
        lora: LoRA | None = None,
        *,
        kernel: str = "auto",
        kept: bool = True,
    ):
        q, k, v, out = jax.random.split(key, 4)
        self.num_heads = num_heads
        self.kernel, self.name = kernel, ATTENTION if kept else None
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
        y = attend(q, *keys_values, self.kernel, self.name)
        return self.output_proj(y.reshape(*x.shape))
