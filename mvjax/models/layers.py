"""What every network here is made of: linear with optional LoRA, norms, activations, MLP."""

from collections.abc import Callable
from functools import partial
from math import pi, sqrt

import jax
import jax.numpy as jnp
from flax import nnx

from mvjax.models.lora import LoRA
from mvjax.models.remat import rematerialised

Array = jax.Array
Init = Callable[[Array, tuple[int, ...], int], Array]  # (key, shape, fan_in) -> kernel


def truncated_normal(key: Array, shape: tuple[int, ...], fan_in: int) -> Array:
    """Normal with std 1/√fan_in cut at ±3 std (the release, for transformer kernels)."""
    return jax.random.truncated_normal(key, -3.0, 3.0, shape) / sqrt(fan_in)


def kaiming_uniform(
    key: Array, shape: tuple[int, ...], fan_in: int, gain: float = sqrt(1 / 3)
) -> Array:
    """Uniform with std gain/√fan_in; the default gain is that of PyTorch's own layers (a = √5)."""
    bound = gain * sqrt(3 / fan_in)
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def zeros(key: Array, shape: tuple[int, ...], fan_in: int) -> Array:
    """Zeros, whatever the key and the fan-in."""
    return jnp.zeros(shape)


def stack(make_block, key: Array, count: int):
    """Builds `count` blocks with one call of `make_block(key)`, stacked on a leading layer axis."""
    return jax.vmap(make_block)(jax.random.split(key, count))


def run_blocks(step, x: Array, blocks, count: int, remat: str) -> Array:
    """Applies `step(x, block) -> x` for the first `count` of stacked blocks.

    Args:
        step: one block.
        x: what the blocks pass on.
        blocks: tree of arrays with a leading layer axis.
        count: how many blocks to run.
        remat: see `mvjax.models.remat`.
    """
    body = rematerialised(lambda x, block: (step(x, block), None), remat)
    if count == jax.tree.leaves(blocks)[0].shape[0]:
        return jax.lax.scan(body, x, blocks)[0]

    # Scanning over a slice of the stack would copy the parameters of these blocks.
    def indexed(x, i):
        return body(x, jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, i, 0, False), blocks))

    return jax.lax.scan(indexed, x, jnp.arange(count))[0]


class Linear(nnx.Module):
    """y = x W (+ b), with W [in, out]; plus (alpha / rank) x A B where the layer has an adapter.

    Args:
        key: PRNG key of the initialisation.
        d_in, d_out: feature sizes.
        axes: logical axis names of the kernel, for sharding.
        name: the attribute name under which LoRA targets find this layer.
        lora: adapters to add, or None.
        bias: whether there is a bias, started at zero.
        init: initialisation of the kernel.
    """

    def __init__(
        self,
        key: Array,
        d_in: int,
        d_out: int,
        axes: tuple[str | None, str | None],
        *,
        name: str = "",
        lora: LoRA | None = None,
        bias: bool = False,
        init: Init = truncated_normal,
    ):
        kernel_key, lora_key = jax.random.split(key)
        self.kernel = nnx.Param(init(kernel_key, (d_in, d_out), d_in), axes=axes)
        self.bias = nnx.Param(jnp.zeros(d_out), axes=(axes[1],)) if bias else None
        self.adapted = lora is not None and name in lora.targets
        if self.adapted:
            self.lora_scale = lora.scale
            # As peft's default: B starts at zero.
            a = kaiming_uniform(lora_key, (d_in, lora.rank), d_in)
            self.lora_a = nnx.Param(a, axes=(axes[0], "lora"))
            self.lora_b = nnx.Param(jnp.zeros((lora.rank, d_out)), axes=("lora", axes[1]))

    def __call__(self, x: Array) -> Array:
        """Maps [..., d_in] to [..., d_out] in the dtype of `x`."""
        shape = x.shape
        # For the kernel's gradient XLA transposes what has several leading dimensions in memory,
        # which on a CPU costs more than the product. Over several devices they may be split, and
        # must stay apart.
        if jax.sharding.get_abstract_mesh().size <= 1:
            x = x.reshape(-1, shape[-1])
        y = x @ self.kernel[...].astype(x.dtype)
        if self.adapted:
            low = x @ self.lora_a[...].astype(x.dtype)
            y += (low @ self.lora_b[...].astype(x.dtype)) * self.lora_scale
        if self.bias is not None:
            y += self.bias[...].astype(x.dtype)
        return y.reshape(*shape[:-1], y.shape[-1])


class RMSNorm(nnx.Module):
    """x / rms(x) · scale over the last axis, eps 1e-6, computed in float32."""

    def __init__(self, d: int):
        self.scale = nnx.Param(jnp.ones(d), axes=(None,))

    def __call__(self, x: Array) -> Array:
        """Normalises [..., d]."""
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-6)
        return (wide * self.scale[...].astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: Array) -> Array:
    """Parameter-free layer norm over the last axis, eps 1e-6, computed in float32."""
    wide = x.astype(jnp.float32)
    wide -= jnp.mean(wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias, eps 1e-6, in float32 (the decoder's norm of the context)."""

    def __init__(self, d: int):
        self.scale = nnx.Param(jnp.ones(d), axes=(None,))
        self.bias = nnx.Param(jnp.zeros(d), axes=(None,))

    def __call__(self, x: Array) -> Array:
        """Normalises [..., d]."""
        wide = layer_norm(x.astype(jnp.float32))
        wide = wide * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return wide.astype(x.dtype)


# The activations are computed in float32, rounded once at their end, and keep only their input for
# the gradient. XLA's erf is a rational function; the erfc in jax.nn.gelu costs several times more.


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """The exact (erf) GELU, as published; not the tanh approximation."""
    wide = x.astype(jnp.float32)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


def _gelu_gradient(x: Array, gradient: Array) -> tuple[Array]:
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * wide**2) / sqrt(2 * pi)
    slope = _normal_cdf(wide) + wide * density
    return ((gradient.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_gradient)


def _normal_cdf(x: Array) -> Array:
    return 0.5 * (1 + jax.lax.erf(x * sqrt(0.5)))


@partial(jax.checkpoint, prevent_cse=False)
def silu(x: Array) -> Array:
    """x · sigmoid(x)."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


class MLP(nnx.Module):
    """Linear → exact GELU → Linear, no biases."""

    def __init__(self, key: Array, d: int, hidden: int, lora: LoRA | None = None):
        keys = jax.random.split(key)
        self.layer1 = Linear(keys[0], d, hidden, ("embed", "mlp"), name="layer1", lora=lora)
        self.layer2 = Linear(keys[1], hidden, d, ("mlp", "embed"), name="layer2", lora=lora)

    def __call__(self, x: Array) -> Array:
        """Maps [b, l, d] to [b, l, d]."""
        return self.layer2(gelu(self.layer1(x)))
