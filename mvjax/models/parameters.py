"""Between modules and the plain nested dicts that are trained, sharded and stored."""

from collections.abc import Callable

import jax
from flax import nnx

from mvjax.models.param_tree import Params


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
