"""Queries and keys made ready for splash attention in one pass over memory: a TPU kernel.

Splash attention wants heads first, [b, heads, l, 128], normalised and rotated. Left to the
compiler, that is half a dozen passes with float32 intermediates and transposed layouts. Here it is
one: a block is some rows of one head, which are one column of tiles of [b, l, heads · 128], and
where the block is written is the transposition.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Array = jax.Array
Tables = tuple[Array, Array]

HEAD_DIM = 128  # a head is one tile wide
ROWS = 1280  # of a block at most: a few hundred kB of the on-chip memory per array
LEAST_ROWS = 128  # below this the blocks are too short to be worth a kernel
EPS = 1e-6


def block_rows(length: int) -> int:
    """Rows of a block: the largest multiple of 16 up to `ROWS` that divides; 0 if it is short."""
    rows = next((r for r in range(ROWS, 0, -16) if length % r == 0), 0)
    return rows if rows >= LEAST_ROWS else 0


def rotation_tables(cos: Array, sin: Array) -> Tables:
    """[l, 64] of `rope_table` for all 128 channels, as the kernel reads them."""
    return jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def norm_rope(
    x: Array, scale: Array, tables: Tables | None, factor: float = 1.0, interpret: bool = False
) -> Array:
    """RMS norm of every head, rotation, a factor: [b, l, heads · 128] to [b, heads, l, 128].

    Rounded where `RMSNorm` and `rotate` round: after the norm, and at the end.

    Args:
        x: queries or keys as projected; `block_rows(l)` must not be 0.
        scale: of the norm [128].
        tables: of `rotation_tables` [l, 128]; None for no rotation. Not differentiated.
        factor: what the result is multiplied by before it is rounded.
        interpret: run on any backend, slowly, for tests.
    """
    b, length, width = x.shape
    grid, specs = _grid(x)
    return pl.pallas_call(
        functools.partial(_forward, factor=factor),
        grid=grid,
        in_specs=[specs.tokens, specs.scale, *_given(tables, specs.table)],
        out_specs=specs.heads,
        out_shape=jax.ShapeDtypeStruct((b, width // HEAD_DIM, length, HEAD_DIM), x.dtype),
        compiler_params=_PARALLEL,
        interpret=interpret,
        name="norm_rope_fwd",
    )(x, scale.astype(jnp.float32)[None], *(tables or ()))


def _fwd(x, scale, tables, factor, interpret):
    # The input alone is kept: the norm is cheaper to repeat than to read.
    return norm_rope(x, scale, tables, factor, interpret), (x, scale, tables)


def _bwd(factor, interpret, kept, dy):
    x, scale, tables = kept
    grid, specs = _grid(x)
    dx, dscale = pl.pallas_call(
        functools.partial(_backward, factor=factor),
        grid=grid,
        in_specs=[specs.tokens, specs.scale, specs.heads, *_given(tables, specs.table)],
        out_specs=[specs.tokens, specs.sums],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((*grid, 8, HEAD_DIM), jnp.float32),
        ],
        compiler_params=_PARALLEL,
        interpret=interpret,
        name="norm_rope_bwd",
    )(x, scale.astype(jnp.float32)[None], dy, *(tables or ()))
    dscale = dscale.sum(range(dscale.ndim - 1)).astype(scale.dtype)
    return dx, dscale, jax.tree.map(jnp.zeros_like, tables)


norm_rope.defvjp(_fwd, _bwd)


# --- The kernels, on a block of rows of one head ---


def _forward(x_ref, scale_ref, *refs, factor):
    *tables, y_ref = refs
    unit, _ = _normalised(x_ref[0])
    y = (unit * scale_ref[...]).astype(x_ref.dtype)
    if tables:
        cos, sin = (table[...] for table in tables)
        y = y.astype(jnp.float32)
        y = y * cos + pltpu.roll(y, HEAD_DIM // 2, 1) * sin
    y_ref[0, 0] = (y.astype(jnp.float32) * factor).astype(y_ref.dtype)


def _backward(x_ref, scale_ref, dy_ref, *refs, factor):
    *tables, dx_ref, dscale_ref = refs
    d = dy_ref[0, 0].astype(jnp.float32) * factor
    if tables:
        cos, sin = (table[...] for table in tables)
        d = d * cos + pltpu.roll(d * sin, HEAD_DIM // 2, 1)
    unit, inverse = _normalised(x_ref[0])
    # Every block has sums of its own, of eight rows as tiles are high, so that no block waits for
    # another and both cores of a chip can take part.
    dscale_ref[0, 0, 0] = (d * unit).reshape(-1, 8, HEAD_DIM).sum(0)
    d = d * scale_ref[...]
    mean = jnp.mean(d * unit, axis=-1, keepdims=True)
    dx_ref[0] = ((d - unit * mean) * inverse).astype(dx_ref.dtype)


def _normalised(x):
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + EPS)
    return wide * inverse, inverse


# --- Where the blocks lie ---

_PARALLEL = pltpu.CompilerParams(dimension_semantics=("parallel",) * 3)


class _Specs:
    def __init__(self, rows: int):
        block = pl.BlockSpec
        # Heads change fastest, so that the rows of the tables are fetched once for all of them.
        self.tokens = block((1, rows, HEAD_DIM), lambda b, i, h: (b, i, h))
        self.heads = block((1, 1, rows, HEAD_DIM), lambda b, i, h: (b, h, i, 0))
        self.table = block((rows, HEAD_DIM), lambda b, i, h: (i, 0))
        self.scale = block((1, HEAD_DIM), lambda b, i, h: (0, 0))
        self.sums = block((1, 1, 1, 8, HEAD_DIM), lambda b, i, h: (b, i, h, 0, 0))


def _grid(x: Array) -> tuple[tuple[int, int, int], _Specs]:
    b, length, width = x.shape
    rows = block_rows(length)
    if not rows or width % HEAD_DIM:
        raise ValueError(f"norm_rope cannot cut [{b}, {length}, {width}] into blocks.")
    return (b, length // rows, width // HEAD_DIM), _Specs(rows)


def _given(tables: Tables | None, spec: Any) -> list[Any]:
    return [] if tables is None else [spec, spec]
