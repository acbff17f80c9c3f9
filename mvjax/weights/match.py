"""Matching a file's tensors with our parameters, and reporting everything that does not fit."""

import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any, NamedTuple

from mvjax.training.checkpoint import leaf_paths
from mvjax.weights.files import Tensors, TorchTensor, WeightsError
from mvjax.weights.names import Rule, Rules

_BLOCK = re.compile(r"\.(\d+)\.")


class Parameter(NamedTuple):
    """One of our parameters and the tensors it is made of: one per block if stacked."""

    rule: Rule
    names: tuple[str, ...]
    tensors: tuple[TorchTensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Our shape of one tensor, without the axis of the blocks."""
        return self.rule.layout.ours_shape(self.tensors[0].shape)


class Match(NamedTuple):
    """The result of `match`."""

    parameters: dict[str, Parameter]  # by dotted path, if the file has at least one tensor of it
    blocks: int
    missing: list[str]  # names that the rules ask for and the file lacks
    unknown: list[str]  # names in the file that no rule knows

    def shape(self, path: str) -> tuple[int, ...]:
        """Returns our shape of a parameter, of one block if stacked.

        Raises:
            WeightsError: The file lacks it, or has it with other axes; lists all missing tensors.
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
    """Assigns tensors to parameters by name; `check_shapes` checks the shapes."""
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
    """Raises WeightsError unless the match is complete and has the shapes of the tree `abstract`.

    The error lists all missing, unknown and misshapen tensors.
    """
    shapes, misshapen = leaf_paths(abstract), []
    for path, (rule, names, tensors) in found.parameters.items():
        shape = shapes[path.replace(".", "/")].shape
        expected = rule.layout.torch_shape(shape[1:] if rule.stacked else shape)
        misshapen += [
            f"{name} is {list(tensor.shape)} instead of {list(expected)}"
            for name, tensor in zip(names, tensors)
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
    listed = "; ".join(f"{part}: {', '.join(names)}" for part, names in parts.items() if names)
    return WeightsError(f"the tensors do not fit; {listed}.")


def collapse(names: Iterable[str]) -> list[str]:
    """Joins names that differ in the block's number: "blocks.{0-27}.mlp.layer1.weight"."""
    numbered: dict[str, list[int]] = {}
    for name in names:
        found = _BLOCK.search(name)
        key = f"{name[: found.start(1)]}{{}}{name[found.end(1) :]}" if found else name
        numbered.setdefault(key, []).append(int(found[1]) if found else 0)
    result = []
    for key, numbers in numbered.items():
        # Consecutive numbers have the same difference to their position.
        runs = groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])
        ends = [(run[0][1], run[-1][1]) for run in (list(run) for _, run in runs)]
        spans = ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ends)
        result.append(key.replace("{}", spans if len(numbers) == 1 else f"{{{spans}}}"))
    return result
