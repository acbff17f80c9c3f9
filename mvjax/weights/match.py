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
    def stacked(self) -> bool:
        """Whether the blocks' tensors lie on a leading axis."""
        return "{i}" in self.rule.torch

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
            WeightsError: if the file has no tensor of it, with all that is missing.
        """
        if path not in self.parameters:
            raise WeightsError(_sentence(self.missing, self.unknown, []))
        return self.parameters[path].shape


def match(tensors: Tensors, rules: Rules) -> Match:
    """Assigns tensors to parameters by name; shapes are checked by `check_shapes`."""
    pieces: dict[str, dict[int, str]] = {}
    by_name = {rule.torch: rule for rule in rules}
    unknown, blocks = [], 0
    for name in tensors:
        rule, index = _rule_of(name, by_name)
        if rule is None:
            unknown.append(name)
            continue
        pieces.setdefault(rule.ours, {})[index] = name
        if "{i}" in rule.torch:
            blocks = max(blocks, index + 1)
    parameters, missing = {}, []
    for rule in rules:
        wanted = range(max(blocks, 1)) if "{i}" in rule.torch else (0,)
        found = pieces.get(rule.ours, {})
        missing += [rule.torch.replace("{i}", str(i)) for i in wanted if i not in found]
        if found:
            names = tuple(found[i] for i in sorted(found))
            parameters[rule.ours] = Parameter(rule, names, tuple(tensors[name] for name in names))
    return Match(parameters, blocks, missing, unknown)


def _rule_of(name: str, by_name: Mapping[str, Rule]) -> tuple[Rule | None, int]:
    if name in by_name:
        return by_name[name], 0
    for found in _BLOCK.finditer(name):
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
        shape = shapes[path.replace(".", "/")].shape
        expected = parameter.rule.layout.torch_shape(shape[1:] if parameter.stacked else shape)
        misshapen += [
            f"{name} is {list(tensor.shape)} instead of {list(expected)}"
            for name, tensor in zip(parameter.names, parameter.tensors)
            if tensor.shape != expected
        ]
    if found.missing or found.unknown or misshapen:
        raise WeightsError(_sentence(found.missing, found.unknown, misshapen))


def _sentence(missing: list[str], unknown: list[str], misshapen: list[str]) -> str:
    parts = [
        f"missing: {', '.join(collapse(missing))}" if missing else "",
        f"unknown: {', '.join(collapse(unknown))}" if unknown else "",
        f"misshapen: {', '.join(misshapen)}" if misshapen else "",
    ]
    return f"the tensors do not fit; {'; '.join(part for part in parts if part)}."


def collapse(names: Iterable[str]) -> list[str]:
    """Names with runs of block numbers put together: "blocks.{0-27}.mlp.layer1.weight"."""
    numbered: dict[str, list[int]] = {}
    for name in names:
        found = _BLOCK.search(name)
        key = f"{name[: found.start(1)]}{{}}{name[found.end(1) :]}" if found else name
        numbered.setdefault(key, []).append(int(found[1]) if found else 0)
    result = []
    for key, numbers in numbered.items():
        numbers.sort()
        runs = [
            [n for _, n in run] for _, run in groupby(enumerate(numbers), lambda x: x[1] - x[0])
        ]
        if "{}" not in key:
            result.append(key)
        elif len(numbers) == 1:
            result.append(key.replace("{}", str(numbers[0])))
        else:
            spans = ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
            result.append(key.replace("{}", f"{{{spans}}}"))
    return result
