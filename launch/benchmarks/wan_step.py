"""Estimates a training step whose time MaxDiffusion published, without a TPU.

    python -m launch.benchmarks.wan_step

Wan 2.1 14B on a v5p-8 (four chips): 36.0 s per step for one clip of 75,600 tokens. The forty blocks
are written here as MaxDiffusion had them when it published that (commit f5f212f2), with its blocks
of splash attention, its sharding and full rematerialisation. They go through the same compiler and
the same rules as a program of `mvjax estimate`. What is outside the blocks (embeddings, the
optimizer, dropout) is left out; it takes well under a second. Compiling takes about two minutes
and 3 GB. Needs libtpu: pip install 'mvjax[tpu]'.
"""

import functools
import os

from launch.tpu_compiler import ENVIRONMENT

os.environ.update(ENVIRONMENT)  # before jax is imported

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import NamedSharding, PartitionSpec

from launch.entry import run
from mvjax.models.layers import layer_norm, run_blocks
from mvjax.parallel import chip, make_mesh
from mvjax.pods.collectives import collectives
from mvjax.pods.cost import Cost, cost
from mvjax.pods.hlo import HLO
from mvjax.pods.kernels import kernel_table
from mvjax.pods.topology import generation, pod_devices

Array = jax.Array

TOPOLOGY = "v5p:2x2x1"
TOKENS, TEXT = 75_600, 512  # 21 latent frames of 45 x 80 patches
WIDTH, HIDDEN, HEADS, BLOCKS = 5120, 13_824, 40, 40
PUBLISHED_SECONDS = 36.0
FLOPS = 4893.27e12  # of a chip and step, as MaxDiffusion counts them
_QUERIES_KEYS, _COMPUTE = 1024, 256  # of splash attention, in all of its kernels

_TOKENS = PartitionSpec("data", "fsdp", None)
_HEADS_FIRST = PartitionSpec("data", "tensor", "fsdp", None)
_ALL_KEYS = PartitionSpec("data", "tensor", None, None)
_INPUT, _OUTPUT = PartitionSpec("fsdp", "tensor"), PartitionSpec("tensor", "fsdp")


def main() -> None:
    """Prints the estimate beside the published time."""
    devices = pod_devices(TOPOLOGY)
    kind = chip(devices[0].device_kind)
    found = estimate(devices)
    seconds = found.seconds
    print(
        f"step        {seconds.low:.1f} to {seconds.high:.1f} s, {seconds.middle:.1f} in the "
        f"middle; published {PUBLISHED_SECONDS}"
    )
    shares = [FLOPS / (time * kind.peak_flops) for time in (seconds.high, seconds.low)]
    published = FLOPS / (PUBLISHED_SECONDS * kind.peak_flops)
    print(f"MFU         {shares[0]:.1%} to {shares[1]:.1%}; published {published:.1%}")
    for part, time in found.parts.items():
        if time.high >= 0.005:
            print(f"  {part:18}{time.low:6.2f} to {time.high:5.2f} s")
    print(f"products    run at {found.products_peak_share:.0%} of the peak")
    print("\n".join(f"note        {note}" for note in found.notes))


