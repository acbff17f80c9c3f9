"""Compares the estimate with published measurements of single operations on TPUs, without a TPU.

    python -m launch.benchmarks.tpu_accuracy

The measurements and their sources are in docs/estimate_accuracy.md. Each operation is compiled for
its generation and goes through the rules of `mvjax estimate`. A whole training step is compared in
`launch.benchmarks.wan_step`. Takes a few minutes and 1 GB. Needs libtpu: pip install 'mvjax[tpu]'.
"""

import os
from dataclasses import replace

from launch.tpu_compiler import ENVIRONMENT

os.environ.update(ENVIRONMENT)  # before jax is imported

import jax
import jax.numpy as jnp

from launch.benchmarks.tpu_kernels import TOPOLOGIES, Kernel, measure
from launch.entry import run
from mvjax.parallel import chip
from mvjax.pods.cost import cost
from mvjax.pods.hlo import HLO
from mvjax.pods.kernels import HBM_SHARE
from mvjax.pods.topology import pod_devices, pod_size

# Products [m, k] x [k, n] in bfloat16 and their measured microseconds.
PRODUCTS: list[tuple[str, int, int, int, float]] = [
    ("v5e", 4096, 4096, 4096, 827.3),
    ("v5e", 8192, 8192, 8192, 6047.1),
    ("v6e", 8192, 8192, 8192, 1510.9),
    ("tpu7x", 8192, 8192, 8192, 1016.8),
    ("tpu7x", 12288, 8192, 8192, 1498.7),
    ("tpu7x", 16384, 8192, 8192, 1974.6),
    ("tpu7x", 8192, 12288, 12288, 2246.4),
    ("tpu7x", 16384, 12288, 12288, 4481.3),
    ("tpu7x", 8192, 16384, 16384, 4075.4),
    ("tpu7x", 16384, 16384, 16384, 7971.3),
]
# Causal attention: whose measurement, the kernel, its query heads, bytes that are moved beside it
# (heads first and back, the residual sum), and the measured milliseconds.
_MARIN = Kernel("splash_fwd", "v5p", 8192, 8192, 512, 512, 512, causal=True)
_TOKAMAX = Kernel("splash_fwd", "tpu7x", 32768, 32768, 1024, 4096, 2048, causal=True)
_ARRAY = 8192 * 8 * 128 * 2
ATTENTION: list[tuple[str, Kernel, int, int, float]] = [
    ("marin, one layer of 20", _MARIN, 8, 5 * _ARRAY, 0.757),
    ("marin, one clip more", replace(_MARIN, generation="v4"), 8, 8 * _ARRAY, 1.52),
    ("tokamax", _TOKAMAX, 32, 0, 24.75),
    ("tokamax", replace(_TOKAMAX, name="splash_bwd", block_kv_compute=512), 32, 0, 55.05),
]


def main() -> None:
    """Prints the measured and the computed times."""
    for generation, m, k, n, measured in PRODUCTS:
        seconds = product_seconds(generation, m, k, n)
        _print(generation, f"product {m} x {k} x {n}", measured / 1e3, 1e3 * seconds)
    for source, kernel, heads, moved, measured in ATTENTION:
        blocks = f"{kernel.block_q}/{kernel.block_kv}/{kernel.block_kv_compute}"
        what = f"{kernel.name} {kernel.queries:,} causal, {heads} heads, blocks {blocks}, {source}"
        seconds = causal_seconds(kernel, heads)
        bandwidth = pod_size(TOPOLOGIES[kernel.generation])[1].hbm_bandwidth
        seconds += moved / (HBM_SHARE * bandwidth)
        _print(kernel.generation, what, measured, 1e3 * seconds)


def _print(generation: str, what: str, measured: float, computed: float) -> None:
    ratio = computed / measured
    print(
        f"{generation:6} {what:80} {measured:8.3f} ms {computed:8.3f} ms {ratio:5.2f}", flush=True
    )


def product_seconds(generation: str, m: int, k: int, n: int) -> float:
    """The lower end of the estimate for a product of matrices in bfloat16."""
    device = pod_devices(TOPOLOGIES[generation])[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=sharding) for s in ((m, k), (k, n))]
    compiled = jax.jit(jnp.matmul).lower(*shapes).compile()
    kind = chip(device.device_kind)
    return cost(HLO(compiled.as_text()), generation, kind).seconds.low


def causal_seconds(kernel: Kernel, heads: int) -> float:
    """The time of a causal kernel; its grid steps over masked blocks, too."""
    cycles, kind = measure(kernel), pod_size(TOPOLOGIES[kernel.generation])[1]
    rows, columns = kernel.queries // kernel.block_q, kernel.keys // kernel.block_kv
    visited = sum(
        (column * kernel.block_kv) < (row + 1) * kernel.block_q
        for row in range(rows)
        for column in range(columns)
    )
    lines = rows if kernel.name == "splash_fwd" else columns
    idle = rows * columns - visited
    steps = visited * cycles.step + idle * cycles.idle + lines * cycles.edge
    return heads * steps / kind.cores / kind.clock


if __name__ == "__main__":
    run(main)
