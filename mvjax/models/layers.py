"""What the networks are made of.

In this order: the precisions they are computed in; linear layers, norms, activations and the MLP;
adaLN modulation; stacks of blocks and what of them is kept for the backward pass. Attention, the
rotary table and LoRA have files of their own.
"""

from collections.abc import Callable
from functools import partial
from math import pi, sqrt
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from mvjax.models.int8 import product, quantize
from mvjax.models.lora import LoRA, with_adapter
from mvjax.parallel import platform

Array = jax.Array
Init = Callable[[Array, tuple[int, ...], int], Array]  # (key, shape, fan_in) -> kernel


# --- Precision ---

# "float32": everything, for tests and comparisons.
# "bfloat16": matmuls and the residual stream in bfloat16; time embeddings, rotary tables, norms and
#     softmax in float32. For work.
# "published": as "bfloat16", with the roundings of the release besides: video times are rounded
#     before their sinusoid, time embeddings and rotary angles are computed in bfloat16. For
#     comparing with it.
PRECISIONS = ("float32", "bfloat16", "published")


def compute_dtype(precision: str) -> str:
    """The dtype of matmuls and the residual stream.

    Raises:
        ValueError: if there is no such precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}.")
    return "float32" if precision == "float32" else "bfloat16"


def time_dtype(precision: str) -> str:
    """The dtype of the time embedding.

    It is a few rows and reaches every token through every block, so its errors weigh more than its
    cost: in bfloat16 it alone makes a third of the decoder's error (Predict2.5 keeps it float32).
    """
    return "bfloat16" if precision == "published" else "float32"


def rounded(x: Array, precision: str) -> Array:
    """What enters a network from outside: rounded to bfloat16 where the release does."""
    return round_to_bfloat16(x) if precision == "published" else x


def round_to_bfloat16(x: Array) -> Array:
    """Float32 values rounded to those that bfloat16 has.

    A cast to bfloat16 and back may be left out by XLA, which is free to compute more precisely.
    """
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


# --- Linear layers ---


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
        int8: whether the kernel is kept and multiplied in int8, for a layer that does not learn.
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
        int8: bool = False,
    ):
        kernel_key, lora_key = jax.random.split(key)
        kernel = init(kernel_key, (d_in, d_out), d_in)
        kernel, scale = quantize(kernel, -2) if int8 else (kernel, None)
        self.kernel = nnx.Param(kernel, axes=axes)
        self.kernel_scale = nnx.Param(scale, axes=axes[1:]) if int8 else None
        self.bias = nnx.Param(jnp.zeros(d_out), axes=(axes[1],)) if bias else None
        self.adapted = lora is not None and name in lora.targets
        if self.adapted:
            self.lora_scale = lora.scale
            # As peft's default: B starts at zero, so that the adapter starts as the identity.
            a = kaiming_uniform(lora_key, (d_in, lora.rank), d_in)
            self.lora_a = nnx.Param(a, axes=(axes[0], "lora"))
            self.lora_b = nnx.Param(jnp.zeros((lora.rank, d_out)), axes=("lora", axes[1]))

    def __call__(self, x: Array, low: Array | None = None) -> Array:
        """Maps [..., d_in] to [..., d_out] in the dtype of `x`.

        `low` is x A, flat, where it has been computed already (`linears`).
        """
        shape, x = x.shape, flat(x)
        if self.kernel_scale is not None:
            y = product(x, self.kernel[...], self.kernel_scale[...])
            return y.reshape(*shape[:-1], y.shape[-1])
        # Kernels that learn are float32 and cast at use: the optimizer needs their last digits.
        kernel = self.kernel[...].astype(x.dtype)
        if self.adapted:
            a = self.lora_a[...].astype(x.dtype)
            b = (self.lora_scale * self.lora_b[...]).astype(x.dtype)
            y = with_adapter(x, kernel, a, b, low)
        else:
            y = x @ kernel
        if self.bias is not None:
            y += self.bias[...].astype(x.dtype)
        return y.reshape(*shape[:-1], y.shape[-1])


def flat(x: Array) -> Array:
    """[..., d] as [rows, d] on a single device.

    For the kernel's gradient XLA transposes what has several leading dimensions in memory, which on
    a CPU costs more than the product. Over several devices they may be split, and must stay apart.
    """
    return x.reshape(-1, x.shape[-1]) if jax.sharding.get_abstract_mesh().size <= 1 else x


def linears(x: Array, *layers: Linear) -> list[Array]:
    """Several layers of one input; their adapters read it in one product.

    A product with a few hundred columns takes a TPU as long as the reading of its input does.
    """
    if not (len(layers) > 1 and all(layer.adapted for layer in layers)):
        return [layer(x) for layer in layers]
    down = [layer.lora_a[...].astype(x.dtype) for layer in layers]
    low = flat(x) @ jnp.concatenate(down, axis=1)
    ends = np.cumsum([a.shape[1] for a in down])[:-1]
    return [layer(x, part) for layer, part in zip(layers, jnp.split(low, ends, axis=-1))]


# --- Norms and activations: computed in float32, rounded once at their end ---

# For the gradient they keep their input and, of norms, one or two numbers per row: what autodiff
# would keep is several times as large as the input.


class RMSNorm(nnx.Module):
    """x / rms(x) · scale over the last axis, eps 1e-6."""

    def __init__(self, d: int):
        self.scale = nnx.Param(jnp.ones(d), axes=(None,))

    def __call__(self, x: Array) -> Array:
        """Normalises [..., d]."""
        return _rms_norm(x, self.scale[...])


def _rms_norm_and_kept(x: Array, scale: Array) -> tuple[Array, tuple[Array, ...]]:
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-6)
    return (wide * inverse * scale.astype(jnp.float32)).astype(x.dtype), (x, inverse, scale)


def _rms_norm_gradient(kept: tuple[Array, ...], gradient: Array) -> tuple[Array, Array]:
    x, inverse, scale = kept
    unit, gradient = x.astype(jnp.float32) * inverse, gradient.astype(jnp.float32)
    of_scale = jnp.sum(gradient * unit, axis=tuple(range(x.ndim - 1)))
    scaled = gradient * scale.astype(jnp.float32)
    along = jnp.mean(scaled * unit, axis=-1, keepdims=True)
    return (inverse * (scaled - unit * along)).astype(x.dtype), of_scale.astype(scale.dtype)


_rms_norm = jax.custom_vjp(lambda x, scale: _rms_norm_and_kept(x, scale)[0])
_rms_norm.defvjp(_rms_norm_and_kept, _rms_norm_gradient)


@jax.custom_vjp
def layer_norm(x: Array) -> Array:
    """Parameter-free layer norm over the last axis, eps 1e-6."""
    return _layer_norm_and_kept(x)[0]


def _layer_norm_and_kept(x: Array) -> tuple[Array, tuple[Array, ...]]:
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    wide -= mean
    inverse = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-6)
    return (wide * inverse).astype(x.dtype), (x, mean, inverse)


def _layer_norm_gradient(kept: tuple[Array, ...], gradient: Array) -> tuple[Array]:
    x, mean, inverse = kept
    unit, gradient = (x.astype(jnp.float32) - mean) * inverse, gradient.astype(jnp.float32)
    along = jnp.mean(gradient * unit, axis=-1, keepdims=True)
    gradient -= jnp.mean(gradient, axis=-1, keepdims=True)
    return ((inverse * (gradient - unit * along)).astype(x.dtype),)


layer_norm.defvjp(_layer_norm_and_kept, _layer_norm_gradient)


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias, eps 1e-6 (the decoder's norm of the context)."""

    def __init__(self, d: int):
        self.scale = nnx.Param(jnp.ones(d), axes=(None,))
        self.bias = nnx.Param(jnp.zeros(d), axes=(None,))

    def __call__(self, x: Array) -> Array:
        """Normalises [..., d]."""
        wide = layer_norm(x.astype(jnp.float32))
        wide = wide * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return wide.astype(x.dtype)


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
    # XLA's erf is a rational function; the erfc in jax.nn.gelu costs several times more.
    return 0.5 * (1 + jax.lax.erf(x * sqrt(0.5)))


