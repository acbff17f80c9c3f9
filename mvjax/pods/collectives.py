"""The exchanges between devices of a compiled program, read from its HLO text.

The text is a list of computations; those called by others (fusions, loops, branches) are followed
from the entry, a loop's body as often as it runs. Four habits of the TPU compiler need care:

- An all-gather that overlaps other work is one instruction in each of the fusions that move it
  forward, all with the same chain_id; it is counted once.
- A reduce-scatter is an all-reduce inside a computation called all-reduce-scatter.
- The length of a loop is not stated; it follows from the constant that its counter is compared
  with, and from the one that is added to it (matrix products that gather as they go take two
  parts per iteration). A loop whose length cannot be read counts once.
- Transfers between slices are sends to a runtime on the host ("megascale"), which makes them.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) (?:ragged-)?({_KINDS})(-start)?\(")
_TO_HOST = re.compile(r' = (.*?) send\(.*_xla_megascale_transfer_type="(\w+)"')
_CHAIN = re.compile(r'chain_id="(\d+)"')
_WHILE = re.compile(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|(?:branch|called)_computations|(?:true|false)_computation)"
    r"=(\{.*?\}|%?[\w.-]+)"
)
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_COMPARED = re.compile(r"^  ROOT .* compare\(%?([\w.-]+), %?([\w.-]+)\), direction=LT")
_ADDED = re.compile(r" add\(%?([\w.-]+), %?([\w.-]+)\)")
_ELEMENT = re.compile(r"get-tuple-element\(.*\), index=(\d+)")
_CONSTANT = re.compile(r" constant\((\d+)\)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
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
    """

    kind: str
    across_slices: bool
    count: int
    sent_bytes: float


def collectives(hlo: str, devices: int) -> list[Collective]:
    """The collectives of a program, largest first.

    Args:
        hlo: Text of the optimised program (`compiled.as_text()`).
        devices: Number of devices of a slice; the group of a collective that names none.
    """
    totals: defaultdict[tuple[str, bool], list[float]] = defaultdict(lambda: [0, 0.0])
    for inside, line, times in _Computations(hlo).exchanges():
        kind, across, sent = _exchange(inside, line, devices)
        if across or sent:  # a group of one device exchanges nothing
            totals[kind, across][0] += times
            totals[kind, across][1] += times * sent
    found = [Collective(*key, int(count), sent) for key, (count, sent) in totals.items()]
    return sorted(found, key=lambda c: -c.sent_bytes)


class _Computations:
    def __init__(self, hlo: str):
        self.lines: dict[str, list[str]] = {}
        self.entry = name = ""
        for line in hlo.splitlines():
            start = _COMPUTATION.match(line)
            if start:
                name = start[2]
                self.entry = name if start[1] else self.entry
                self.lines[name] = []
            elif name:
                self.lines[name].append(line)

    def exchanges(self) -> Iterator[tuple[str, str, int]]:
        """(computation, instruction, number of runs) of every collective."""
        chains: set[str] = set()
        for name, line, times in self._below(self.entry, 1):
            chain = _CHAIN.search(line)
            if chain is None or chain[1] not in chains:
                yield name, line, times
            if chain:
                chains.add(chain[1])

    def _below(self, name: str, times: int) -> Iterator[tuple[str, str, int]]:
        for line in self.lines.get(name, ()):
            if loop := _WHILE.search(line):
                yield from self._below(loop[2], times * self._trips(line, *loop.groups()))
            elif _COLLECTIVE.search(line) or _TO_HOST.search(line):
                yield name, line, times
            else:
                for called in _CALLED.findall(line):
                    for inner in re.findall(r"[\w.-]+", called):
                        yield from self._below(inner, times)

    def _trips(self, line: str, condition: str, body: str) -> int:
        stated = _TRIP_COUNT.search(line)
        if stated:
            return int(stated[1])
        made = self._definitions(condition)
        compared = next(filter(None, map(_COMPARED.search, self.lines.get(condition, ()))), None)
        if compared is None:
            return 1
        element, limit = (made.get(name, "") for name in compared.groups())
        element, limit = _ELEMENT.search(element), _CONSTANT.search(limit)
        if element is None or limit is None:
            return 1
        return -(-int(limit[1]) // self._step(body, int(element[1])))

    def _step(self, body: str, element: int) -> int:
        """What a loop's body adds to an element of its tuple."""
        made = self._definitions(body)
        root = next((row for row in self.lines[body] if " tuple(" in row and "ROOT" in row), "")
        results = re.findall(r"%([\w.-]+)", root.partition(" tuple(")[2].partition(")")[0])
        added = _ADDED.search(made.get(results[element], "")) if element < len(results) else None
        steps = [_CONSTANT.search(made.get(name, "")) for name in added.groups()] if added else []
        return next((int(step[1]) for step in steps if step), 1)

    def _definitions(self, name: str) -> dict[str, str]:
        split = (row.strip().removeprefix("ROOT ").partition(" = ") for row in self.lines[name])
        return {variable.lstrip("%"): row for variable, _, row in split}


def _exchange(inside: str, line: str, devices: int) -> tuple[str, bool, float]:
    """Kind, whether across slices, and the bytes that one device sends."""
    if to_host := _TO_HOST.search(line):
        kind = to_host[2].lower().replace("_", "-")
        return kind, True, max(_array_bytes(to_host[1]))
    result, kind, start = _COLLECTIVE.search(line).groups()
    sizes, n = _array_bytes(result), _group_size(line, devices)
    size = float(sum(sizes))
    if kind == "collective-permute":
        return kind, False, max(sizes) if start else size  # a start's type: input, output, contexts
    if start and kind == "all-gather":  # a start's type: inputs, outputs
        size *= n / (n + 1)
    if kind == "reduce-scatter":
        size *= n
    if "all-reduce-scatter" in inside:
        kind = "reduce-scatter"
    return kind, False, (2 if kind == "all-reduce" else 1) * size * (n - 1) / n


def _group_size(line: str, devices: int) -> int:
    if listed := _LISTED.search(line):
        return listed[1].count(",") + 1
    if iota := _IOTA.search(line):
        return int(iota[1])
    if mesh := _MESH.search(line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        chosen = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in chosen)
    return devices


def _array_bytes(type_text: str) -> list[float]:
    return [
        math.prod(int(size) for size in shape.split(",") if size)
        * (8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0]))
        / 8
        for dtype, shape in _ARRAY.findall(type_text)
    ]
