"""Attention, without a mask: which kernel computes it, how the kernel is sharded, and the module.

In this order: `attend`, the one function that networks call; `on_shards`, a kernel's sharding; the
kernels of each backend and the choice among them; the module `Attention`.

"xla" writes the logits of every query and key to memory; "cudnn" (NVIDIA GPUs) and "splash" (TPUs)
keep them on the chip, which is what makes tens of thousands of tokens possible.
"""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from mvjax.models.layers import ATTENTION, Linear, RMSNorm
from mvjax.models.lora import LoRA
from mvjax.models.rope import rotate
from mvjax.parallel import activation_spec, constrain

Array = jax.Array
Kernel = Callable[[Array, Array, Array], Array]  # q, k, v [b, length, heads, head_dim]
KeysValues = tuple[Array, Array]

KERNELS = ("auto", "xla", "cudnn", "splash")

# Logits of a head up to this number stay with XLA: the decoder's few tokens, toy videos.
FEW_LOGITS = 2**20
LANES = 128  # TPU tiles: blocks and heads are multiples of it
# Largest blocks that fit the 16 MB of on-chip memory that a v5e gives a kernel, in bfloat16.
BLOCK, BLOCK_COMPUTE = 1280, 640
# The backward pass in one kernel needs 5 matmuls instead of 7, but a partial dq per block of keys.
PARTIAL_DQ_BYTES = 2 * 2**30


def attend(
    q_blhd: Array, k_bmhd: Array, v_bmhd: Array, kernel: str = "auto", name: str | None = None
) -> Array:
    """softmax(q kᵀ / √d) v for every head, without mask.

    Under a mesh the query sequence is sharded over `context` and keys and values are gathered,
    so full attention needs no other communication.

    Args:
        q_blhd: queries [batch, queries, heads, head_dim].
        k_bmhd, v_bmhd: keys and values [batch, keys, heads, head_dim].
        kernel: see `choose_kernel`.
        name: by which a rematerialisation policy may keep what the backward pass needs.

    Returns:
        [batch, queries, heads, head_dim] in the dtype of the queries.
    """
    b, _, num_heads, head_dim = q_blhd.shape
    # Fewer heads of keys than of queries would be shared between them, and not refused.
    chex.assert_shape([k_bmhd, v_bmhd], (b, k_bmhd.shape[1], num_heads, head_dim))
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


# --- The kernels, and the choice among them ---


def check_kernel(name: str) -> None:
    """Raises ValueError if there is no such kernel."""
    if name not in KERNELS:
        raise ValueError(f"attention must be one of {', '.join(KERNELS)}; got {name!r}.")


def choose_kernel(requested: str, q: Array, k: Array) -> str:
    """The kernel for queries and keys [b, l, heads, head_dim]: "xla", "cudnn" or "splash".

    Args:
        requested: one of `KERNELS`. "auto" takes the kernel of the platform where there are more
            than `FEW_LOGITS` logits per head, and XLA where there are fewer or where cuDNN does
            not know the dtype or head size. Another name is taken at its word.

    Raises:
        ValueError: if cuDNN is requested for what it cannot compute.
    """
    check_kernel(requested)
    cannot = _not_for_cudnn(q)
    if requested == "cudnn" and cannot:
        raise ValueError(f"attention='cudnn' needs {cannot}; use attention='auto' or 'xla'.")
    if requested != "auto":
        return requested
    if q.shape[1] * k.shape[1] <= FEW_LOGITS:
        return "xla"
    if platform() == "tpu":
        return "splash"
    return "cudnn" if platform() == "gpu" and not cannot else "xla"


def platform() -> str:
    """What is compiled for: the devices of `jax.set_mesh`, else JAX's default ("cpu", "tpu", ...).

    The mesh decides because a program for a TPU pod may be compiled on a machine without TPUs.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def _not_for_cudnn(q: Array) -> str:
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"precision 'bfloat16', got arrays of {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > LANES:
        return f"heads of a multiple of 8 and at most {LANES} channels, got {q.shape[-1]}"
    return ""


def xla(q: Array, k: Array, v: Array, name: str | None = None) -> Array:
    """By XLA, anywhere; `name` as in `attend`."""
    return _named(jax.nn.dot_product_attention(q, k, v, implementation="xla"), name)


def cudnn(q: Array, k: Array, v: Array, name: str | None = None) -> Array:
    """By cuDNN's flash attention, in bfloat16; `name` as in `attend`."""
    unnamed = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    attention = jax.custom_vjp(unnamed)

    def forward(q, k, v):
        # The backward kernel needs the output and the softmax's sums. They can be kept only if
        # they are named here: with a name on the result alone, the forward kernel would run twice.
        y, pullback = jax.vjp(unnamed, q, k, v)
        named = {id(x): x for x in (q, k, v)} | {id(y): _named(y, name)}
        keep = lambda x: named[id(x)] if id(x) in named else _named(x, name)  # noqa: E731
        return keep(y), jax.tree.map(keep, pullback)

    attention.defvjp(forward, lambda pullback, dy: pullback(dy))
    return attention(q, k, v)