@partial(jax.checkpoint, prevent_cse=False)
def silu(x: Array) -> Array:
    """x · sigmoid(x)."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


class MLP(nnx.Module):
    """Linear → exact GELU → Linear, no biases."""

    def __init__(self, key: Array, d: int, hidden: int, lora: LoRA | None = None, *, int8=False):
        keys, kinds = jax.random.split(key), dict(lora=lora, int8=int8)
        self.layer1 = Linear(keys[0], d, hidden, ("embed", "mlp"), name="layer1", **kinds)
        self.layer2 = Linear(keys[1], hidden, d, ("mlp", "embed"), name="layer2", **kinds)

    def __call__(self, x: Array) -> Array:
        """Maps [..., d] to [..., d]."""
        return self.layer2(gelu(keep(self.layer1(x), HIDDEN)))


# --- adaLN-LoRA: how the noise level steers every sublayer ---


class Modulation(nnx.Module):
    """SiLU → Linear(d_embedding → rank) → Linear(rank → chunks · d), plus the shared term.

    The second kernel starts at zero; the gates are nevertheless not zero at the start, because
    the term shared by all sublayers is not (Cosmos-Predict2, `use_adaln_lora`).
    """

    def __init__(self, key: Array, d_embedding: int, d: int, rank: int, chunks: int):
        keys = jax.random.split(key)
        self.chunks = chunks
        self.down = Linear(keys[0], d_embedding, rank, ("embed", None))
        self.up = Linear(keys[1], rank, chunks * d, (None, "embed"), init=zeros)

    def __call__(self, embedding: Array, shared: Array) -> list[Array]:
        """Shift, scale and (with three chunks) gate, each [b, t, d].

        Args:
            embedding: time embedding [b, t, d_embedding].
            shared: the term all sublayers share [b, t, 3 d]; its first chunks are used.
        """
        m = self.up(self.down(silu(embedding)))
        return jnp.split(m + shared[..., : m.shape[-1]], self.chunks, axis=-1)


def apart(x: Array) -> Array:
    """`x`, computed for itself on TPUs, forward and backward; put around a product.

    Gates and modulation are per frame. Fused into a product, they leave XLA windows of 16 rows,
    which fill a few per cent of the MXU.
    """
    return jax.lax.optimization_barrier(x) if platform() == "tpu" else x


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """LN(x) · (1 + scale) + shift."""
    return layer_norm(x) * (1 + scale) + shift


def by_frame(x: Array, frames: int) -> Array:
    """Tokens [b, l, d] as [b, frames, l / frames, d], where a modulation [b, t, 1, d] broadcasts.

    Broadcasting in the product itself keeps the modulation small: neither the forward pass nor
    what is saved for the backward pass holds a copy for every token.
    """
    return x.reshape(len(x), frames, -1, x.shape[-1])


class FinalLayer(nnx.Module):
    """Modulated layer norm and the projection of a token to what the network predicts."""

    def __init__(self, key: Array, d_embedding: int, d: int, rank: int, d_out: int):
        keys = jax.random.split(key)
        self.adaln = Modulation(keys[0], d_embedding, d, rank, 2)
        self.linear = Linear(keys[1], d, d_out, ("embed", None))

    def __call__(self, x: Array, shift: Array, scale: Array) -> Array:
        """Maps tokens [b, ..., d], of which shift and scale are `adaln`'s, to [b, l, d_out]."""
        x = modulate(x, shift, scale)
        return self.linear(x.reshape(x.shape[0], -1, x.shape[-1]))


