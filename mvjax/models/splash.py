"""Attention on TPUs: JAX's splash attention, heads first from projection to projection.

`splash` is the kernel with its block sizes, and `splash_projected` the whole of it: queries, keys
and values as they leave their linear layers, normalised, rotated and attended to.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from mvjax.models.layers import keep
from mvjax.models.norm_rope import HEAD_DIM, Tables, block_rows, norm_rope
from mvjax.parallel import chip, device_kind, join_shards, joined

Array = jax.Array

LANES = 128  # TPU tiles: blocks and heads are multiples of it
# The backward pass in one kernel needs 5 matmuls instead of 7, but a partial dq per block of keys.
PARTIAL_DQ_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Blocks:
    """Rows of a block in bfloat16; of a block of keys, `compute` are multiplied at once.

    The fastest for long videos, `python -m launch.benchmarks.tpu_kernels --blocks`. Few blocks of
    keys also mean few partial dq.
    """

    queries: int
    keys: int
    compute: int
    backward_compute: int


_SMALL = Blocks(640, 3840, 1920, 640)  # what 16 MB of on-chip memory hold
_LARGE = Blocks(1280, 3840, 1280, 384)
BLOCKS = {"TPU v6 lite": _LARGE, "TPU7x": _LARGE}  # all others: small


def splash(
    q: Array, k: Array, v: Array, name: str | None = None, *, interpret: bool = False
) -> Array:
    """softmax(q kᵀ) v, heads first; the caller scales the queries.

    Lengths that blocks do not divide, and heads that are not a multiple of 128 channels, are padded
    with zeros; padded keys are masked by a segment of their own.

    Args:
        q: queries [b, heads, l, head_dim].
        k, v: keys and values [b, heads, m, head_dim].
        name: by which a rematerialisation policy may keep what the backward pass needs.
        interpret: run on any backend, slowly, for tests.
    """
    return splash_parts(q, [k], [v], name, interpret=interpret)


def splash_parts(
    q: Array,
    ks: Sequence[Array],
    vs: Sequence[Array],
    name: str | None = None,
    *,
    interpret: bool = False,
) -> Array:
    """As `splash`, of queries to the keys of all parts, each with blocks that fit its length.

    Joined, a long part and a short one would seldom be a multiple of good blocks; and where some of
    the keys are padding, a mask is applied in every block.
    """
    b, h, length, d = q.shape
    # The backward kernel's own grid is not split over the two TensorCores of a megacore chip; an
    # axis of a vmap is. An odd number of samples would leave one of them idle for part of the time.
    device = chip(device_kind())
    halves = 2 if device and device.cores == 2 and b % 2 and h % 2 == 0 else 1
    parts = [_keys_kernel(q, k, h // halves, name, len(ks) > 1, interpret) for k in ks]

    def ready(x: Array, rows: int) -> Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, rows - x.shape[2]), (0, -d % LANES)))
        return x.reshape(b * halves, h // halves, *x.shape[2:])

    ks, vs = ([ready(x, part.keys) for x, part in zip(xs, parts)] for xs in (ks, vs))
    attention = partial(_over_parts, name, parts) if len(parts) > 1 else parts[0].alone
    y = jax.vmap(attention)(ready(q, parts[0].queries), ks, vs)
    return y.reshape(b, h, *y.shape[2:])[:, :, :length, :d]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["kernel"],
    meta_fields=["queries", "keys", "given"],
)
@dataclass(frozen=True)
class _KeysKernel:
    """The kernel of one part of the keys, and lengths that its blocks divide."""

    kernel: splash_attention_kernel.SplashAttentionKernel
    queries: int
    keys: int
    given: int  # keys that are not padding

    @property
    def segments(self) -> splash_attention_kernel.SegmentIds | None:
        if self.keys == self.given:
            return None
        return splash_attention_kernel.SegmentIds(
            jnp.zeros(self.queries, jnp.int32),
            (jnp.arange(self.keys) >= self.given).astype(jnp.int32),
        )

    def __call__(self, q: Array, k: Array, v: Array) -> Any:
        return self.kernel(q, k, v, segment_ids=self.segments)

    def alone(self, q: Array, ks: list[Array], vs: list[Array]) -> Array:
        return self(q, *ks, *vs)

    def gradients(self, q, k, v, y, total, dy) -> tuple[Array, Array, Array]:
        """Of q, k and v, from the result and the log-sum over all parts."""
        masks = self.kernel.dq_mask_info, self.kernel.dkv_mask_info
        return splash_attention_kernel._splash_attention_bwd(
            **self.kernel.kwargs, res=(q, k, v, self.segments, None, y, total, *masks), do=dy
        )[3:6]


def _keys_kernel(
    q: Array, k: Array, heads: int, name: str | None, several: bool, interpret: bool
) -> _KeysKernel:
    sizes, queries, keys = _block_sizes(q, k.shape[2])
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask(
            [splash_attention_mask.FullMask((queries, keys))] * heads
        ),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=None if several else name,
        save_residuals=several,
        interpret=interpret,
    )
    return _KeysKernel(kernel, queries, keys, k.shape[2])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _over_parts(
    name: str | None, parts: Sequence[_KeysKernel], q: Array, ks: list[Array], vs: list[Array]
) -> Array:
    """Attention over several parts of the keys, whose kernels also give the softmax's log-sum.

    The result of a part is weighted by its share in the sum over all parts. Its gradients are what
    the backward kernel makes of the result and the sum of all.
    """
    return _over_parts_forward(name, parts, q, ks, vs)[0]


def _over_parts_forward(name, parts, q, ks, vs):
    ys, sums = zip(*(part(q, k, v) for part, k, v in zip(parts, ks, vs)))
    sums = [log_sum for (log_sum,) in sums]
    total = jax.nn.logsumexp(jnp.stack(sums), axis=0)
    y = sum(y * jnp.exp(log_sum - total)[..., None] for y, log_sum in zip(ys, sums))
    y, total = keep(y.astype(q.dtype), name), keep(total, name)
    return y, (parts, q, ks, vs, y, total)


def _over_parts_backward(name, kept, dy):
    parts, q, ks, vs, y, total = kept
    found = [part.gradients(q, k, v, y, total, dy) for part, k, v in zip(parts, ks, vs)]
    dqs, dks, dvs = zip(*found)
    return None, sum(dqs), list(dks), list(dvs)


_over_parts.defvjp(_over_parts_forward, _over_parts_backward)


def splash_length_first(
    q: Array, k: Array, v: Array, name: str | None = None, *, interpret: bool = False
) -> Array:
    """As `splash` for queries that are not scaled, in the layout [b, length, heads, head_dim]."""
    # In float32, so that the queries are rounded once and not twice.
    q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    y = splash(*(x.swapaxes(1, 2) for x in (q, k, v)), name, interpret=interpret)
    return y.swapaxes(1, 2)


def can_project(width: int, heads: int, queries: int, keys: int) -> bool:
    """Whether `splash_projected` takes heads and lengths (of one device) like these.

    The lengths are those of the first streams; others are padded, because they are short.
    """
    return width == heads * HEAD_DIM and all(block_rows(n) for n in (queries, keys))


def splash_projected(
    q: Sequence[Array],
    k: Sequence[Array],
    v: Sequence[Array],
    q_scale: Array,
    k_scale: Array,
    tables: Sequence[Tables] | None,
    reads: Sequence[Sequence[Sequence[int]]],
    name: str | None = None,
    split: Sequence[str | tuple[str, ...] | None] = (None,),
    *,
    interpret: bool = False,
) -> list[Array]:
    """softmax(q' k'ᵀ / √d) v of normalised, rotated q' and k', on one device.

    The queries of every stream attend to the keys of those that it reads.

    Args:
        q: queries of every stream as projected [b, l, heads · 128].
        k, v: keys and values as projected [b, m, heads · 128], of the same streams and perhaps of
            some before them; or of others, where nothing is rotated.
        q_scale, k_scale: of the RMS norms of a head [128].
        tables: of `rotation_tables`, for every stream of keys and the queries of the same; None for
            no rotation.
        reads: streams of keys that the queries of each stream read, in parts
            (`mvjax.models.attention.Reads`).
        name: see `splash`.
        split: the mesh axis that splits the keys of a stream, if any: heads are exchanged for
            them, or keys and values are gathered.
        interpret: run on any backend, slowly, for tests.

    Returns:
        [b, l, heads · 128] of every stream.
    """
    q = _ready(q, q_scale, tables and tables[-len(q) :], HEAD_DIM**-0.5, interpret)
    k = _ready(k, k_scale, tables, 1.0, interpret)
    v = [x.reshape(*x.shape[:2], -1, HEAD_DIM).swapaxes(1, 2) for x in v]
    context = split[0]
    ways = 1 if context is None else jax.lax.axis_size(context)
    # Few of the heads and whole sequences (Ulysses): four arrays of a device's size are sent, where
    # gathering sends two for each device of the axis. In self-attention, which rotates, queries are
    # split as keys are.
    exchange = ways > 2 and q[0].shape[1] % ways == 0 and tables is not None and None not in split
    if exchange:
        q, k, v = ([_exchanged(x, context, 1, 2) for x in xs] for xs in (q, k, v))
    elif ways > 1:
        k, v = ([join_shards([x], [axes], 2) for x, axes in zip(xs, split)] for xs in (k, v))
    y = []
    for x, parts in zip(q, reads):
        own_k, own_v = ([joined([xs[i] for i in part], 2) for part in parts] for xs in (k, v))
        y.append(splash_parts(x, own_k, own_v, name, interpret=interpret))
    y = [(_exchanged(x, context, 2, 1) if exchange else x).swapaxes(1, 2) for x in y]
    return [x.reshape(*x.shape[:2], -1) for x in y]


def _ready(
    streams: Sequence[Array],
    scale: Array,
    tables: Sequence[Tables] | None,
    factor: float,
    interpret: bool,
) -> list[Array]:
    """`norm_rope` of every stream; a length that it cannot cut into blocks is padded for it."""

    def one(x: Array, turned: Tables | None) -> Array:
        length = x.shape[1]
        if block_rows(length):
            return norm_rope(x, scale, turned, factor, interpret)
        more = (0, -length % LANES)
        x = jnp.pad(x, ((0, 0), more, (0, 0)))
        turned = turned and tuple(jnp.pad(table, (more, (0, 0))) for table in turned)
        return norm_rope(x, scale, turned, factor, interpret)[:, :, :length]

    return [one(x, turned) for x, turned in zip(streams, tables or [None] * len(streams))]


def _exchanged(x: Array, context: str | tuple[str, ...], split: int, joined: int) -> Array:
    """[b, heads, l, 128] with one axis split over the devices and another put together."""
    return jax.lax.all_to_all(x, context, split, joined, tiled=True)


def _block_sizes(q: Array, m: int) -> tuple[splash_attention_kernel.BlockSizes, int, int]:
    """Block sizes, and the lengths of queries and of the m keys padded to them."""
    b, h, length, d = q.shape
    wide = q.dtype.itemsize // 2  # float32 takes twice the memory
    blocks = BLOCKS.get(device_kind(), _SMALL)
    block_q, queries = fit_block(length, blocks.queries // wide)
    block_kv, keys = fit_keys(m, blocks.keys // wide, blocks.backward_compute // wide)
    partial_dq = b * h * queries * (d + -d % LANES) * q.dtype.itemsize * (keys // block_kv)
    fused = partial_dq <= PARTIAL_DQ_BYTES
    dq = {} if fused else {"block_q_dq": block_q, "block_kv_dq": block_kv}
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=_part(block_kv, blocks.compute // wide),
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=_part(block_kv, blocks.backward_compute // wide),
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


WHOLE = 640  # keys of a short block that are multiplied at once


def fit_keys(length: int, target: int, part: int) -> tuple[int, int]:
    """As `fit_block` for keys, of which a block multiplies up to `part` at once.

    Padding costs in proportion, and so do small parts: 40 keys' worth for each. A short length is
    one block, lengthened by up to a tenth where its parts are larger then.
    """
    whole = length + -length % LANES
    if whole <= target:
        blocks = range(whole, min(target, whole * 11 // 10) + 1, LANES)
    else:
        blocks = range(-(-target // 2 // LANES) * LANES, target + 1, LANES)

    def cost(block: int) -> float:
        return (length + -length % block) * (1 + 40 / _part(block, part))

    block = min(reversed(blocks), key=cost)
    return block, length + -length % block


def _part(block: int, target: int) -> int:
    """The largest multiple of 128 up to `target` that divides a block; a short block is whole."""
    if block <= WHOLE:
        return block
    return next(n for n in range(min(block, target) // LANES * LANES, 0, -LANES) if block % n == 0)
