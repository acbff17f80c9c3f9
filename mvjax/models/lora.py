"""LoRA: low-rank adapters on linear layers, what learns with them, and their merging."""

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
    """Whether a parameter learns in a LoRA run: adapters, and all adaLN weights, as published."""
    return path[-1] in ("lora_a", "lora_b") or any(part.startswith("adaln") for part in path)


# --- The product with an adapter ---


def with_adapter(x: Array, low: Array, kernel: Array, b: Array) -> Array:
    """x W + low B, for x [..., d_in], low [..., rank], W [d_in, d_out], B [rank, d_out]."""
    # With the width split over `tensor`, the columns to be joined lie on different devices.
    alone = jax.sharding.get_abstract_mesh().shape.get("tensor", 1) == 1
    if platform() == "tpu" and alone:
        return joined_product(x, low, kernel, b)
    return x @ kernel + low @ b


@jax.custom_vjp
def joined_product(x: Array, low: Array, kernel: Array, b: Array) -> Array:
    """`with_adapter` as one product, [x low] [W; B].

    A product of its own with the few rows of B reads and writes the whole result for little
    arithmetic: on TPUs it takes as long as that with W. The same holds for dy Bᵀ in the backward
    pass.
    """
    return _beside(x, low) @ _below(kernel, b)


def _joined_forward(x, low, kernel, b):
    return joined_product(x, low, kernel, b), (x, low, kernel, b)


def _joined_backward(kept, dy):
    x, low, kernel, b = kept
    dx, dlow = jnp.split(dy @ _below(kernel, b).T, [x.shape[-1]], axis=-1)
    # One by one, so that the compiler drops that of a kernel which does not learn.
    rows = lambda y: y.reshape(-1, y.shape[-1])  # noqa: E731
    return dx, dlow, rows(x).T @ rows(dy), rows(low).T @ rows(dy)


joined_product.defvjp(_joined_forward, _joined_backward)


def _beside(x: Array, low: Array) -> Array:
    return jnp.concatenate([x, low], axis=-1)


def _below(kernel: Array, b: Array) -> Array:
    # Gathered before they are joined: else parts of W would move between devices to make room.
    return constrain(
        jnp.concatenate([constrain(kernel, None, None), constrain(b, None, None)]), None, None
    )


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
