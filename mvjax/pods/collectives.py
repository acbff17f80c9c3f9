"""The exchanges between devices of a compiled program, read from its HLO text.

Three habits of the TPU compiler need care:

- An all-gather that overlaps other work is one instruction in each of the fusions that move it
  forward, all with the same chain_id; it is counted once.
- A reduce-scatter is an all-reduce inside a computation called all-reduce-scatter.
- Transfers between slices are sends to a runtime on the host ("megascale"), which makes them.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass

from mvjax.pods.hlo import HLO, Instruction

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_KIND = re.compile(rf"(?:ragged-)?({'|'.join(KINDS)})(-start)?")
_TRANSFER = r'_xla_megascale_transfer_type="(\w+)"'
_CHAIN = r'chain_id="(\d+)"'
# Groups of devices: {{0,1},{2,3}}, or [2,2]<=[4], or mesh['a'=2,'b'=2] {'b'}; the last may name
# parts of an axis, 'a':(1)2 for two devices after a factor of 1.
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")
_MESH = re.compile(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}")


@dataclass(frozen=True)
class Collective:
    """All exchanges of one kind in one run of a program.

    Attributes:
        kind: "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", ...
        across_slices: Whether over the network between TPU slices.
        count: How often.
        sent_bytes: What one device sends for them in rings: with n devices, (n - 1)/n of an array
            that is gathered or scattered, twice that for an all-reduce. Across slices, what it
            hands to its host.
        exposed_bytes: The part of it that is sent while the device computes nothing.
    """

    kind: str
    across_slices: bool
    count: int
    sent_bytes: float
    exposed_bytes: float = 0.0


def collectives(program: HLO, devices: int) -> list[Collective]:
    """The collectives of a program, largest first.

    An exchange overlaps other work if it has a start and a done, or a chain_id; those across slices
    always do.

    Args:
        program: The compiled one, all of it.
        devices: Number of devices of a slice; the group of a collective that names none.
    """
    totals: defaultdict[tuple[str, bool], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    chains: set[str] = set()
    for instruction, times in program.runs(inside_fusions=True):
        if not is_exchange(instruction):
            continue
        chain = instruction.attribute(_CHAIN)
        if chain in chains:
            continue
        if chain:
            chains.add(chain)
        kind, across, sent = _exchange(instruction, devices)
        if across or sent:  # a group of one device exchanges nothing
            total = totals[kind, across]
            total[0] += times
            total[1] += times * sent
            if not (across or chain or instruction.op.endswith("-start")):
                total[2] += times * sent
    found = [Collective(*key, int(n), *sizes) for key, (n, *sizes) in totals.items()]
    return sorted(found, key=lambda c: -c.sent_bytes)


def is_exchange(instruction: Instruction) -> bool:
    """Whether an instruction sends something to other devices; not the end of a sending."""
    if instruction.op == "send":
        return bool(instruction.attribute(_TRANSFER))
    return _KIND.fullmatch(instruction.op) is not None


def _exchange(instruction: Instruction, devices: int) -> tuple[str, bool, float]:
    """Kind, whether across slices, and the bytes that one device sends."""
    sizes = [array.bytes for array in instruction.results]
    if instruction.op == "send":
        kind = instruction.attribute(_TRANSFER).lower().replace("_", "-")
        return kind, True, max(sizes)
    kind, start = _KIND.fullmatch(instruction.op).groups()
    size, n = float(sum(sizes)), _group_size(instruction.text, devices)
    if kind == "collective-permute":
        return kind, False, max(sizes) if start else size  # a start's type: input, output, contexts
    if start and kind == "all-gather":  # a start's type: inputs, outputs
        size *= n / (n + 1)
    if kind == "reduce-scatter":
        size *= n
    if "all-reduce-scatter" in instruction.computation:
        kind = "reduce-scatter"
    return kind, False, (2 if kind == "all-reduce" else 1) * size * (n - 1) / n


def _group_size(text: str, devices: int) -> int:
    if listed := _LISTED.search(text):
        return listed[1].count(",") + 1
    if iota := _IOTA.search(text):
        return int(iota[1])
    if mesh := _MESH.search(text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        chosen = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in chosen)
    return devices
