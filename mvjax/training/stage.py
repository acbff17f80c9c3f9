"""What a training stage is: everything the loop needs to know about a model and its loss."""

from collections.abc import Callable
from dataclasses import dataclass

import jax

from mvjax.models.param_tree import Params

Batch = dict[str, jax.Array]
Loss = tuple[jax.Array, dict[str, jax.Array]]


@dataclass(frozen=True)
class Stage:
    """A model with its loss, as data for `mvjax.training.loop.train`.

    Random numbers are drawn for the whole batch and then go with their samples, so that the loss
    does not depend on how a batch is split: over devices, or over micro-batches in turn.

    Attributes:
        name: "video" or "action".
        init: PRNG key -> parameter tree (a plain nested dict); pure and jit-able.
        axes: The same structure; each leaf is a tuple of logical axis names.
        trainable: Path of a leaf -> does it learn.
        draw: (batch, key) -> the random numbers of the batch (noise, times, choices), a dict of
            arrays that all lead with the samples.
        objective: (params, frozen, batch, what `draw` gave) -> (scalar float32 loss, metrics): the
            mean over the samples of both dicts. Metrics are scalars, means over the samples too,
            and, under the name "by_level", sums of `error_by_level`.
        batch_axes: Logical axes of each batch entry, "batch" first; other entries are not sent to
            the devices.
        frozen: {} in stage 1; the sharded frozen backbone in stage 2.
        tokens: Video tokens of a sample; 0 where there are none.
        flops: Floating-point operations of a step per sample; 0 where not known.
    """

    name: str
    init: Callable[[jax.Array], Params]
    axes: Params
    trainable: Callable[[tuple[str, ...]], bool]
    draw: Callable[[Batch, jax.Array], Batch]
    objective: Callable[[Params, Params, Batch, Batch], Loss]
    batch_axes: dict[str, tuple[str | None, ...]]
    frozen: Params
    tokens: int = 0
    flops: float = 0.0

    def loss(self, params: Params, frozen: Params, batch: Batch, key: jax.Array) -> Loss:
        """The objective with the random numbers of a key."""
        return self.objective(params, frozen, batch, self.draw(batch, key))
