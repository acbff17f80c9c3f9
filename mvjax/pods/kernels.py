"""How long the Pallas kernels of a compiled program take.

The compiler knows nothing about them, so `kernel_cycles.json` holds, for each generation and block
sizes, the cycles of one step of a kernel's grid on one TensorCore, counted from the instructions
that a TPU executes (`launch.benchmarks.tpu_kernels` makes it):

    seconds = cycles per step x steps of the grid / cores that share the grid / clock

or the time that its operands and results take through the device's memory, if that is longer.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mvjax.parallel import Chip
from mvjax.pods.hlo import LANES, Array, Instruction

Table = Mapping[str, Sequence[Mapping[str, Any]]]  # generation -> entries

HBM_SHARE = 0.85  # of the published memory bandwidth that a long stream reaches

_KERNEL = re.compile(r"(splash)_\w*?(fwd|dkv|dq)|(norm_rope)_(fwd|bwd)")
_METADATA = re.compile(r'"xprof_metadata":"(\{.*?\})"')
# What splash calls the blocks of each kernel: block_q, block_q_dkv, block_q_dq.
_SUFFIXES = {"splash_fwd": "", "splash_bwd": "_dkv", "splash_dkv": "_dkv", "splash_dq": "_dq"}
# FLOPs per query, key and channel: two matrix products forward, five in the fused backward pass.
_FLOPS = {"splash_fwd": 4, "splash_bwd": 10, "splash_dkv": 8, "splash_dq": 6}
# The share of the peak that attention over heads of 128 reaches where no cycles were counted. The
# matrix units of v6e and TPU7x are 256 wide, so such heads use half of them at best.
_FALLBACK_SHARE = {"v6e": 0.3, "tpu7x": 0.3}
_FALLBACK_SHARE_NARROW = 0.6  # of v4, v5e and v5p, whose matrix units are 128 wide


@dataclass(frozen=True)
class KernelTime:
    """The time of one run of a Pallas kernel.

    Attributes:
        name: As in the table of cycles; the kernel's own name where it is not known.
        seconds: Of one run.
        backward: Whether it belongs to the backward pass.
        note: How the time was found if not from the table's own figure; "" if from that.
    """

    name: str
    seconds: float
    backward: bool
    note: str = ""

    @property
    def attention(self) -> bool:
        """Whether it computes attention."""
        return self.name.startswith("splash")


@cache
def kernel_table() -> Table:
    """The table of cycles that comes with the package, generation -> entries."""
    content = json.loads((Path(__file__).parent / "kernel_cycles.json").read_text())
    return {name: entries for name, entries in content.items() if isinstance(entries, list)}


def is_kernel(instruction: Instruction) -> bool:
    """Whether an instruction runs a Pallas kernel."""
    return 'custom_call_target="tpu_custom_call"' in instruction.rest


def kernel_time(
    call: Instruction, operands: Sequence[Array], generation: str, chip: Chip, table: Table
) -> KernelTime:
    """The time of one run of a kernel.

    Args:
        call: The instruction that runs it.
        operands: The arrays it reads.
        generation: Of the TPU, "v5p".
        chip: Its figures.
        table: Of `kernel_table`.
    """
    in_memory = sum(array.padded_bytes for array in [*operands, *call.results] if array.in_hbm)
    memory = in_memory / (chip.hbm_bandwidth * HBM_SHARE)
    found = _KERNEL.search(call.name) or _KERNEL.search(call.attribute(r'op_name="([^"]*)"'))
    if found is None:
        name = call.name.partition(".")[0]
        note = f"the kernel {name} is not known: its memory traffic alone is counted"
        return KernelTime(name, memory, False, note)
    floats = [array for array in operands if array.dtype in ("bf16", "f32", "f16")]
    if found[3]:
        name = f"{found[3]}_{found[4]}"
        return _norm_rope(name, floats, memory, generation, chip, table)
    name = f"{found[1]}_{found[2]}"
    q, k = [array for array in floats if len(array.shape) >= 3][:2]
    # The fused backward kernel is the dkv kernel with dq as a third result, beside its scratch.
    results = [array for array in call.results if len(array.shape) >= len(k.shape)]
    name = "splash_bwd" if name == "splash_dkv" and len(results) == 3 else name
    # Padded keys are masked by numbers of segments, one for each query and key.
    masked = any(array.dtype == "s32" and q.shape[-2] in array.shape for array in operands)
    return _splash(name, masked, q, k, _blocks(call, name), memory, generation, chip, table)


def _splash(
    name: str,
    masked: bool,
    q: Array,
    k: Array,
    blocks: Mapping[str, int],
    memory: float,
    generation: str,
    chip: Chip,
    table: Table,
) -> KernelTime:
    *leading, queries, head_dim = q.shape  # [..., heads, length, head_dim]
    keys, backward = k.shape[-2], name != "splash_fwd"
    # The grid's axis of heads is split over two cores in the forward kernel alone; an axis that
    # `vmap` puts in front (several clips, parts of the heads) in all of them.
    parallel = leading[:-1] if backward else leading
    used = _cores(parallel) if chip.cores == 2 else 1.0
    what = f"{name} with blocks of {_sizes(blocks)}" if blocks else f"{name} with unknown blocks"
    entries = table.get(generation, ())
    nearest = _nearest(entries, f"{name}_segmented", head_dim, blocks) if masked else None
    nearest = nearest or _nearest(entries, name, head_dim, blocks)
    if nearest is None:
        share = _FALLBACK_SHARE.get(generation, _FALLBACK_SHARE_NARROW)
        flops = _FLOPS[name] * math.prod(leading) * queries * keys * head_dim
        seconds = flops / (chip.peak_flops * share) * chip.cores / used
        note = f"no cycles of {what}, heads of {head_dim}, on {generation}: {share:.0%} of the peak"
        return KernelTime(name, max(seconds, memory), backward, f"{note} is assumed")
    area = blocks["block_q"] * blocks["block_kv"]
    cycles = nearest["cycles_per_step"] * area / (nearest["block_q"] * nearest["block_kv"])
    steps = math.prod(leading) * -(-queries // blocks["block_q"]) * -(-keys // blocks["block_kv"])
    exact = all(nearest.get(key) == size for key, size in blocks.items())
    note = f"cycles of {what} on {generation} are scaled from those of {_sizes(nearest)}"
    note = "" if exact else note
    return KernelTime(name, max(cycles * steps / used / chip.clock, memory), backward, note)


def _sizes(blocks: Mapping[str, Any]) -> str:
    """Queries, keys, and keys that are computed together: "1280 x 1280 (640 at a time)"."""
    compute = blocks.get("block_kv_compute")
    together = f" ({compute} at a time)" if compute else ""
    return f"{blocks['block_q']} x {blocks['block_kv']}{together}"


def _norm_rope(
    name: str,
    operands: Sequence[Array],
    memory: float,
    generation: str,
    chip: Chip,
    table: Table,
) -> KernelTime:
    entries = [entry for entry in table.get(generation, ()) if entry["kernel"] == name]
    backward = name.endswith("bwd")
    if not entries or not operands:
        note = f"no cycles of {name} on {generation}: its memory traffic alone is counted"
        return KernelTime(name, memory, backward, note)
    # One step handles so many rows of one head, and every axis of the grid is split over the cores.
    largest, entry = max(array.size for array in operands), entries[0]
    steps = largest / (entry["rows"] * LANES)
    seconds = entry["cycles_per_step"] * steps / chip.cores / chip.clock
    return KernelTime(name, max(seconds, memory), backward)


def _blocks(call: Instruction, name: str) -> dict[str, int]:
    """block_q, block_kv and block_kv_compute of a splash kernel; {} where it does not say them."""
    metadata = _METADATA.search(call.text)
    if metadata is None:
        return {}
    sizes, suffix = json.loads(metadata[1].replace('\\"', '"')), _SUFFIXES[name]
    keys = {
        "block_q": f"block_q{suffix}",
        "block_kv": f"block_kv{suffix}",
        "block_kv_compute": f"block_kv{suffix}_compute",
    }
    found = {key: sizes[theirs] for key, theirs in keys.items() if sizes.get(theirs)}
    return found if {"block_q", "block_kv"} <= found.keys() else {}


def _nearest(
    entries: Sequence[Mapping[str, Any]], name: str, head_dim: int, blocks: Mapping[str, int]
) -> Mapping[str, Any] | None:
    """The entry of a kernel whose blocks are most like the given ones; None if there is none."""
    if not blocks:
        return None
    same = [e for e in entries if e["kernel"] == name and e.get("head_dim") == head_dim]

    def distance(entry: Mapping[str, Any]) -> float:
        return sum(abs(math.log(entry[k] / size)) for k, size in blocks.items() if entry.get(k))

    return min(same, key=distance, default=None)


def _cores(axes: Sequence[int]) -> float:
    """How many times as fast two cores are that share the best of several parallel axes."""
    return max((n / -(-n // 2) for n in axes), default=1.0)
