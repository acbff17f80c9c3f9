"""What a training stage is: everything the loop needs to know about a model and its loss."""

from collections.abc import Callable
from dataclasses import dataclass

import jax

from mvjax.models.param_tree import Params

Batch = dict[str, jax.Array]


@dataclass(frozen=True)
class Stage:
    """A model with its loss, as data for `mvjax.training.loop.train`.

    Attributes:
        name: "video" or "action".
        init: PRNG key -> parameter tree (a plain nested dict); pure and jit-able.
        axes: The same structure; each leaf is a tuple of logical axis names.
        trainable: Path of a leaf -> does it learn.
        loss: (params, frozen, batch, key) -> (scalar float32 loss, dict of scalar metrics).
        batch_axes: Logical axes of each batch entry; other entries are not sent to the devices.
        frozen: {} in stage 1; the sharded frozen backbone in stage 2.
    """

    name: str
    init: Callable[[jax.Array], Params]
    axes: Params
    trainable: Callable[[tuple[str, ...]], bool]
    loss: Callable[[Params, Params, Batch, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
    batch_axes: dict[str, tuple[str | None, ...]]
    frozen: Params
