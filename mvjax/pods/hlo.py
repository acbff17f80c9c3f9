"""The text of a compiled program (HLO): computations, instructions, and how often each one runs.

`compiled.as_text()` is a list of computations. Those called by others (fusions, loops, branches)
are followed from the entry, a loop's body as often as it runs. The TPU compiler rarely states the
length of a loop; it follows from the constant that the counter is compared with, and from the one
that is added to it (matrix products that gather as they go take two parts per iteration). A loop
whose length cannot be read counts once.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^ +(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(")
_CALLED = re.compile(
    r"(?:calls|to_apply|(?:branch|called)_computations|(?:true|false)_computation)"
    r"=(\{.*?\}|%?[\w.-]+)"
)
_LOOP = re.compile(r"condition=%?([\w.-]+), body=%?([\w.-]+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ELEMENT = re.compile(r"index=(\d+)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_OPENING, _CLOSING = "([{", ")]}"
LANES = 128  # of a TPU's vector registers: the last dimension of an array is padded to them


@dataclass(frozen=True)
class Array:
    """One array of an instruction's type.

    Attributes:
        dtype: As HLO spells it, "bf16".
        shape: Its dimensions.
        layout: Order of the dimensions from the fastest, tiles and memory: "1,0:T(8,128)S(1)".
    """

    dtype: str
    shape: tuple[int, ...]
    layout: str = ""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bits(self) -> int:
        """Of an element."""
        return 8 if self.dtype == "pred" else int(re.search(r"\d+", self.dtype)[0])

    @property
    def bytes(self) -> float:
        """Of all elements, without padding."""
        return self.size * self.bits / 8

    @property
    def padded_bytes(self) -> float:
        """With the fastest dimension padded to the lanes of a TPU."""
        fastest = re.match(r"\d+", self.layout)
        if fastest is None or len(self.shape) < 2:
            return self.bytes
        length = self.shape[int(fastest[0])]
        return self.bytes * (-(-length // LANES) * LANES) / max(length, 1)

    @property
    def in_hbm(self) -> bool:
        """Whether it lies in the device's memory: not on the chip (VMEM), not in the host."""
        return "S(" not in self.layout


def arrays(type_text: str) -> list[Array]:
    """The arrays of a type, "(f32[8,128]{1,0:T(8,128)}, bf16[])"."""
    return [
        Array(dtype, tuple(int(size) for size in shape.split(",") if size), layout)
        for dtype, shape, layout in _ARRAY.findall(type_text)
    ]


@dataclass(frozen=True, eq=False)
class Instruction:
    """One instruction of a computation.

    Attributes:
        name: Unique within its computation.
        type: Of its result, as text.
        op: "fusion", "while", "all-gather-start", ...
        computation: Name of the computation it stands in.
        root: Whether it is the computation's result.
        text: All of it, attributes included.
        rest: The text from its first operand on.
    """

    name: str
    type: str
    op: str
    computation: str
    root: bool
    text: str
    rest: str

    @cached_property
    def results(self) -> list[Array]:
        """The arrays it makes."""
        return arrays(self.type)

    @cached_property
    def operands(self) -> list[str]:
        """Names of what it reads; for a constant or a parameter its value or number."""
        found, depth, first = [], 0, 0
        for i, letter in enumerate(self.rest):
            if letter in _OPENING:
                depth += 1
            elif letter in _CLOSING and depth:
                depth -= 1
            elif letter == ")" or (letter == "," and not depth):
                found.append(self.rest[first:i])
                first = i + 1
                if letter == ")":
                    break
        # An operand may stand behind its type or a comment: "f32[8]{0} %x", "/*index=5*/%y".
        return [words[-1].rpartition("%")[2] for operand in found if (words := operand.split())]

    @cached_property
    def called(self) -> list[str]:
        """Names of the computations it calls; not those of a loop."""
        return [name for group in _CALLED.findall(self.rest) for name in _names(group)]

    def attribute(self, pattern: str) -> str:
        """The first group of a pattern that its text matches; "" if none does."""
        found = re.search(pattern, self.text)
        return found[1] if found else ""


