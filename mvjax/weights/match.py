"""Which of a file's tensors is which of our parameters, and everything that does not fit."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from mvjax.training.checkpoint import leaf_paths
from mvjax.weights.files import Tensors, TorchTensor, WeightsError
from mvjax.weights.names import Rule, Rules

_BLOCK = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Parameter:
    """One of our parameters and the tensors it is made of.

    Attributes:
        rule: how.
        names: the tensors' names, one per block for stacked parameters.
        tensors: the tensors.
    """

    rule: Rule
    names: tuple[str, ...]
    tensors: tuple[TorchTensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Our shape of one tensor, without the axis of the blocks."""
        return self.rule.layout.ours_shape(self.tensors[0].shape)


@dataclass(frozen=True)
class Match:
    """What `match` found.

    Attributes:
        parameters: by dotted path; those of which at least one tensor is there.
        blocks: the number of blocks.
        missing: names that the rules ask for and the file lacks.
        unknown: names that the file holds and no rule knows.
    """

    parameters: dict[str, Parameter]
    blocks: int
    missing: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def shape(self, path: str) -> tuple[int, ...]:
        """Our shape of a parameter, of one block if stacked.

        Raises:
            WeightsError: if the file has no tensor of it, or one with other axes; with all that is
                missing.
        """
        if path not in self.parameters:
            raise _misfit(self, [])
        parameter = self.parameters[path]
        try:
            return parameter.shape
        except ValueError:  # it has more axes than the layout, or fewer
            name, tensor = parameter.names[0], parameter.tensors[0]
            raise _misfit(self, [f"{name} is {list(tensor.shape)}"]) from None


def match(tensors: Tensors, rules: Rules) -> Match:
    """Assigns tensors to parameters by name; shapes are checked by `check_shapes`."""
    by_name = {rule.torch: rule for rule in rules}
    pieces: dict[str, dict[int, str]] = {}  # our path -> block -> name
    unknown, blocks = [], 0
    for name in tensors:
        rule, index = _rule_of(name, by_name)
        if rule is None:
            unknown.append(name)
            continue
        pieces.setdefault(rule.ours, {})[index] = name
        if rule.stacked:
            blocks = max(blocks, index + 1)
    parameters, missing = {}, []
    for rule in rules:
        wanted = range(max(blocks, 1)) if rule.stacked else (0,)
        found = pieces.get(rule.ours, {})
        missing += [rule.name(i) for i in wanted if i not in found]
        if found:
            names = tuple(found[i] for i in sorted(found))
            parameters[rule.ours] = Parameter(rule, names, tuple(tensors[name] for name in names))
    return Match(parameters, blocks, missing, unknown)


def _rule_of(name: str, by_name: Mapping[str, Rule]) -> tuple[Rule | None, int]:
    if name in by_name:
        return by_name[name], 0
    for found in _BLOCK.finditer(name):  # any of its numbers may be that of the block
        rule = by_name.get(f"{name[: found.start(1)]}{{i}}{name[found.end(1) :]}")
        if rule is not None:
            return rule, int(found[1])
    return None, 0


def check_shapes(found: Match, abstract: Mapping[str, Any]) -> None:
    """Raises unless the match is complete and every tensor has the network's shape.

    Args:
        found: the match.
        abstract: the network's tree of shapes.

    Raises:
        WeightsError: names all that is missing, unknown or misshapen.
    """
    shapes, misshapen = leaf_paths(abstract), []
    for path, parameter in found.parameters.items():
        shape, rule = shapes[path.replace(".", "/")].shape, parameter.rule
        expected = rule.layout.torch_shape(shape[1:] if rule.stacked else shape)
        misshapen += [
            f"{name} is {list(tensor.shape)} instead of {list(expected)}"
            for name, tensor in zip(parameter.names, parameter.tensors)
            if tensor.shape != expected
        ]
    if found.missing or found.unknown or misshapen:
        raise _misfit(found, misshapen)


def _misfit(found: Match, misshapen: list[str]) -> WeightsError:
    parts = {
        "missing": collapse(found.missing),
        "unknown": collapse(found.unknown),
        "misshapen": misshapen,
    }
    said = "; ".join(f"{part}: {', '.join(names)}" for part, names in parts.items() if names)
    return WeightsError(f"the tensors do not fit; {said}.")


def collapse(names: Iterable[str]) -> list[str]:
    """Names with runs of block numbers put together: "blocks.{0-27}.mlp.layer1.weight"."""
    numbered: dict[str, list[int]] = {}
    for name in names:
        found = _BLOCK.search(name)
        key = f"{name[: found.start(1)]}{{}}{name[found.end(1) :]}" if found else name
        numbered.setdefault(key, []).append(int(found[1]) if found else 0)
    result = []
    for key, numbers in numbered.items():
        # Numbers that follow each other have the same distance from their place in the order.
        runs = groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])
        ends = [(run[0][1], run[-1][1]) for run in (list(run) for _, run in runs)]
        spans = ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ends)
        result.append(key.replace("{}", spans if len(numbers) == 1 else f"{{{spans}}}"))
    return result