def _named(y: Array, name: str | None) -> Array:
    return y if name is None else checkpoint_name(y, name)


def splash(
    q: Array, k: Array, v: Array, name: str | None = None, *, interpret: bool = False
) -> Array:
    """By splash attention, the flash attention of JAX's TPU kernels; `name` as in `attend`.

    Lengths that blocks do not divide, and heads that are not a multiple of 128 channels, are padded
    with zeros; padded keys are masked by a segment of their own.

    Args:
        q: queries [b, l, heads, head_dim].
        k, v: keys and values [b, m, heads, head_dim].
        name: see `attend`.
        interpret: run on any backend, slowly, for tests.
    """
    (_, length, h, d), m = q.shape, k.shape[1]
    sizes, queries, keys = _blocks(q, m)
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((queries, keys))] * h),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=name,
        interpret=interpret,
    )
    segments = None
    if keys != m:
        segments = splash_attention_kernel.SegmentIds(
            jnp.zeros(queries, jnp.int32), (jnp.arange(keys) >= m).astype(jnp.int32)
        )
    # The kernel does not scale. In float32, so that the queries are rounded once and not twice.
    scaled = (q.astype(jnp.float32) * d**-0.5).astype(q.dtype)
    heads_first = _padded(scaled, queries), _padded(k, keys), _padded(v, keys)
    y = jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=segments))(*heads_first)
    return y.swapaxes(1, 2)[:, :length, :, :d]


def _padded(x_blhd: Array, length: int) -> Array:
    """[b, heads, length, head_dim up to a multiple of 128], zeros added at the ends."""
    x = x_blhd.swapaxes(1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, -x.shape[3] % LANES)))


def _blocks(q: Array, m: int) -> tuple[splash_attention_kernel.BlockSizes, int, int]:
    """Block sizes, and the lengths of queries and of the m keys padded to them."""
    b, length, h, d = q.shape
    wide = q.dtype.itemsize // 2  # float32 takes twice the memory
    block_q, queries = fit_block(length, BLOCK // wide)
    compute, keys = fit_block(m, BLOCK_COMPUTE // wide)
    block_kv = 2 * compute if keys % (2 * compute) == 0 else compute
    partial_dq = b * h * queries * (d + -d % LANES) * q.dtype.itemsize * (keys // block_kv)
    fused = partial_dq <= PARTIAL_DQ_BYTES
    dq = {} if fused else {"block_q_dq": block_q, "block_kv_dq": block_kv}
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=compute,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=compute,
        use_fused_bwd_kernel=fused,
        **dq,
    )
    return sizes, queries, keys


def fit_block(length: int, target: int) -> tuple[int, int]:
    """A block size and the least multiple of it that holds `length`.

    Of the multiples of 128 between half of `target` and `target`, the one that pads least, and of
    those the largest; a short length is one block.
    """
    whole = length + -length % LANES
    if whole <= target:
        return whole, whole
    blocks = range(-(-target // 2 // LANES) * LANES, target + 1, LANES)
    block = min(reversed(blocks), key=lambda size: -length % size)
    return block, length + -length % block


# --- The module ---


class Attention(nnx.Module):
    """Multi-head attention with RMS-normalised queries and keys, no biases.

    Args:
        key: PRNG key of the initialisation.
        d: width of the queries and of the output.
        d_context: width of what keys and values are read from (`d` for self-attention).
        num_heads: number of heads; `d` is split evenly among them.
        lora: adapters on q_proj, k_proj, v_proj, output_proj where targeted.
        kernel: see `choose_kernel`.
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

    # Two methods, so that keys and values of a context can be made once and attended to often.

    def keys_values(self, context: Array, rope: tuple[Array, Array] | None = None) -> KeysValues:
        """Keys and values [b, m, heads, head_dim] of a context [b, m, d_context]."""
        k = self.k_norm(heads(self.k_proj(context), self.num_heads))
        if rope is not None:
            k = rotate(k, *rope)
        return k, heads(self.v_proj(context), self.num_heads)

    def __call__(
        self, x: Array, keys_values: KeysValues, rope: tuple[Array, Array] | None = None
    ) -> Array:
        """Attends from `x` [b, l, d] to keys and values; returns [b, l, d]."""
        q = self.q_norm(heads(self.q_proj(x), self.num_heads))
        if rope is not None:
            q = rotate(q, *rope)
        y = attend(q, *keys_values, self.kernel, self.name)
        return self.output_proj(y.reshape(*x.shape))


def heads(x: Array, count: int) -> Array:
    """[b, l, heads · head_dim] as [b, l, heads, head_dim]."""
    return x.reshape(*x.shape[:-1], count, -1)
