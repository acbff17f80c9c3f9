"""Comparing the arrays a checkpoint holds with the arrays a run asks for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

SHOWN = 5  # names listed per message


class CheckpointMismatch(ValueError):
    """A readable checkpoint that does not fit the run; the message says what to change."""


def leaf_paths(tree: Any) -> dict[str, Any]:
    """Leaves by path, e.g. "params/block/kernel"; the same for dicts, dataclasses and tuples."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(_part(key) for key in path): leaf for path, leaf in leaves}


def check_match(stored: Mapping[str, Any], wanted: Mapping[str, Any], where: Path) -> None:
    """Raises CheckpointMismatch unless both have the same paths and shapes.

    Orbax hands back a placeholder for a leaf it does not find, without an error, so the paths are
    compared before every restore.

    Args:
        stored: Path -> shaped leaf, in the checkpoint.
        wanted: Path -> shaped leaf, in this run.
        where: The checkpoint, for the message.
    """
    missing = sorted(set(wanted) - set(stored), key=_parameters_first)
    extra = sorted(set(stored) - set(wanted), key=_parameters_first)
    if missing or extra:
        sides = [
            f"{label} {', '.join(names[:SHOWN])}"
            + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
            for label, names in (
                ("this configuration needs, but the checkpoint lacks:", missing),
                ("the checkpoint holds, but this configuration lacks:", extra),
            )
            if names
        ]
        raise CheckpointMismatch(
            f"{where} does not fit: {'; '.join(sides)}. Use the model and training settings it was "
            "made with, or another directory."
        )
    for name in sorted(wanted, key=_parameters_first):
        shapes = tuple(stored[name].shape), tuple(wanted[name].shape)
        if shapes[0] != shapes[1]:
            raise CheckpointMismatch(
                f"{name} has shape {shapes[0]} in {where}, but {shapes[1]} in this configuration; "
                "use the model settings it was made with, or another directory."
            )


def check_restored(restored: Any, where: Path) -> None:
    """Raises CheckpointMismatch if a leaf came back as a placeholder instead of an array."""
    absent = [
        name for name, leaf in leaf_paths(restored).items() if not isinstance(leaf, jax.Array)
    ]
    if absent:
        raise CheckpointMismatch(f"{where} holds no array for {', '.join(absent[:SHOWN])}.")


def _parameters_first(name: str) -> tuple[bool, str]:
    return (not name.startswith("params/"), name)


def _part(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
