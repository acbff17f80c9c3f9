"""Between modules and the plain nested dicts that are trained, sharded and stored."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

# Parameters as plain nested dicts: taking them apart and putting them together.


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


class Network:
    """A network's structure without its weights.

    Args:
        build: makes the module from a PRNG key, e.g. `lambda key: VideoDiT(config, key)`.
            The module keeps its configuration as `config`.

    Attributes:
        config: the module's configuration.
        axes: tree of logical axis names, one tuple per parameter; stacked blocks lead with
            "layers".
        abstract: tree of `jax.ShapeDtypeStruct`, built without allocating anything.
    """

    def __init__(self, build: Callable[[jax.Array], nnx.Module]):
        self._build = build
        module = jax.eval_shape(build, jax.random.key(0))
        self._graph, state = nnx.split(module)
        self.config = module.config
        self.abstract: Params = nnx.to_pure_dict(state)
        variables = nnx.to_flat_state(state)
        self.axes: Params = nnx.traversals.unflatten_mapping(
            {
                path: ("layers",) * (len(v.shape) - len(v.axes)) + tuple(v.axes)
                for path, v in variables
            }
        )

    def init(self, key: jax.Array) -> Params:
        """Freshly initialised parameters, a plain nested dict of float32 arrays."""
        return nnx.to_pure_dict(nnx.state(self._build(key)))

    def bind(self, params: Params) -> nnx.Module:
        """The module with these parameters; differentiable with respect to them."""
        return nnx.merge(self._graph, params)

    @property
    def num_parameters(self) -> int:
        """Number of parameters, computed from shapes alone."""
        return sum(p.size for p in jax.tree.leaves(self.abstract))