# --- Stacks of blocks, and what of them is kept for the backward pass ---

# Names that results of a block may be kept by.
ATTENTION = "attention"  # what attention over many keys gives, and its softmax's sums
OUTPUT = "output"  # what a sublayer gives to its gate
HIDDEN = "hidden"  # the MLP's first product
PROJECTED = "projected"  # queries, keys and values as they leave their layers

_named = jax.checkpoint_policies.save_only_these_names
POLICIES = {
    # Everything is kept; the fastest where it fits.
    "none": None,
    # The outputs of linears and of attention; norms, activations and rotations are repeated.
    "dots": _named(ATTENTION, OUTPUT, HIDDEN, PROJECTED),
    # Less memory for some of the products again: of all that could be kept, what a sublayer gives
    # saves the most arithmetic per byte (the MLP's second product), then the MLP's first.
    "hidden": _named(ATTENTION, OUTPUT, HIDDEN),
    "outputs": _named(ATTENTION, OUTPUT),
    # The outputs of attention over many keys. All else is repeated, which is a third more matmuls
    # but not a third more attention. The choice for long videos.
    "attention": _named(ATTENTION),
    # Stage 1 chooses one by the memory of the devices (`mvjax.training.memory`). Where nothing is
    # trained, or nothing was chosen, as "attention".
    "auto": _named(ATTENTION),
    # As "attention", but kept in the host's pinned memory: 2 bytes less per token, block and
    # channel on the device (bfloat16) for two copies over the host's link.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[ATTENTION],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    # Nothing but the residual stream between blocks.
    "full": jax.checkpoint_policies.nothing_saveable,
}


