"""The layers of the Wan 2.1 VAE: causal convolutions that can run on a clip in pieces.

Video is [b, t, h, w, c]. Layers that look back in time take a `History`, so the same code serves
the whole clip at once and a clip in chunks.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from mvjax.models.layers import Linear, kaiming_uniform
from mvjax.models.precision import round_to_bfloat16

Array = jax.Array


class History:
    """The last inputs of every layer that looks back in time.

    The layers are met in the same order in every chunk, so what they remember is a list. It is a
    tracing-time object: only its lists of arrays cross into and out of a compiled loop.

    Args:
        before: `after` of the previous chunk, or None at the start of the clip.
    """

    def __init__(self, before: list[Array] | None = None):
        self.at_start = before is None
        self._before = iter(before or ())
        self.after: list[Array] = []

    def extend(self, x: Array, frames: int) -> tuple[Array, int]:
        """Puts the remembered frames before `x` [b, t, h, w, c], and remembers its own last ones.

        Returns:
            The frames known so far, and how many of those asked for do not exist: at the start of a
            clip none do, and a convolution pads itself, which is cheaper than copying the clip.
        """
        if not self.at_start:
            x = jnp.concatenate([next(self._before), x], axis=1)
        short = max(0, frames - x.shape[1])
        tail = jnp.pad(x, ((0, 0), (short, 0), (0, 0), (0, 0), (0, 0))) if short else x
        self.after.append(tail[:, -frames:])
        return x, frames if self.at_start else 0


class Conv(nnx.Module):
    """A convolution with bias, channels last, over the two or three axes that `size` names.

    Args:
        key: PRNG key of the initialisation.
        size: extent of the kernel, (h, w) or (t, h, w).
        d_in, d_out: channels.
        stride: step along each axis; () for ones.
    """

    def __init__(
        self, key: Array, size: tuple[int, ...], d_in: int, d_out: int, stride: tuple[int, ...] = ()
    ):
        self.stride = stride or (1,) * len(size)
        # PyTorch's default, as in the release.
        kernel = kaiming_uniform(key, (*size, d_in, d_out), math.prod(size) * d_in)
        self.kernel = nnx.Param(kernel, axes=(None,) * kernel.ndim)
        self.bias = nnx.Param(jnp.zeros(d_out), axes=(None,))

    def __call__(self, x: Array, padding: tuple[tuple[int, int], ...]) -> Array:
        """Convolves [b, (t,) h, w, d_in] after zero padding of each axis, in the dtype of `x`."""
        axes = "THW"[-len(padding) :]
        layout = f"N{axes}C", f"{axes}IO", f"N{axes}C"
        kernel = self.kernel[...].astype(x.dtype)
        y = jax.lax.conv_general_dilated(x, kernel, self.stride, padding, dimension_numbers=layout)
        return y + self.bias[...].astype(x.dtype)


class CausalConv(Conv):
    """3×3×3 convolution that sees its own frame and the two before it."""

    def __init__(self, key: Array, d_in: int, d_out: int):
        super().__init__(key, (3, 3, 3), d_in, d_out)

    def __call__(self, x: Array, history: History) -> Array:
        """Maps [b, t, h, w, d_in] to [b, t, h, w, d_out]."""
        x, missing = history.extend(x, 2)
        return super().__call__(x, ((missing, 0), (1, 1), (1, 1)))


class ChannelNorm(nnx.Module):
    """x / max(‖x‖, 1e-12) · √c · scale over the channels, computed in float32.

    Args:
        d: channels.
        rounded: round every step to bfloat16, as the release does (diffusers does not).
    """

    def __init__(self, d: int, rounded: bool):
        self.rounded = rounded
        self.scale = nnx.Param(jnp.ones(d), axes=(None,))

    def __call__(self, x: Array) -> Array:
        """Normalises [..., d]."""
        step = round_to_bfloat16 if self.rounded else lambda v: v
        wide, scale = x.astype(jnp.float32), self.scale[...].astype(jnp.float32)
        length = step(jnp.sqrt(jnp.sum(wide**2, axis=-1, keepdims=True)))
        unit = step(wide / jnp.maximum(length, 1e-12))
        return (step(unit * math.sqrt(x.shape[-1])) * step(scale)).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """Norm → SiLU → conv, twice, around a residual connection."""

    def __init__(self, key: Array, d_in: int, d_out: int, rounded: bool):
        keys = jax.random.split(key, 3)
        self.norm1 = ChannelNorm(d_in, rounded)
        self.conv1 = CausalConv(keys[0], d_in, d_out)
        self.norm2 = ChannelNorm(d_out, rounded)
        self.conv2 = CausalConv(keys[1], d_out, d_out)
        self.shortcut = None if d_in == d_out else pointwise(keys[2], d_in, d_out)

    def __call__(self, x: Array, history: History) -> Array:
        """Maps [b, t, h, w, d_in] to [b, t, h, w, d_out]."""
        y = self.conv1(jax.nn.silu(self.norm1(x)), history)
        y = self.conv2(jax.nn.silu(self.norm2(y)), history)
        return y + (x if self.shortcut is None else self.shortcut(x))


class SpatialAttention(nnx.Module):
    """Self-attention among the positions of each frame, one head as wide as the features."""

    def __init__(self, key: Array, d: int, rounded: bool):
        keys = jax.random.split(key)
        self.norm = ChannelNorm(d, rounded)
        self.qkv = pointwise(keys[0], d, 3 * d)
        self.proj = pointwise(keys[1], d, d)

    def __call__(self, x: Array) -> Array:
        """Maps [b, t, h, w, d] to the same shape."""
        b, t, h, w, d = x.shape
        qkv = jnp.split(self.qkv(self.norm(x)), 3, axis=-1)
        frames = [jnp.moveaxis(a.reshape(b, t, h * w, 1, d), 1, 0) for a in qkv]
        # One frame at a time, because the scores of a whole 720p clip would take 20 GB; and by
        # plain matmuls, because a head of 384 is too wide for the fused kernels.
        y = jax.lax.map(
            lambda qkv: jax.nn.dot_product_attention(*qkv, implementation="xla"), tuple(frames)
        )
        return x + self.proj(jnp.moveaxis(y, 0, 1).reshape(x.shape))


class Down(nnx.Module):
    """Halves height and width, and with `temporal` also maps frames 1 + 2n to 1 + n."""

    def __init__(self, key: Array, d: int, temporal: bool):
        keys = jax.random.split(key)
        self.conv = Conv(keys[0], (3, 3), d, d, stride=(2, 2))
        self.time_conv = Conv(keys[1], (3, 1, 1), d, d, stride=(2, 1, 1)) if temporal else None

    def __call__(self, x: Array, history: History) -> Array:
        """Maps [b, t, h, w, d] to [b, t or (t + 1) / 2, h/2, w/2, d]; later chunks t to t / 2."""
        x = per_frame(lambda frames: self.conv(frames, ((0, 1), (0, 1))), x)
        if self.time_conv is None:
            return x
        first = x[:, :1]  # the clip's first frame is kept as it is; windows (0,1,2), (2,3,4), ...
        known, _ = history.extend(x, 1)
        if known.shape[1] == 1:
            return first
        y = self.time_conv(known, ((0, 0), (0, 0), (0, 0)))
        return jnp.concatenate([first, y], axis=1) if history.at_start else y


class Up(nnx.Module):
    """Doubles height and width, halves the channels; `temporal` maps frames 1 + n to 1 + 2n."""

    def __init__(self, key: Array, d: int, temporal: bool):
        keys = jax.random.split(key)
        self.time_conv = Conv(keys[0], (3, 1, 1), d, 2 * d) if temporal else None
        self.conv = Conv(keys[1], (3, 3), d, d // 2)

    def __call__(self, x: Array, history: History) -> Array:
        """Maps [b, t, h, w, d] to [b, t or 2t - 1, 2h, 2w, d/2]; later chunks t to 2t."""
        if self.time_conv is not None and history.at_start:
            # The clip's first frame stays single and is hidden from the ones after it.
            x = jnp.concatenate([x[:, :1], self._double(x[:, 1:], history)], axis=1)
        elif self.time_conv is not None:
            x = self._double(x, history)
        return per_frame(lambda frames: self.conv(repeat(frames), ((1, 1), (1, 1))), x)

    def _double(self, x: Array, history: History) -> Array:
        b, t, h, w, d = x.shape
        x, missing = history.extend(x, 2)
        if t == 0:
            return x
        pairs = self.time_conv(x, ((missing, 0), (0, 0), (0, 0))).reshape(b, t, h, w, 2, d)
        return jnp.moveaxis(pairs, 4, 2).reshape(b, 2 * t, h, w, d)


def pointwise(key: Array, d_in: int, d_out: int) -> Linear:
    """A convolution of extent one: a linear map of the channels."""
    return Linear(key, d_in, d_out, (None, None), bias=True)


def per_frame(layer, x: Array) -> Array:
    """Applies a layer of pictures [n, h, w, c] to every frame of [b, t, h, w, c]."""
    y = layer(x.reshape(-1, *x.shape[2:]))
    return y.reshape(*x.shape[:2], *y.shape[1:])


def repeat(x: Array) -> Array:
    """Repeats every pixel 2×2: [n, h, w, c] to [n, 2h, 2w, c] (nearest-neighbour upsampling)."""
    n, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, c))
    return x.reshape(n, 2 * h, 2 * w, c)
