"""The sharding rules: one table from logical axis names to mesh axes.

Parameters, batches and activations name their dimensions (`"embed"`, `"heads"`, ...); the table
says over which mesh axes such a dimension is split. `config.rules` overrides single entries, e.g.
`{"embed": None}` keeps parameters whole, `{"batch": "data"}` leaves fsdp out of the batch.

Two rules of reading the table:

- A mesh axis is used once per array; the leftmost dimension that asks for it gets it. So an
  activation (batch, length, embed) is split over fsdp by its batch, a parameter by its embed.
- A parameter or batch dimension that its mesh axes do not divide is an error that names it: silent
  replication would cost memory on every device. An activation is left whole there instead, since
  short sequences (a few action tokens) pass through the same code as long ones.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mvjax.parallel.mesh import MESH_AXES

Axes = tuple[str | None, ...]
Rules = Mapping[str, tuple[str, ...]]

DEFAULT_RULES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "batch": ("data", "fsdp"),  # samples
        "length": ("context",),  # tokens of the video sequence
        "embed": ("fsdp",),  # residual width: the axis by which parameters are stored split
        "mlp": ("tensor",),  # hidden width of the MLP
        "heads": ("tensor",),  # attention heads, or heads x head_dim in one dimension
        "layers": (),  # the stacked blocks; scanned, so never split
        "lora": (),  # adapter rank
    }
)

_ACTIVE: ContextVar[Rules | None] = ContextVar("mvjax_sharding_rules", default=None)


def make_rules(overrides: Mapping[str, Any] | None = None) -> Rules:
    """The default table with `overrides` (axis name -> mesh axis, several, or None) applied."""
    rules = dict(DEFAULT_RULES)
    for name, value in (overrides or {}).items():
        mesh_axes = (value,) if isinstance(value, str) else tuple(value or ())
        wrong = sorted(set(mesh_axes) - set(MESH_AXES))
        if wrong:
            raise ValueError(
                f"rules[{name!r}] names the mesh axis {wrong[0]!r}; the axes are {MESH_AXES}."
            )
        rules[name] = mesh_axes
    return MappingProxyType(rules)


def spec(axes: Axes, rules: Rules) -> PartitionSpec:
    """The partition of an array whose dimensions have the given logical names (None: whole)."""
    return PartitionSpec(*(_entry(mesh_axes) for mesh_axes in _mesh_axes(axes, rules)))


def split_ways(axis: str, mesh: Mesh, rules: Rules) -> int:
    """Over how many devices a dimension with this logical name is split."""
    return _ways(rules[axis], mesh)


def sharding_tree(axes: Any, mesh: Mesh, rules: Rules, abstract: Any = None) -> Any:
    """NamedShardings for a nested dict of logical axes.

    Args:
        axes: Nested dict whose leaves are tuples of logical axis names.
        mesh: The mesh of `make_mesh`.
        rules: The table of `make_rules`.
        abstract: The same tree with shaped leaves; when given, divisibility is checked.

    Raises:
        ValueError: Naming the parameter whose structure, rank or size does not fit.
    """
    return _walk(axes, mesh, rules, abstract, ())


@contextlib.contextmanager
def use_rules(rules: Rules) -> Iterator[None]:
    """Makes `constrain` act with this table inside the block (also while tracing)."""
    token = _ACTIVE.set(rules)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks the compiler to split activation `x` by its logical axes, one name per dimension.

    The identity when no rules or no mesh (`jax.set_mesh`) are active, so models run anywhere.
    """
    partition = activation_spec(x.shape, *axes)
    return x if partition is None else jax.lax.with_sharding_constraint(x, partition)


def activation_spec(shape: tuple[int, ...], *axes: str | None) -> PartitionSpec | None:
    """How an activation of this shape is split, one logical axis per dimension; None: it is not.

    A dimension that its mesh axes do not divide is left whole.
    """
    rules, mesh = _ACTIVE.get(), jax.sharding.get_abstract_mesh()
    if rules is None or mesh.empty:
        return None
    if len(axes) != len(shape):
        raise ValueError(f"constrain got the axes {axes} for an array of shape {shape}.")
    entries = [
        _entry(mesh_axes if size % _ways(mesh_axes, mesh) == 0 else ())
        for size, mesh_axes in zip(shape, _mesh_axes(axes, rules))
    ]
    return PartitionSpec(*entries)


def _mesh_axes(axes: Axes, rules: Rules) -> list[tuple[str, ...]]:
    used: set[str] = set()
    result = []
    for name in axes:
        if name is not None and name not in rules:
            raise ValueError(
                f"the logical axis {name!r} is not in the sharding rules (known: "
                f"{', '.join(sorted(rules))}); add it to config.rules."
            )
        mesh_axes = tuple(a for a in (rules[name] if name is not None else ()) if a not in used)
        used.update(mesh_axes)
        result.append(mesh_axes)
    return result


def _entry(mesh_axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return mesh_axes if len(mesh_axes) > 1 else (mesh_axes[0] if mesh_axes else None)


def _ways(mesh_axes: tuple[str, ...], mesh: Any) -> int:
    return math.prod(mesh.shape[axis] for axis in mesh_axes)


def _walk(axes: Any, mesh: Mesh, rules: Rules, abstract: Any, path: tuple[str, ...]) -> Any:
    if isinstance(axes, dict):
        if abstract is not None and (not isinstance(abstract, dict) or set(axes) != set(abstract)):
            there = sorted(abstract) if isinstance(abstract, dict) else "an array"
            raise ValueError(
                f"the axes of {'/'.join(path) or 'the tree'} name {sorted(axes)}, "
                f"but the arrays there are {there}."
            )
        return {
            key: _walk(
                value, mesh, rules, None if abstract is None else abstract[key], (*path, key)
            )
            for key, value in axes.items()
        }
    if abstract is not None:
        _check_leaf("/".join(path), axes, abstract.shape, mesh, rules)
    return NamedSharding(mesh, spec(axes, rules))


def _check_leaf(name: str, axes: Axes, shape: tuple[int, ...], mesh: Mesh, rules: Rules) -> None:
    if len(axes) != len(shape):
        raise ValueError(f"{name} has shape {shape} but the logical axes {axes}.")
    for axis, size, mesh_axes in zip(axes, shape, _mesh_axes(axes, rules)):
        if size % _ways(mesh_axes, mesh):
            raise ValueError(
                f"{name} has shape {shape}; its dimension {axis!r} of {size} cannot be split over "
                f"{' x '.join(mesh_axes)} = {_ways(mesh_axes, mesh)} devices; change config.mesh, "
                f"or set config.rules[{axis!r}] = None to keep it whole."
            )