class HLO:
    """A compiled program.

    Args:
        text: Of the optimised program (`compiled.as_text()`).

    Attributes:
        computations: By name: their instructions, by name.
        entry: Name of the computation that is run.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        self._header: list[str] = []
        here, lines = "", []
        for line in text.splitlines():
            if start := _COMPUTATION.match(line):
                here = start[2]
                self.entry = here if start[1] or not self.entry else self.entry
                self.computations[here], lines = {}, []
            elif not here:
                self._header.append(line)
            elif line == "}":
                self._add(here, lines)
                here, lines = "", []
            elif _INSTRUCTION.match(line):
                self._add(here, lines)
                lines = [line]
            else:
                lines.append(line)  # an attribute that spans several lines, as a kernel's metadata

    def _add(self, computation: str, lines: list[str]) -> None:
        start = _INSTRUCTION.match(lines[0]) if lines else None
        if start:
            root, name, type_text, op = start.groups()
            text = "\n".join(lines)
            made = Instruction(
                name, type_text, op, computation, bool(root), text, text[start.end() :]
            )
            self.computations[computation][name] = made

    def runs(self, inside_fusions: bool = False) -> Iterator[tuple[Instruction, int]]:
        """Every instruction that runs, with the number of its runs; loops and calls are followed.

        Args:
            inside_fusions: Whether to follow fusions, too.
        """
        return self._below(self.entry, 1, inside_fusions)

    def _below(self, name: str, times: int, fusions: bool) -> Iterator[tuple[Instruction, int]]:
        for instruction in self.computations.get(name, {}).values():
            yield instruction, times
            if instruction.op == "while":
                condition, body = _LOOP.search(instruction.rest).groups()
                trips = self._trips(instruction, condition, body)
                yield from self._below(body, times * trips, fusions)
            elif fusions or instruction.op in ("call", "conditional"):
                for called in instruction.called:
                    yield from self._below(called, times, fusions)

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions whose results another one reads."""
        made = self.computations[instruction.computation]
        return [made[name] for name in instruction.operands if name in made]

    def root(self, computation: str) -> Instruction | None:
        """The instruction whose result is that of a computation."""
        found = self.computations.get(computation, {}).values()
        return next((instruction for instruction in found if instruction.root), None)

    def _trips(self, loop: Instruction, condition: str, body: str) -> int:
        stated = _TRIP_COUNT.search(loop.rest)
        if stated:
            return int(stated[1])
        made, compared = self.computations.get(condition, {}), self.root(condition)
        if compared is None or compared.op != "compare" or "direction=LT" not in compared.rest:
            return 1
        element, limit = (made.get(name) for name in compared.operands)
        limit = _constant(limit)
        if element is None or element.op != "get-tuple-element" or limit is None:
            return 1
        index = int(_ELEMENT.search(element.rest)[1])
        return -(-limit // self._step(body, index))

    def _step(self, body: str, element: int) -> int:
        """What a loop's body adds to an element of its tuple."""
        made, root = self.computations.get(body, {}), self.root(body)
        if root is None or root.op != "tuple" or element >= len(root.operands):
            return 1
        added = made.get(root.operands[element])
        if added is None or added.op != "add":
            return 1
        steps = [_constant(made.get(name)) for name in added.operands]
        return next((step for step in steps if step), 1)

    def source(self, instruction: Instruction) -> str:
        """Where its operation was written, "layers.py:88 Linear.__call__", else its `op_name`."""
        number = instruction.attribute(r"stack_frame_id=(\d+)")
        frames = self._frames
        chain = []
        while number in frames and len(chain) < 64:
            place, number = frames[number]
            chain.append(place)
        for place in chain:
            if "Linear." not in place:  # every product is in `Linear`; its caller says which
                return place
        return instruction.attribute(r'op_name="([^"]*)"') or instruction.name

    @cached_property
    def _frames(self) -> dict[str, tuple[str, str]]:
        """Number of a stack frame -> (place, number of its caller), from the program's header."""
        tables: dict[str, dict[str, str]] = {}
        rows: dict[str, str] = {}
        for line in self._header:
            if re.fullmatch(r"\w+", line):
                rows = tables.setdefault(line, {})
            elif entry := re.match(r"(\d+) (.*)", line):
                rows[entry[1]] = entry[2]
        files, functions = tables.get("FileNames", {}), tables.get("FunctionNames", {})
        places = {}
        for number, row in tables.get("FileLocations", {}).items():
            fields = dict(re.findall(r"(\w+)=(\d+)", row))
            file = PurePath(files.get(fields.get("file_name_id", ""), "").strip('"')).name
            function = functions.get(fields.get("function_name_id", ""), "").strip('"')
            places[number] = f"{file}:{fields.get('line')} {function}"
        frames = {}
        for number, row in tables.get("StackFrames", {}).items():
            fields = dict(re.findall(r"(\w+)=(\d+)", row))
            caller = str(int(fields.get("parent_frame_id", "0")) - 1)  # 0 there means no caller
            frames[number] = places.get(fields.get("file_location_id", ""), ""), caller
        return frames


def _names(group: str) -> list[str]:
    return re.findall(r"[\w.-]+", group)


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.op != "constant":
        return None
    value = instruction.operands[0] if instruction.operands else ""
    return int(value) if value.isdecimal() else None