def estimate(devices: list[jax.Device]) -> Cost:
    """The time of the blocks' forward and backward pass on four chips."""
    mesh = make_mesh({"fsdp": len(devices)}, devices)
    place = lambda spec: NamedSharding(mesh, spec)  # noqa: E731
    array = lambda shape, spec, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(  # noqa: E731
        shape, dtype, sharding=place(spec)
    )
    stacked = {
        name: array((BLOCKS, *shape), PartitionSpec(None, *spec))
        for name, (shape, spec) in _parameters().items()
    }
    tokens = array((1, TOKENS, WIDTH), _TOKENS)
    text = array((1, TEXT, WIDTH), _TOKENS)
    time = array((1, 6, WIDTH), PartitionSpec(), jnp.float32)
    rope = array((1, 1, TOKENS, WIDTH // HEADS // 2), PartitionSpec(), jnp.complex64)

    def step(blocks, x, text, time, rope, dy):
        one = lambda x, block: _block(block, x, text, time, rope, mesh)  # noqa: E731
        forward = lambda blocks, x, text: run_blocks(one, x, blocks, BLOCKS, "full")  # noqa: E731
        return jax.vjp(forward, blocks, x, text)[1](dy)

    arguments = stacked, tokens, text, time, rope, tokens
    with jax.set_mesh(mesh):
        out = jax.tree.map(lambda leaf: leaf.sharding, (stacked, tokens, text))
        compiled = jax.jit(step, out_shardings=out).lower(*arguments).compile()
    program = HLO(compiled.as_text())
    kind = devices[0].device_kind
    name = generation(kind)
    # All of these kernels mask padding; the table lists that variant by a name of its own.
    rows = [
        {**row, "kernel": row["kernel"].removesuffix("_segmented")}
        for row in kernel_table()[name]
        if row["kernel"].endswith("_segmented")
    ]
    exchanges = collectives(program, len(devices))
    return cost(program, name, chip(kind), exchanges, {name: rows})


def _parameters() -> dict[str, tuple[tuple[int, ...], PartitionSpec]]:
    square, vector = (WIDTH, WIDTH), (WIDTH,)
    found = {"adaln": ((6, WIDTH), PartitionSpec(None, None)), "norm": (vector, PartitionSpec())}
    for attention in ("self", "cross"):
        for name in ("query", "key", "value"):
            found[f"{attention}_{name}"] = square, _INPUT
            found[f"{attention}_{name}_bias"] = vector, PartitionSpec("fsdp")
        found[f"{attention}_output"] = square, _OUTPUT
        found[f"{attention}_output_bias"] = vector, PartitionSpec("tensor")
        for name in ("query_norm", "key_norm"):
            found[f"{attention}_{name}"] = vector, PartitionSpec("tensor")
    found["up"] = (WIDTH, HIDDEN), _INPUT
    found["up_bias"] = (HIDDEN,), PartitionSpec("tensor")
    found["down"] = (HIDDEN, WIDTH), _OUTPUT
    found["down_bias"] = vector, PartitionSpec()
    return found


def _block(p: dict[str, Array], x: Array, text: Array, time: Array, rope: Array, mesh) -> Array:
    """Self-attention, cross-attention, MLP; x [1, tokens, width], time [1, 6, width]."""
    constrain = lambda x: jax.lax.with_sharding_constraint(x, _TOKENS)  # noqa: E731
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = jnp.split(p["adaln"] + time, 6, axis=1)
    x, text = constrain(x), constrain(text)
    wide = x.astype(jnp.float32)
    u = (layer_norm(wide) * (1 + scale) + shift).astype(x.dtype)
    x = (wide + _attention(p, "self", u, u, rope, mesh) * gate).astype(x.dtype)
    u = (layer_norm(x.astype(jnp.float32)) * p["norm"]).astype(x.dtype)
    x = x + _attention(p, "cross", u, text, None, mesh)
    wide = x.astype(jnp.float32)
    u = (layer_norm(wide) * (1 + mlp_scale) + mlp_shift).astype(x.dtype)
    y = jax.nn.gelu(u @ p["up"] + p["up_bias"]) @ p["down"] + p["down_bias"]
    return (wide + y.astype(jnp.float32) * mlp_gate).astype(x.dtype)


def _attention(p, name: str, x: Array, context: Array, rope: Array | None, mesh) -> Array:
    project = lambda part, x: x @ p[f"{name}_{part}"] + p[f"{name}_{part}_bias"]  # noqa: E731
    q = _rms_norm(project("query", x), p[f"{name}_query_norm"])
    k = _rms_norm(project("key", context), p[f"{name}_key_norm"])
    v = project("value", context)
    q, k, v = (a.reshape(*a.shape[:2], HEADS, -1).swapaxes(1, 2) for a in (q, k, v))
    if rope is not None:
        q, k = _rotate(q, rope), _rotate(k, rope)
    k = k * (WIDTH // HEADS) ** -0.5
    shards = jax.shard_map(
        _splash,
        mesh=mesh,
        in_specs=(_HEADS_FIRST, _ALL_KEYS, _ALL_KEYS),
        out_specs=_HEADS_FIRST,
        check_vma=False,
    )
    return project("output", shards(q, k, v).swapaxes(1, 2).reshape(x.shape))


def _rms_norm(x: Array, scale: Array) -> Array:
    wide = x.astype(jnp.float32)
    unit = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    return (unit * scale.astype(jnp.float32)).astype(x.dtype)


def _rotate(x: Array, rope: Array) -> Array:
    """Turns neighbouring channels as complex numbers."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    turned = jax.lax.complex(pairs[..., 0], pairs[..., 1]) * rope
    return jnp.stack([turned.real, turned.imag], axis=-1).reshape(x.shape).astype(x.dtype)


def _splash(q: Array, k: Array, v: Array) -> Array:
    """Splash attention on one chip; all lengths are padded to blocks, and padding is masked."""
    length = q.shape[2]
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % _QUERIES_KEYS), (0, 0)))  # noqa: E731
    ids = lambda x: (jnp.arange(pad(x).shape[2]) < x.shape[2]).astype(jnp.int32)  # noqa: E731
    segments = splash_attention_kernel.SegmentIds(ids(q), ids(k))
    q, k, v = pad(q), pad(k), pad(v)
    block = _QUERIES_KEYS
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask(
            [splash_attention_mask.FullMask((q.shape[2], k.shape[2]))] * q.shape[1]
        ),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=_COMPUTE,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=_COMPUTE,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
    )
    y = jax.vmap(functools.partial(kernel, segment_ids=segments))(q, k, v)
    return y[:, :, :length]


if __name__ == "__main__":
    run(main)
