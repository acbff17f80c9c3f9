"""Parameters as plain nested dicts: taking them apart and putting them together."""

from collections.abc import Callable
from typing import Any

Params = dict[str, Any]


def split(params: Params, trainable: Callable[[tuple[str, ...]], bool]) -> tuple[Params, Params]:
    """Splits a nested dict by leaf path into (trainable, fixed); empty branches are left out."""

    def prune(tree: Params, wanted: bool, path: tuple[str, ...]) -> Params:
        kept = {}
        for key, value in tree.items():
            if isinstance(value, dict):
                branch = prune(value, wanted, (*path, key))
                if branch:
                    kept[key] = branch
            elif bool(trainable((*path, key))) == wanted:
                kept[key] = value
        return kept

    return prune(params, True, ()), prune(params, False, ())


def merge(base: Params, over: Params) -> Params:
    """The union of two nested dicts; a leaf in both is taken from `over`."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged
