r"""Counts the cycles of the Pallas kernels on each TPU generation by compiling them, without a TPU.

    nice python -m launch.benchmarks.tpu_kernels
    python -m launch.benchmarks.tpu_kernels --blocks

A kernel is one loop over the steps of its grid. libtpu writes the final program of that loop, and a
bundle of instructions takes one cycle, so the bundles of a step are its cycles, without waits for
memory. `mvjax estimate` reads the table, mvjax/pods/kernel_cycles.json. Kernels that the table has
already are kept; a new libtpu makes the whole table anew. --blocks compares block sizes of
attention by the table instead. The block sizes in mvjax.models.splash were chosen this way.

A kernel takes about six seconds and 1 GB; all 190 of them take 20 minutes. Needs libtpu: pip
install 'mvjax[tpu]'.
"""

import datetime
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from data_pipelines.atomic import write_json
from launch.entry import run
from launch.tpu_compiler import ENVIRONMENT
from mvjax.models.norm_rope import block_rows, norm_rope
from mvjax.pods.kernels import HBM_SHARE
from mvjax.pods.topology import pod_devices, pod_size

TABLE = Path(__file__).parents[2] / "mvjax" / "pods" / "kernel_cycles.json"
TOPOLOGIES = {  # one host of each generation
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
_DUMP = (
    "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
    "--xla_jf_dump_llo_pass_label_regex=.*(final_bundles|final_hlo).*"
)
HEADS, HEAD_DIM, _LENGTH = 16, 128, 19200

# Blocks to compile: of queries, of keys, of keys that are worked on at a time. A text is one block
# of 512 keys.
FORWARD = [
    (1280, 1280, 640),
    (1280, 3840, 1280),
    (640, 3840, 1920),
    (1280, 512, 512),
    (640, 512, 512),
    (1280, 2560, 1280),
    (640, 2560, 1280),
    (1280, 3840, 1920),
    (640, 3840, 1280),
    (640, 3840, 640),
    (640, 1920, 640),
    (640, 1280, 640),
    (1280, 1920, 640),
    (1920, 1920, 640),
]
BACKWARD = [
    (1280, 1280, 640),
    (1280, 3840, 384),
    (640, 3840, 640),
    (1280, 512, 512),
    (640, 512, 512),
    (1280, 512, 256),
    (640, 512, 256),
    (1280, 2560, 256),
    (640, 2560, 640),
    (640, 3840, 384),
    (640, 1920, 640),
    (640, 1280, 640),
    (1280, 3840, 640),
    (1280, 1920, 640),
    (1920, 1920, 384),
]
# For the pass in two kernels, and for lengths that are padded.
SPLIT = [(1280, 1280, 640), (640, 3840, 640)]
SEGMENTED = [(1280, 1280, 640)]
_WAN = (1024, 1024, 256)  # of `launch.benchmarks.wan_step`

BLOCKS = flags.DEFINE_bool("blocks", False, "Compare block sizes instead of making the table.")
CHOSEN = flags.DEFINE_list("generations", list(TOPOLOGIES), "TPU generations.")
COMPILE = flags.DEFINE_string("compile", None, "Used by the command itself: a kernel, as JSON.")


@dataclass(frozen=True)
class Kernel:
    """One kernel to compile: splash_fwd, splash_bwd (fused), splash_dq, splash_dkv, norm_rope_*.

    A name that ends in "_segmented" is the variant that masks padded keys.

    Attributes:
        name: of the kernel.
        generation: of the TPU.
        queries, keys: lengths.
        block_q, block_kv, block_kv_compute: blocks. Of norm_rope, which is over queries alone,
            `block_q` is the rows of a block, and follows from the length.
        causal: whether keys behind a query are masked.
    """

    name: str
    generation: str
    queries: int = 19200
    keys: int = 19200
    block_q: int = 1280
    block_kv: int = 1280
    block_kv_compute: int = 640
    causal: bool = False


@dataclass(frozen=True)
class Cycles:
    """What the final program of a kernel says.

    Attributes:
        grid: steps along each axis, on one core.
        step: cycles of a step.
        edge: cycles that only the first and the last step along the grid's last axis take, in sum.
        idle: cycles of a step whose block is masked as a whole.
    """

    grid: tuple[int, ...]
    step: int
    edge: int
    idle: int = 0

    @property
    def per_step(self) -> float:
        """Cycles of a step, on average."""
        return self.step + self.edge / self.grid[-1]


class DoesNotFit(RuntimeError):
    """The blocks of a kernel need more memory of the chip than the compiler gives a kernel."""


# --- Counting ---

_BUNDLE = re.compile(r" *(0x[0-9a-f]+|0)\s+(?:LB|LH|LE|PB|PF|CT)?\s*:((?: >)*) ", re.MULTILINE)
_JUMP = re.compile(r"sbr\.rel \(!?%p\w+\) target = \$region(\d+)")
_START = re.compile(r"(?:Start|Start/End empty) region (\d+)")
# A conditional part as long as this is work on data; a shorter one starts or awaits a copy.
_WORK = 60


def count_cycles(bundles: str) -> Cycles:
    """Counts the cycles of a kernel in the text of its final bundles.

    The grid is one loop. Of the parts of its body that a jump may skip, the longest is the work of
    a step; other long ones begin or finish a row of steps.

    Raises:
        ValueError: if the text has no grid or has a loop inside a step, which is not counted.
    """
    bounds = re.search(r"iteration_bounds: \(([\d, ]+)\)", bundles)
    starts = list(_BUNDLE.finditer(bundles))
    depths = [start[2].count(">") for start in starts]
    if bounds is None or 1 not in depths:
        raise ValueError("the text of a kernel's final bundles has a grid and a loop; found none.")
    if max(depths) > 1:
        raise ValueError("the kernel has a loop inside a step of its grid, which is not counted.")
    # Empty bundles after a jump have no mark of the loop.
    first, last = depths.index(1), len(depths) - depths[::-1].index(1)
    ends = [start.start() for start in starts[1:]] + [len(bundles)]
    body = [bundles[starts[i].start() : ends[i]] for i in range(first, last)]
    begins = {region: i for i, text in enumerate(body) for region in _START.findall(text)}
    parts = [
        (i, begins[region])
        for i, text in enumerate(body)
        for region in _JUMP.findall(text)
        if begins.get(region, -1) > i
    ]
    grid = tuple(int(size) for size in bounds[1].replace(" ", "").split(",") if size)
    return _without_edges(grid, len(body), parts) if parts else Cycles(grid, len(body), 0)


def _without_edges(grid: tuple[int, ...], step: int, parts: list[tuple[int, int]]) -> Cycles:
    length = lambda part: part[1] - part[0]  # noqa: E731
    whole, *inner = sorted(parts, key=length, reverse=True)
    work = inner[0] if inner and length(inner[0]) > length(whole) / 2 else whole
    edge = sum(
        length(part)
        for part in inner
        if length(part) >= _WORK and (part[1] <= work[0] or part[0] >= work[1])
    )
    return Cycles(grid, step - edge, edge, step - edge - length(work))


# --- Compiling ---


def measure(kernel: Kernel) -> Cycles:
    """Compiles a kernel in a process of its own and counts its cycles.

    Raises:
        DoesNotFit: if its blocks are too large.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"LIBTPU_INIT_ARGS": _DUMP.format(folder=folder)}
        # libtpu reads its options once, when it is loaded.
        child = subprocess.run(
            [sys.executable, "-m", __spec__.name, f"--compile={json.dumps(asdict(kernel))}"],
            env=os.environ | ENVIRONMENT | options,
            capture_output=True,
            text=True,
        )
        if child.returncode:
            if re.search("out of memory|exceed.*(vmem|limit)", child.stderr, re.IGNORECASE):
                raise DoesNotFit(f"{kernel} does not fit.")
            raise RuntimeError(f"{kernel} does not compile:\n{child.stderr[-2000:]}")
        word = kernel.name.replace("splash_bwd", "splash_dkv").replace("splash_", "splash_mha_")
        found = [
            path
            for path in Path(folder).glob(f"*{word}*final_bundles.txt")
            if "schedule" not in path.name
        ]
        if len(found) != 1:
            raise RuntimeError(f"libtpu wrote {len(found)} programs of {word}, expected one.")
        return count_cycles(found[0].read_text())


def _compile(kernel: Kernel) -> None:
    device = pod_devices(TOPOLOGIES[kernel.generation])[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)  # noqa: E731
    heads = lambda length: array(HEADS, length, HEAD_DIM)  # noqa: E731
    keys = heads(kernel.keys), heads(kernel.keys)
    if kernel.name.startswith("norm_rope"):
        _compile_norm_rope(kernel, array)
        return
    attention = _attention(kernel)
    if kernel.name.startswith("splash_fwd"):
        function, arguments = lambda *x: jax.vjp(attention, *x), (heads(kernel.queries), *keys)
    else:
        function = lambda dy, *x: jax.vjp(attention, *x)[1](dy)  # noqa: E731
        arguments = heads(kernel.queries), heads(kernel.queries), *keys
    jax.jit(function).lower(*arguments).compile()


def _compile_norm_rope(kernel: Kernel, array: Callable) -> None:
    x, scale = array(1, kernel.queries, HEADS * HEAD_DIM), array(HEAD_DIM)
    tables = (array(kernel.queries, HEAD_DIM),) * 2
    rope = lambda x, scale, *tables: norm_rope(x, scale, tables, HEAD_DIM**-0.5)  # noqa: E731
    if kernel.name == "norm_rope_fwd":
        function, arguments = rope, (x, scale, *tables)
    else:
        function = lambda dy, x, scale, *tables: jax.vjp(  # noqa: E731
            lambda x, scale: rope(x, scale, *tables), x, scale
        )[1](dy)
        arguments = array(1, HEADS, kernel.queries, HEAD_DIM), x, scale, *tables
    jax.jit(function).lower(*arguments).compile()


def _attention(kernel: Kernel) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    phase = kernel.name.removesuffix("_segmented")
    small = dict(q=128, kv=128, kv_compute=128)  # of the kernels that are not counted: any
    ours = dict(q=kernel.block_q, kv=kernel.block_kv, kv_compute=kernel.block_kv_compute)
    sizes = {
        "block_" + name: size for name, size in (ours if phase == "splash_fwd" else small).items()
    }
    backward = small if phase in ("splash_fwd", "splash_dq") else ours
    dkv = dict(
        block_q_dkv=backward["q"],
        block_kv_dkv=backward["kv"],
        block_kv_dkv_compute=backward["kv_compute"],
    )
    if phase in ("splash_dq", "splash_dkv"):
        dq = ours if phase == "splash_dq" else small
        dkv |= dict(block_q_dq=dq["q"], block_kv_dq=dq["kv"])
    kind = splash_attention_mask.CausalMask if kernel.causal else splash_attention_mask.FullMask
    mask = kind((kernel.queries, kernel.keys))
    attention = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * HEADS),
        block_sizes=splash_attention_kernel.BlockSizes(
            **sizes, **dkv, use_fused_bwd_kernel=phase not in ("splash_dq", "splash_dkv")
        ),
        head_shards=1,
        q_seq_shards=1,
    )
    if phase == kernel.name:
        return attention
    segments = splash_attention_kernel.SegmentIds(
        jnp.zeros(kernel.queries, jnp.int32),
        (jnp.arange(kernel.keys) == kernel.keys - 1).astype(jnp.int32),  # as if one were padding
    )
    return lambda q, k, v: attention(q, k, v, segment_ids=segments)


# --- The table ---


def kernels(generation: str) -> Iterator[Kernel]:
    """What the table has of a generation."""
    wanted = [("splash_fwd", blocks) for blocks in FORWARD]
    wanted += [("splash_bwd", blocks) for blocks in BACKWARD]
    wanted += [(name, blocks) for blocks in SPLIT for name in ("splash_dq", "splash_dkv")]
    wanted += [
        (f"splash_{name}_segmented", blocks) for blocks in SEGMENTED for name in ("fwd", "bwd")
    ]
    if generation == "v5p":
        wanted += [(f"splash_{name}_segmented", _WAN) for name in ("fwd", "dq", "dkv")]
    for name, (q, kv, compute) in wanted:
        # Lengths that the blocks divide.
        queries, keys = (size * math.ceil(_LENGTH / size) for size in (q, kv))
        yield Kernel(name, generation, queries, kv if kv == 512 else keys, q, kv, compute)
    for name in ("norm_rope_fwd", "norm_rope_bwd"):
        yield Kernel(name, generation, _LENGTH, 0, block_rows(_LENGTH), 0, 0)


def make_table(generations: list[str]) -> None:
    """Adds to the table what it lacks of these generations; all of it after a new libtpu."""
    libtpu = importlib.metadata.version("libtpu")
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    if table.get("about", {}).get("libtpu") != libtpu:
        table = {"about": {"too_large": {}}}
    table["about"] |= {
        "command": "python -m launch.benchmarks.tpu_kernels",
        "libtpu": libtpu,
        "jax": importlib.metadata.version("jax"),
        "made": str(datetime.date.today()),
    }
    for generation in generations:
        too_large = table["about"]["too_large"].setdefault(generation, [])
        fits = {_key(row): row for row in table.get(generation, [])}
        known = fits.keys() | {_key(row) for row in too_large}
        wanted = [(kernel, _row(kernel)) for kernel in kernels(generation)]
        for kernel, row in wanted:
            if _key(row) in known:
                continue
            try:
                cycles = measure(kernel)
            except DoesNotFit:
                too_large.append(row)
                print(generation, *_key(row), "does not fit", flush=True)
            else:
                counted = {"cycles_per_step": round(cycles.per_step, 1), "edge_cycles": cycles.edge}
                fits[_key(row)] = row | counted
                print(generation, *_key(row), f"{cycles.per_step:.0f}", flush=True)
            # In the order of the list, whichever was counted first.
            table[generation] = [fits[_key(r)] for _, r in wanted if _key(r) in fits]
            write_json(TABLE, table)


def _row(kernel: Kernel) -> dict:
    row = asdict(kernel)
    del row["generation"], row["causal"]
    if kernel.name.startswith("norm_rope"):
        row = {"name": kernel.name, "queries": kernel.queries, "rows": kernel.block_q}
    return {"kernel": row.pop("name"), "head_dim": HEAD_DIM} | row


def _key(row: dict) -> tuple:
    return tuple(
        row.get(name) for name in ("kernel", "block_q", "block_kv", "block_kv_compute", "rows")
    )


# --- Comparing block sizes ---

LENGTHS = [(19200, 19200), (9600, 19200), (2400, 19200), (2400, 2400), (19200, 512), (2400, 512)]
_BACKWARD = {"fused": ("splash_bwd",), "split": ("splash_dq", "splash_dkv")}


def compare_blocks(generation: str) -> str:
    """Lists of the milliseconds that attention takes by block sizes, fastest first.

    For 16 heads, all cores of a device at work. The fused backward pass includes the sum of the
    partial dq that it makes for every block of keys.
    """
    table = {_key(row): row for row in json.loads(TABLE.read_text())[generation]}
    blocks = list(dict.fromkeys(key[1:4] for key in table if key[1] is not None))
    lines = [f"## {generation}", ""]
    for what, kinds in {"forward": {"": ("splash_fwd",)}, "backward": _BACKWARD}.items():
        for queries, keys in LENGTHS:
            times = {}
            for sizes in blocks:
                for kind, names in kinds.items():
                    rows = [table.get((name, *sizes, None)) for name in names]
                    if all(rows) and _padding(sizes, queries, keys) < 1.3:
                        seconds = [attention_seconds(r, queries, keys, generation) for r in rows]
                        times["/".join(map(str, sizes)) + f" {kind}"] = 1e3 * sum(seconds)
            best = sorted(times.items(), key=lambda item: item[1])[:6]
            listed = ", ".join(f"{name.strip()} {ms:.2f}" for name, ms in best)
            lines.append(f"- {what} {queries:,} x {keys:,}: {listed}")
    return "\n".join(lines)


def attention_seconds(row: dict, queries: int, keys: int, generation: str) -> float:
    """The time of a kernel of the table for `HEADS` heads of other lengths."""
    chip = pod_size(TOPOLOGIES[generation])[1]
    blocks = row["block_q"], row["block_kv"]
    counts = [-(-length // block) for length, block in zip((queries, keys), blocks)]
    # The grid runs over keys last, or over queries; the ends of a row come once for as many steps.
    last = 1 if row["kernel"] in ("splash_fwd", "splash_dq") else 0
    measured = (row["queries"], row["keys"])[last] // blocks[last]
    cycles = row["cycles_per_step"] + row["edge_cycles"] * (1 / counts[last] - 1 / measured)
    seconds = HEADS * counts[0] * counts[1] * cycles / chip.cores / chip.clock
    if row["kernel"] == "splash_bwd":
        dq = HEADS * counts[0] * blocks[0] * HEAD_DIM * 2  # bytes; each block of keys has one
        seconds += (counts[1] + 1) * dq / (HBM_SHARE * chip.hbm_bandwidth)
    return seconds


def _padding(blocks: tuple[int, ...], queries: int, keys: int) -> float:
    padded = [length + -length % block for length, block in zip((queries, keys), blocks[:2])]
    return math.prod(padded) / (queries * keys)


def main() -> None:
    """Makes the table or compares block sizes."""
    if COMPILE.value:
        _compile(Kernel(**json.loads(COMPILE.value)))
        return
    unknown = set(CHOSEN.value) - set(TOPOLOGIES)
    if unknown:
        raise ValueError(
            f"--generations takes some of {', '.join(TOPOLOGIES)}; got {', '.join(unknown)}."
        )
    if BLOCKS.value:
        print("\n\n".join(map(compare_blocks, CHOSEN.value)))
    else:
        make_table(CHOSEN.value)


if __name__ == "__main__":
    run(main)
