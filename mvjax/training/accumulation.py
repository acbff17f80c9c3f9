"""Gradients of a batch too large for the devices: micro-batches in turn, in one compiled step.

Micro-batch j of m takes the samples j, j + m, j + 2m, ... Every device holds a run of consecutive
samples, so each splits its own and no sample moves between devices; and which samples go together
does not depend on the mesh.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mvjax.models.param_tree import Params
from mvjax.parallel.rules import Axes, Rules, constrain, split_ways
from mvjax.training.stage import Batch, Loss

Gradient = tuple[Loss, Params]


def check_batch_size(batch_size: int, accumulate: int, mesh: Mesh, rules: Rules) -> None:
    """Raises ValueError unless every device gets whole samples in every micro-batch."""
    if accumulate < 1:
        raise ValueError(f"training.accumulate must be 1 (off) or more, got {accumulate}.")
    ways = split_ways("batch", mesh, rules)
    if batch_size % (accumulate * ways):
        axes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in rules["batch"]) or "1"
        raise ValueError(
            f"training.batch_size is {batch_size}; it must be a multiple of {accumulate * ways}, "
            f"training.accumulate = {accumulate} times the mesh axes of the batch, {axes} "
            "(fewer samples than devices need config.mesh.context or .tensor)."
        )


def mean_gradient(
    gradient: Callable[[Params, Batch, Batch], Gradient],
    trainable: Params,
    param_axes: Params,
    batch: Batch,
    draws: Batch,
    batch_axes: Mapping[str, Axes],
    count: int,
) -> Gradient:
    """Loss, metrics and gradient of a batch, as the mean over `count` micro-batches.

    Sums are float32. Call it inside `use_rules`.

    Args:
        gradient: (trainable, batch, draws) -> ((loss, metrics), gradient), means over the samples.
        trainable: The parameters that learn.
        param_axes: Their logical axes: sums of gradients are split like them.
        batch, draws: As in `Stage`, of all samples.
        batch_axes: Logical axes of the batch's entries.
        count: 1 for the whole batch at once.
    """
    if count == 1:
        return gradient(trainable, batch, draws)
    draw_axes = {name: ("batch", *[None] * (x.ndim - 1)) for name, x in draws.items()}
    parts = (_split(batch, batch_axes, count), _split(draws, draw_axes, count))

    def add(sums: Any, part: tuple[Batch, Batch]) -> tuple[Any, dict[str, jax.Array]]:
        (loss, metrics), grads = gradient(trainable, *part)
        sums = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), sums, (loss, grads))
        return (sums[0], _placed(sums[1], param_axes)), metrics

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trainable)
    start = (jnp.zeros(()), _placed(zeros, param_axes))
    sums, metrics = jax.lax.scan(add, start, parts)
    loss, grads = jax.tree.map(lambda total: total / count, sums)
    # Sums and counts by noise level add up; everything else is a mean over the samples.
    merged = {k: m.sum(0) if k == "by_level" else m.mean(0) for k, m in metrics.items()}
    return (loss, merged), grads


def _split(arrays: Batch, axes: Mapping[str, Axes], count: int) -> Batch:
    """[b, ...] -> [count, b / count, ...]."""
    return {
        name: constrain(jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), None, *axes[name])
        for name, x in arrays.items()
    }


def _placed(tree: Params, axes: Params) -> Params:
    return jax.tree.map(lambda leaf, names: constrain(leaf, *names), tree, axes)
