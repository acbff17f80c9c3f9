"""The attention arithmetic of each backend, and which of them is used where.

"xla" writes the logits of every query and key to memory; "cudnn" (NVIDIA GPUs) and "splash" (TPUs)
keep them on the chip, which is what makes tens of thousands of tokens possible. All compute
softmax(q kᵀ / √d) v without a mask on arrays of one device, [batch, length, heads, head_dim].
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

Array = jax.Array
Kernel = Callable[[Array, Array, Array], Array]
KERNELS = ("auto", "xla", "cudnn", "splash")

# Logits of a head up to this number stay with XLA: the decoder's few tokens, toy videos.
FEW_LOGITS = 2**20
LANES = 128  # TPU tiles: blocks and heads are multiples of it
# Largest blocks that fit the 16 MB of on-chip memory that a v5e gives a kernel, in bfloat16.
BLOCK, BLOCK_COMPUTE = 1280, 640
# The backward pass in one kernel needs 5 matmuls instead of 7, but a partial dq per block of keys.
PARTIAL_DQ_BYTES = 2 * 2**30


def check_kernel(name: str) -> None:
    """Raises ValueError if there is no such kernel."""
    if name not in KERNELS:
        raise ValueError(f"attention must be one of {', '.join(KERNELS)}; got {name!r}.")


def platform() -> str:
    """What is compiled for: the devices of `jax.set_mesh`, else JAX's default ("cpu", "tpu", ...).

    The mesh decides because a program for a TPU pod may be compiled on a machine without TPUs.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


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


def _not_for_cudnn(q: Array) -> str:
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"precision 'bfloat16', got arrays of {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > LANES:
        return f"heads of a multiple of 8 and at most {LANES} channels, got {q.shape[-1]}"
    return ""


def xla(q: Array, k: Array, v: Array, name: str | None = None) -> Array:
    """By XLA, anywhere; `name` as in `splash`."""
    return _named(jax.nn.dot_product_attention(q, k, v, implementation="xla"), name)


def cudnn(q: Array, k: Array, v: Array, name: str | None = None) -> Array:
    """By cuDNN's flash attention, in bfloat16; `name` as in `splash`."""
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


def splash(
    q: Array, k: Array, v: Array, name: str | None = None, *, interpret: bool = False
) -> Array:
    """By splash attention, the flash attention of JAX's TPU kernels.

    Lengths that blocks do not divide, and heads that are not a multiple of 128 channels, are padded
    with zeros; padded keys are masked by a segment of their own.

    Args:
        q: queries [b, l, heads, head_dim].
        k, v: keys and values [b, m, heads, head_dim].
        name: under which a rematerialisation policy may keep what the backward pass needs.
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


def _named(y: Array, name: str | None) -> Array:
    return y if name is None else checkpoint_name(y, name)
