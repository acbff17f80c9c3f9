"""How long a compiled TPU program takes, instruction by instruction, from its text.

No TPU is needed and no MFU is assumed. Of each instruction that runs on the TensorCore:

- A Pallas kernel takes what its cycles say, see `mvjax.pods.kernels`.
- A fusion with a matrix product takes the cycles that the compiler estimates for its window, or
  the time of its bytes if that is longer. These cycles are within 2 to 12 % of the instructions
  that a TPU executes; they are per core, after the split over two cores.
- Everything else takes the time of its bytes through the device's memory at 85 % of the published
  bandwidth. The compiler's own cycles for it are 1.2 to 12 times too many. Only erf computes longer
  than its bytes take, where the vector unit is slow.
- An exchange that nothing hides takes what it sends over the links. Those with a start and a done,
  and copies of that kind, run beside the rest and take no time of their own.

The result is the least time that each of them takes, so a range is given: `low` as computed,
`high` with the factors below, which cover what published measurements show. `middle` is the mean
of both; it is what rankings and rates are made from.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from mvjax.parallel import Chip
from mvjax.pods.collectives import Collective, is_exchange
from mvjax.pods.hlo import HLO, LANES, Array, Instruction
from mvjax.pods.kernels import HBM_SHARE, Table, is_kernel, kernel_table, kernel_time

# Published kernels take 1.01 times the computed time forward and 1.28 times backward.
FORWARD_HIGH, BACKWARD_HIGH = 1.05, 1.25
PRODUCTS_HIGH = 1.1
MEMORY_HIGH = 1.5
# Low: all links of a chip are busy. High: a ring uses two of a torus' four (half of its links).
EXCHANGES_HIGH = 2.0

# Cycles of the vector unit per 1,024 elements of erf, all cores of a device together: counted for
# v5p, v5e and v6e, taken for v4 and TPU7x from the one most like them.
_ERF_CYCLES = {"v4": 5.6, "v5p": 5.6, "v5e": 11.0, "v6e": 1.8, "tpu7x": 1.8}

PARTS = (
    "attention_kernels",
    "other_kernels",
    "products",
    "memory_bound",
    "copies",
    "reductions",
    "exposed_exchanges",
)
_SUBLANES = 8
_WORST = 5  # matrix products that are named
_GOOD_PRODUCT = 0.93  # share of the peak of a large matrix product, by which losses are measured

_NO_WORK = {  # names for what is there already, and control flow
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "call",
    "conditional",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
}
_MOVES = {
    "parameter",
    "constant",
    "copy",
    "transpose",
    "bitcast",
    "reshape",
    "slice",
    "concatenate",
    "fusion",
}
_SLICES = {"slice", "dynamic-slice", "gather"}
_PRODUCT = {"convolution", "dot"}
_ASYNCHRONOUS = {"send", "recv", "copy-start", "slice-start", "async-start", "async-update"}


@dataclass(frozen=True)
class Range:
    """Seconds, or a share, between two bounds.

    Attributes:
        low, high: The bounds.
        middle: Their mean for times; for a share what belongs to the middle time.
    """

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, low: float, high: float) -> "Range":
        """With the mean in the middle."""
        return cls(low, (low + high) / 2, high)

    def __add__(self, other: "Range") -> "Range":
        return Range(self.low + other.low, self.middle + other.middle, self.high + other.high)

    def share_of(self, best: float) -> "Range":
        """best / this: the shortest time is the highest share."""
        return Range(*(best / time for time in (self.high, self.middle, self.low)))


@dataclass(frozen=True)
class Product:
    """A fusion with a matrix product, all runs in a step together.

    Attributes:
        name: Of the instruction.
        source: Where it was written, file and function.
        window: Elements of the result that the matrix unit computes at a time, "16 x 2048".
        runs: How often.
        seconds: As computed, of all runs.
        peak_share: Of the device's peak, of its FLOPs in these seconds.
    """

    name: str
    source: str
    window: str
    runs: int
    seconds: float
    peak_share: float


@dataclass(frozen=True)
class Cost:
    """The time of one run of a program.

    Attributes:
        seconds: Of all of it.
        parts: Seconds by part (`PARTS`); they add up.
        products_peak_share: Of the device's peak, of all matrix products in their computed time.
        worst_products: Those that lose most time, worst first.
        notes: What was not known exactly, one sentence each.
    """

    seconds: Range
    parts: dict[str, Range]
    products_peak_share: float
    worst_products: tuple[Product, ...]
    notes: tuple[str, ...]


def cost(
    program: HLO,
    generation: str,
    chip: Chip,
    exchanges: Iterable[Collective] = (),
    table: Table | None = None,
) -> Cost:
    """The time that a program takes on one device.

    Args:
        program: Compiled for that generation.
        generation: Of the TPU, "v6e" (`mvjax.pods.topology.generation`).
        chip: Its figures.
        exchanges: Those of the program; what they do not hide is added.
        table: Cycles of kernels; those of the package by default.
    """
    work = _Work(program, generation, chip, kernel_table() if table is None else table)
    for instruction, times in program.runs():
        work.count(instruction, times)
    exposed = sum(c.exposed_bytes for c in exchanges if not c.across_slices)
    if exposed:
        work.add("exposed_exchanges", exposed / chip.link_bytes, EXCHANGES_HIGH)
    parts = {part: work.parts[part] for part in PARTS}
    seconds = sum(work.products_seconds.values())
    flops = sum(work.products_flops.values())
    return Cost(
        seconds=sum(parts.values(), Range(0.0, 0.0, 0.0)),
        parts=parts,
        products_peak_share=flops / (seconds * chip.peak_flops) if seconds else 0.0,
        worst_products=work.worst_products(),
        notes=tuple(dict.fromkeys(work.notes)),
    )


class _Work:
    """The time of a program, added up instruction by instruction."""

    def __init__(self, program: HLO, generation: str, chip: Chip, table: Table):
        self.program, self.generation, self.chip, self.table = program, generation, chip, table
        self.parts: defaultdict[str, Range] = defaultdict(lambda: Range(0.0, 0.0, 0.0))
        self.notes: list[str] = []
        self.products_seconds: defaultdict[Instruction, float] = defaultdict(float)
        self.products_flops: defaultdict[Instruction, float] = defaultdict(float)
        self.products_runs: defaultdict[Instruction, int] = defaultdict(int)
        self._ops: dict[str, set[str]] = {}

    def add(self, part: str, seconds: float, factor: float) -> None:
        self.parts[part] += Range.of(seconds, seconds * factor)

    def count(self, instruction: Instruction, times: int) -> None:
        op = instruction.op
        if op in _NO_WORK or op in _ASYNCHRONOUS or op.endswith("-done"):
            return
        if op == "custom-call":
            if is_kernel(instruction):
                self._kernel(instruction, times)
            return  # other calls reserve memory and the like
        ops = {op}.union(*(self.ops(called) for called in instruction.called))
        if ops & _PRODUCT:
            self._product(instruction, times)
        elif is_exchange(instruction) or any(map(_exchanges, ops)):
            return  # `collectives` counts them
        else:
            seconds = max(self._memory(instruction), self._erf(instruction, ops))
            self.add(_part(op, ops), times * seconds, MEMORY_HIGH)

    def ops(self, computation: str) -> set[str]:
        """The operations of a computation and of those it calls."""
        if computation not in self._ops:
            self._ops[computation] = set()  # ends a circle, of which HLO has none
            inside = self.program.computations.get(computation, {}).values()
            called = {name for instruction in inside for name in instruction.called}
            found = {instruction.op for instruction in inside}
            self._ops[computation] = found.union(*map(self.ops, called))
        return self._ops[computation]

    def worst_products(self) -> tuple[Product, ...]:
        peak = self.chip.peak_flops

        def lost(instruction: Instruction) -> float:
            best = self.products_flops[instruction] / (peak * _GOOD_PRODUCT)
            return self.products_seconds[instruction] - best

        def named(instruction: Instruction) -> Product:
            seconds = self.products_seconds[instruction]
            return Product(
                name=instruction.name,
                source=self.program.source(instruction),
                window=_window(instruction),
                runs=self.products_runs[instruction],
                seconds=seconds,
                peak_share=self.products_flops[instruction] / (seconds * peak) if seconds else 0.0,
            )

        worst = sorted(self.products_seconds, key=lost, reverse=True)[:_WORST]
        return tuple(map(named, worst))

    def _kernel(self, call: Instruction, times: int) -> None:
        read = [array for made in self.program.operands(call) for array in made.results]
        time = kernel_time(call, read, self.generation, self.chip, self.table)
        part = "attention_kernels" if time.attention else "other_kernels"
        self.add(part, times * time.seconds, BACKWARD_HIGH if time.backward else FORWARD_HIGH)
        if time.note:
            self.notes.append(time.note)

    def _product(self, instruction: Instruction, times: int) -> None:
        cycles = instruction.attribute(r'"window_config":\{[^}]*?"estimated_cycles":"(\d+)"')
        arithmetic = int(cycles or 0) / self.chip.clock
        seconds = times * max(arithmetic, self._memory(instruction))
        self.products_seconds[instruction] += seconds
        self.products_flops[instruction] += times * self._flops(instruction)
        self.products_runs[instruction] += times
        self.add("products", seconds, PRODUCTS_HIGH)

    def _flops(self, instruction: Instruction) -> float:
        """Of the matrix products in an instruction.

        However the compiler arranges [m, k] x [k, n], batches included, 2 m k n is twice the root
        of the three sizes' product. A convolution with a window over pictures has more.
        """
        if instruction.op in _PRODUCT:
            sizes = [made.results[0].size for made in self.program.operands(instruction)[:2]]
            return 2 * math.sqrt(math.prod(sizes) * instruction.results[0].size)
        inside = (self.program.computations.get(name, {}) for name in instruction.called)
        return sum(self._flops(inner) for made in inside for inner in made.values())

    def _erf(self, instruction: Instruction, ops: set[str]) -> float:
        if "erf" not in ops:
            return 0.0
        elements = max((array.size for array in instruction.results), default=0)
        return elements / 1024 * _ERF_CYCLES[self.generation] / self.chip.clock

    # --- Bytes through the device's memory ---

    def _memory(self, instruction: Instruction) -> float:
        """Seconds that the bytes of operands and results take."""
        moved = self._bytes_read(instruction) + self._bytes_written(instruction)
        return moved / (self.chip.hbm_bandwidth * HBM_SHARE)

    def _bytes_read(self, instruction: Instruction) -> float:
        if instruction.op in _SLICES:
            return _padded(instruction.results)
        made = self.program.computations[instruction.computation]
        fused = instruction.called[0] if instruction.op == "fusion" else None
        total = 0.0
        for i, name in enumerate(instruction.operands):
            if name not in made or made[name].type.startswith("("):
                continue
            for array in made[name].results:
                if array.in_hbm:
                    size = array.padded_bytes
                    total += self._parameter_bytes(fused, i, size) if fused else size
        return total

    def _parameter_bytes(self, computation: str, index: int, whole: float) -> float:
        """What a fusion reads of its operand: the slices, if it takes only slices of it."""
        inside = self.program.computations.get(computation, {})
        for name, instruction in inside.items():
            if instruction.op == "parameter" and instruction.operands == [str(index)]:
                return min(self._used_bytes(computation, name, whole), whole)
        return whole

    def _used_bytes(self, computation: str, name: str, whole: float) -> float:
        inside = self.program.computations[computation]
        if inside[name].root:
            return whole
        total = 0.0
        for user in inside.values():
            if name not in user.operands:
                continue
            if user.op in _SLICES:
                total += _padded(user.results)
            elif user.op == "dynamic-update-slice" and user.operands[0] == name:
                pass  # updated in place
            elif user.op == "bitcast" or _retiles(user):
                total += self._used_bytes(computation, user.name, whole)
            elif user.op == "fusion":
                index = user.operands.index(name)
                total += self._parameter_bytes(user.called[0], index, whole)
            else:
                return whole
        return total

    def _bytes_written(self, instruction: Instruction) -> float:
        results = instruction.results
        root = self.program.root(instruction.called[0]) if instruction.op == "fusion" else None
        if root is None:
            return _padded(array for array in results if array.in_hbm)
        names = root.operands if root.op == "tuple" else [root.name]
        pairs = zip(names, results, strict=False)
        return sum(
            self._updated_bytes(root.computation, name, array)
            for name, array in pairs
            if array.in_hbm
        )

    def _updated_bytes(self, computation: str, name: str, result: Array) -> float:
        """What is written of a result: the update, if it is an array that is updated in place."""
        inside = self.program.computations[computation]
        made = inside.get(name)
        while made is not None and (made.op == "bitcast" or _retiles(made)):
            made = inside.get(made.operands[0])
        if made is None or made.op != "dynamic-update-slice":
            return result.padded_bytes
        update = inside.get(made.operands[1])
        return _padded(update.results) if update else 0.0


def _retiles(instruction: Instruction) -> bool:
    """Whether an instruction inside a fusion only reads its operand in other tiles (TPU7x)."""
    return instruction.op == "fusion" and "output_to_operand_aliasing" in instruction.text


def _exchanges(op: str) -> bool:
    return op.startswith(("all-", "reduce-scatter", "collective-", "ragged-"))


def _part(op: str, ops: set[str]) -> str:
    if op in ("copy", "transpose") or (op == "fusion" and ops <= _MOVES):
        return "copies"
    return "reductions" if "reduce" in ops else "memory_bound"


def _window(instruction: Instruction) -> str:
    """The result's elements per turn, from bounds in tiles of 8 x 128; "" if it does not say."""
    bounds = instruction.attribute(r'"output_window_bounds":\[([^\]]*)\]')
    sizes = [int(size.strip('"')) for size in bounds.split(",")] if bounds else []
    for i, tile in enumerate((LANES, _SUBLANES)[: len(sizes)], 1):
        sizes[-i] *= tile
    leading = [size for size in sizes[:-2] if size > 1]
    return " x ".join(map(str, [*leading, *sizes[-2:]]))


def _padded(arrays: Iterable[Array]) -> float:
    return sum(array.padded_bytes for array in arrays)