def row_major(x: Array) -> Array:
    """`x`, laid out row by row on TPUs.

    Left to choose, XLA would write some products transposed, at half their speed, for a later
    product over all tokens that would take either layout.
    """
    if platform() != "tpu":
        return x
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def keep(x: Array, name: str | None) -> Array:
    """`x`, by a name that a policy may keep it by; None for none."""
    return x if name is None else checkpoint_name(x, name)


def check_remat(name: str) -> None:
    """Raises ValueError if there is no such policy of rematerialisation."""
    if name not in POLICIES:
        raise ValueError(f"remat must be one of {', '.join(POLICIES)}; got {name!r}.")


def stack(make_block: Callable[[Array], Any], key: Array, count: int) -> Any:
    """Builds `count` blocks with one call of `make_block(key)`, stacked on a leading layer axis."""
    return jax.vmap(make_block)(jax.random.split(key, count))


FEW_BLOCKS = 8  # so many are compiled one by one on a CPU


def run_blocks(step: Callable[[Any, Any], Any], x: Any, blocks: Any, count: int, remat: str) -> Any:
    """Applies `step(x, block) -> x` for the first `count` of stacked blocks.

    Args:
        step: one block.
        x: what the blocks pass on, an array or several.
        blocks: tree of arrays with a leading layer axis.
        count: how many blocks to run.
        remat: a key of `POLICIES`.
    """
    body = _scanned(step, remat)
    if count == jax.tree.leaves(blocks)[0].shape[0]:
        return jax.lax.scan(body, x, blocks, unroll=_unrolled(count, remat))[0]

    # Scanning over a slice of the stack would copy the parameters of these blocks.
    def indexed(x, i):
        return body(x, jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, i, 0, False), blocks))

    return jax.lax.scan(indexed, x, jnp.arange(count))[0]


def run_all_blocks(
    step: Callable[[Any, Any], Any], x: Any, blocks: Any, layer: int, remat: str
) -> tuple[Any, Any]:
    """As `run_blocks` for all blocks: what the last one gives, and what block `layer` gave (0: x).

    One scan and not two: the gradients of blocks that are sliced out of the stack would be added
    into a stack of zeros, and their parameters copied.
    """
    body, count = _scanned(step, remat), jax.tree.leaves(blocks)[0].shape[0]

    def seeing(carried, numbered):
        (x, seen), (number, block) = carried, numbered
        x = body(x, block)[0]  # what is seen passes it by, so that no block keeps it
        return (x, jax.tree.map(partial(jnp.where, number == layer), x, seen)), None

    blocks = jnp.arange(1, count + 1), blocks
    return jax.lax.scan(seeing, (x, x), blocks, unroll=_unrolled(count, remat))[0]


def _scanned(step: Callable[[Any, Any], Any], remat: str) -> Callable[[Any, Any], tuple[Any, None]]:
    """One block as a scan takes it."""

    def body(x, block):
        return step(x, block), None

    # Inside a scan there is nothing that common-subexpression elimination could undo.
    return (
        body if remat == "none" else jax.checkpoint(body, policy=POLICIES[remat], prevent_cse=False)
    )


def _unrolled(count: int, remat: str) -> int:
    # A scan, so that one block is compiled however many there are. A CPU copies what a scan keeps
    # for the backward pass to and from the stacks of all blocks: there a few blocks are unrolled.
    few = remat == "none" and count <= FEW_BLOCKS and platform() == "cpu"
    return count if few else 1
