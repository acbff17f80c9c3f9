"""The train state: what a step changes, what a checkpoint holds."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mvjax.models.param_tree import Params, merge, split
from mvjax.parallel.rules import Rules, sharding_tree
from mvjax.training.stage import Stage


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("step", "params", "opt_state", "ema"),
    meta_fields=(),
)
@dataclass(frozen=True)
class TrainState:
    """The arrays of a run.

    Attributes:
        step: Number of steps made, int32 scalar.
        params: All parameters, a plain nested dict, float32 unless the stage says otherwise.
        opt_state: Optimizer state of the trainable parameters only.
        ema: Moving average of the trainable parameters; {} when `training.ema_decay` is 0.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params


def fresh_state(
    params: Params, stage: Stage, optimizer: optax.GradientTransformation, ema: bool
) -> TrainState:
    """The state of step 0 around given parameters."""
    trainable, _ = split(params, stage.trainable)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(trainable),
        # A copy: params and ema are both donated to the step, so they must not share buffers.
        ema=jax.tree.map(jnp.copy, trainable) if ema else {},
    )


def abstract_state(
    stage: Stage, optimizer: optax.GradientTransformation, ema: bool, mesh: Mesh, rules: Rules
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without allocating anything.

    Moments and moving averages are split like the parameters they belong to; counts are replicated.

    Raises:
        ValueError: If `stage.axes` does not fit the parameters or the mesh, naming the parameter.
    """
    shapes = jax.eval_shape(
        lambda key: fresh_state(stage.init(key), stage, optimizer, ema), jax.random.key(0)
    )
    params = sharding_tree(stage.axes, mesh, rules, shapes.params)
    trainable, _ = split(params, stage.trainable)
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = TrainState(
        step=whole,
        params=params,
        opt_state=optax.tree.map_params(
            optimizer,
            lambda _, sharding: sharding,
            shapes.opt_state,
            trainable,
            transform_non_params=lambda _: whole,
        ),
        ema=trainable if ema else {},
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def create_state(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    seed: int,
    params: Params | None = None,
) -> TrainState:
    """Makes the state of step 0 on the devices, each creating only its own part.

    Args:
        stage: Gives the initial parameters.
        optimizer: Of `make_optimizer`.
        abstract: Of `abstract_state`; says every sharding.
        seed: Of the initial parameters.
        params: Already placed parameters that replace those of `stage.init`; donated.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def make(given: Params, key: jax.Array) -> TrainState:
        everything = merge(stage.init(key), given)  # what is given is not computed
        return fresh_state(everything, stage, optimizer, bool(abstract.ema))

    # Step n uses fold_in(key(seed), n); this is a step no run reaches.
    key = jax.random.fold_in(jax.random.key(seed), 2**32 - 1)
    return jax.jit(make, out_shardings=shardings, donate_argnums=0)(params or {}, key)
