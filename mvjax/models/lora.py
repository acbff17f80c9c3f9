"""LoRA: low-rank adapters on linear layers, what learns with them, and their merging."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mvjax.models.network import Params
from mvjax.parallel import constrain, platform

Array = jax.Array


@dataclass(frozen=True)
class LoRA:
    """Adapters on the linear layers whose attribute name is in `targets`.

    The published video fine-tuning uses rank 256, alpha 32 (mimic-video release,
    `configs/experiment/video2world.py`).
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / self.rank


def learns_with_lora(path: tuple[str, ...]) -> bool:
    """Whether a parameter learns in a LoRA run.

    Adapters and all adaLN weights do, as published; and the embeddings of views, which start at
    zero and have no trained values to adapt.
    """
    if path[-1] in ("lora_a", "lora_b") or path[0] == "view_embedding":
        return True
    return any(part.startswith("adaln") for part in path)


def learning(lora: LoRA | None) -> Callable[[tuple[str, ...]], bool]:
    """Which parameters of a video DiT learn, by their paths: all, or those that do with LoRA."""
    return learns_with_lora if lora else lambda path: True


# --- The product with an adapter ---


def with_adapter(x: Array, kernel: Array, a: Array, b: Array, low: Array | None = None) -> Array:
    """x W + (x A) B.

    On TPUs a product with the few columns of A, or rows of B, takes as long as the reading of x or
    of the result, which is often longer than the product with W. There it is joined to that product
    on the wider side, in the forward pass and in the backward pass.

    Args:
        x: [..., d_in].
        kernel: W [d_in, d_out].
        a, b: A [d_in, rank] and B [rank, d_out], scaled.
        low: x A where it is known already.
    """
    # With the width split over `tensor`, what would be joined lies on different devices.
    whole = jax.sharding.get_abstract_mesh().shape.get("tensor", 1) == 1
    if platform() != "tpu" or not whole:
        low = x @ a if low is None else low
        return x @ kernel + low @ b
    if low is None and x.shape[-1] > kernel.shape[-1]:
        y, low = joined_outputs(x, kernel, a)
        return y + low @ b
    return joined_inputs(x, x @ a if low is None else low, kernel, b)


@jax.custom_vjp
def joined_inputs(x: Array, low: Array, kernel: Array, b: Array) -> Array:
    """x W + low B as one product, [x low] [W; B]."""
    return _columns(x, low) @ _gathered(jnp.concatenate([kernel, b]))


def _joined_inputs_forward(x, low, kernel, b):
    return joined_inputs(x, low, kernel, b), (x, low, kernel, b)


def _joined_inputs_backward(kept, dy):
    x, low, kernel, b = kept
    joined = dy @ _gathered(jnp.concatenate([kernel, b])).T
    dx, dlow = jnp.split(joined, [x.shape[-1]], axis=-1)
    # One by one, so that the compiler drops that of a kernel which does not learn.
    return dx, dlow, _inner(x, dy), _inner(low, dy)


joined_inputs.defvjp(_joined_inputs_forward, _joined_inputs_backward)


@jax.custom_vjp
def joined_outputs(x: Array, kernel: Array, a: Array) -> tuple[Array, Array]:
    """x W and x A as one product, x [W A]."""
    joined = x @ _gathered(_columns(kernel, a))
    return tuple(jnp.split(joined, [kernel.shape[-1]], axis=-1))


def _joined_outputs_forward(x, kernel, a):
    return joined_outputs(x, kernel, a), (x, kernel, a)


def _joined_outputs_backward(kept, gradients):
    x, kernel, a = kept
    dx = _columns(*gradients) @ _gathered(_columns(kernel, a)).T
    return dx, *(_inner(x, gradient) for gradient in gradients)


joined_outputs.defvjp(_joined_outputs_forward, _joined_outputs_backward)


def _columns(x: Array, y: Array) -> Array:
    return jnp.concatenate([x, y], axis=-1)


def _inner(x: Array, dy: Array) -> Array:
    """xᵀ dy over all rows."""
    return x.reshape(-1, x.shape[-1]).T @ dy.reshape(-1, dy.shape[-1])


def _gathered(weights: Array) -> Array:
    """Joined weights as an array of its own, whole on every device.

    Split evenly, they would be moved about; joined inside the product, they would slow it down.
    """
    return jax.lax.optimization_barrier(constrain(weights, None, None))


# --- Merging ---


def merge_lora(params: Params, lora: LoRA) -> Params:
    """Adds (alpha / rank) A B to every adapted kernel and drops the adapters.

    Works on arrays of JAX and NumPy, and on stacked kernels [layers, in, out] as on single ones.
    """
    merged = {}
    for name, value in params.items():
        if isinstance(value, dict):
            merged[name] = merge_lora(value, lora)
        elif name == "kernel" and "lora_a" in params:
            merged[name] = value + lora.scale * (params["lora_a"] @ params["lora_b"])
        elif name not in ("lora_a", "lora_b"):
            merged[name] = value
    return merged
