"""Between modules and the plain nested dicts that are trained, sharded and stored."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

Params = dict[str, Any]


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
        # A parameter names its axes when it is made; `layers.stack` puts one more in front.
        self.axes: Params = unflatten_dict(
            {
                path: ("layers",) * (len(v.shape) - len(v.axes)) + tuple(v.axes)
                for path, v in nnx.to_flat_state(state)
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


def split(params: Params, trainable: Callable[[tuple[str, ...]], bool]) -> tuple[Params, Params]:
    """Splits a nested dict by leaf path into (trainable, fixed); empty branches are left out."""
    chosen, fixed = {}, {}
    for path, leaf in flatten_dict(params).items():
        (chosen if trainable(path) else fixed)[path] = leaf
    return unflatten_dict(chosen), unflatten_dict(fixed)


def merge(base: Params, over: Params) -> Params:
    """The union of two nested dicts; a leaf in both is taken from `over`."""
    return unflatten_dict(flatten_dict(base) | flatten_dict(over))
