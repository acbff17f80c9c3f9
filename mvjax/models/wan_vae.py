"""The Wan 2.1 VAE, the video tokenizer of Cosmos-Predict2: 8× in space, 4× in time, causal.

The release streams a clip through caches, a few frames at a time. The same numbers come from one
pass over the whole clip, or from chunks of it with bounded memory (`WanVAEConfig.chunk`): layers
that look back in time take a `History`, so one code serves both. Video is [b, t, h, w, c].

In this order: sizes; the tokenizer; chunks and their history; encoder and decoder; their layers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from data_pipelines.clip import SPATIAL, TEMPORAL, check_frames
from mvjax.models.layers import Linear, compute_dtype, kaiming_uniform, rounded

Array = jax.Array
Memory = list[Array]

# Mean and standard deviation of the released model's latents, per channel.
LATENT_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENT_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclass(frozen=True)
class WanVAEConfig:
    """Sizes and precision of a Wan VAE; `mvjax.models.presets` names the released one.

    Attributes:
        dim: channels at full resolution, even.
        channel_multipliers: width of each of the four resolutions, in units of `dim`.
        num_res_blocks: residual blocks per resolution (the decoder has one more).
        latent_channels: channels of the latents.
        temporal_downsample: which of the three halvings of the picture also halve time; two do.
        latent_mean, latent_std: statistics by which latents are normalised, one per channel.
        precision: "float32"; "bfloat16" (norms and latent statistics stay float32); or "published",
            which rounds norms and latent statistics to bfloat16 too, like the release.
        chunk: latent frames computed at a time, which bounds the memory; 0 takes the whole clip.
    """

    dim: int = 96
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    latent_channels: int = 16
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latent_mean: tuple[float, ...] = LATENT_MEAN
    latent_std: tuple[float, ...] = LATENT_STD
    precision: str = "float32"
    chunk: int = 0

    def __post_init__(self):
        compute_dtype(self.precision)
        widths, temporal = self.channel_multipliers, self.temporal_downsample
        mean, std, channels = self.latent_mean, self.latent_std, self.latent_channels
        for name, holds, expected in (
            ("dim", self.dim >= 2 and self.dim % 2 == 0, "even (the decoder halves it), 2 or more"),
            ("channel_multipliers", len(widths) == 4 and min(widths) > 0, "four positive numbers"),
            # 4x in time is two halvings.
            ("temporal_downsample", (len(temporal), sum(temporal)) == (3, 2), "two of three True"),
            ("num_res_blocks", self.num_res_blocks >= 1, "1 or more"),
            ("latent_mean", len(mean) == channels, f"{channels} numbers, one per channel"),
            ("latent_std", len(std) == channels, f"{channels} numbers, one per channel"),
            ("latent_mean", all(map(math.isfinite, mean)), "finite"),
            ("latent_std", all(0 < value < math.inf for value in std), "positive and finite"),
            ("chunk", self.chunk >= 0, "a number of latent frames, or 0 for the whole clip"),
        ):
            if not holds:
                raise ValueError(f"Wan VAE {name} must be {expected}; got {getattr(self, name)}.")

    @property
    def dtype(self) -> str:
        """The dtype of activations and, at use, of weights."""
        return compute_dtype(self.precision)

    @property
    def encoder_widths(self) -> list[tuple[int, int]]:
        """(channels in, channels out) of the residual blocks of each level of the encoder."""
        out = [self.dim * m for m in self.channel_multipliers]
        return list(zip([self.dim, *out], out))

    @property
    def decoder_widths(self) -> list[tuple[int, int]]:
        """The same for the decoder, coarsest first; `Up` between levels halves the channels."""
        out = [self.dim * m for m in self.channel_multipliers[::-1]]
        return list(zip([out[0], *(d // 2 for d in out)], out))


class WanVAE(nnx.Module):
    """The tokenizer; `LinearTokenizer` has the same interface."""

    def __init__(self, config: WanVAEConfig, key: Array):
        keys = jax.random.split(key, 4)
        c = config.latent_channels
        self.config = config
        self.encoder = Encoder(keys[0], config)
        self.quant_conv = pointwise(keys[1], 2 * c, 2 * c)
        self.post_quant_conv = pointwise(keys[2], c, c)
        self.decoder = Decoder(keys[3], config)

    @jax.jit
    def encode(self, video: Array) -> Array:
        """Normalised posterior means of a video.

        Args:
            video: [b, 1 + 4k, h, w, 3] in [-1, 1]; h and w multiples of 8.

        Returns:
            float32 [b, 1 + k, h/8, w/8, latent_channels]. Latent i depends on the first 1 + 4i
            frames alone, so what was observed can be encoded without what comes after.
        """
        _, t, h, w, c = video.shape
        check_frames(t)
        if h % SPATIAL or w % SPATIAL or c != 3:
            raise ValueError(
                f"Frames of {h}x{w} with {c} channels cannot be encoded: height and width must be "
                f"multiples of {SPATIAL}, with three channels last."
            )

        def encode_chunk(x: Array, history: History) -> Array:
            moments = self.quant_conv(self.encoder(x.astype(self.config.dtype), history))
            # The mean and no sample of the posterior, as Cosmos-Predict2 does.
            mean, _log_variance = jnp.split(moments, 2, axis=-1)
            return self.normalise(mean.astype(jnp.float32))

        return in_chunks(encode_chunk, video, t // TEMPORAL, self.config.chunk, TEMPORAL, 1)

    @jax.jit
    def decode(self, latents: Array) -> Array:
        """The video of normalised latents, not clamped to [-1, 1].

        Args:
            latents: [b, 1 + k, h, w, latent_channels].

        Returns:
            float32 [b, 1 + 4k, 8 h, 8 w, 3].
        """
        _, t, _, _, c = latents.shape
        if t < 1 or c != self.config.latent_channels:
            raise ValueError(
                f"Latents of shape {latents.shape} cannot be decoded: give one frame or more, with "
                f"{self.config.latent_channels} channels last."
            )

        def decode_chunk(x: Array, history: History) -> Array:
            z = self.unnormalise(x.astype(jnp.float32)).astype(self.config.dtype)
            return self.decoder(self.post_quant_conv(z), history).astype(jnp.float32)

        return in_chunks(decode_chunk, latents, t - 1, self.config.chunk, 1, TEMPORAL)

    def normalise(self, mean: Array) -> Array:
        """Latents of unit variance from posterior means, float32 [..., latent_channels]."""
        step, shift, inverse = self._statistics()
        return step(step(mean - shift) * inverse)

    def unnormalise(self, latents: Array) -> Array:
        """The inverse of `normalise`."""
        step, shift, inverse = self._statistics()
        return step(step(step(latents) / inverse) + shift)

    def _statistics(self) -> tuple[Callable[[Array], Array], Array, Array]:
        """How to round a step of the normalisation, the latents' mean, and 1 / their std."""
        step = partial(rounded, precision=self.config.precision)
        # The release casts mean and std and keeps 1 / std, so each of these is rounded.
        mean = jnp.asarray(self.config.latent_mean, jnp.float32)
        std = jnp.asarray(self.config.latent_std, jnp.float32)
        return step, step(mean), step(1 / step(std))


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
        self.after.append(tail[:, -frames:])  # zeros where the clip is still shorter than that
        return x, frames if self.at_start else 0


def in_chunks(
    step: Callable[[Array, History], Array],
    x: Array,
    groups: int,
    chunk: int,
    rate_in: int,
    rate_out: int,
) -> Array:
    """Runs a causal network over a clip, in chunks of equal length whose memory is reused.

    The first pass takes the first frame and the groups that do not fill a chunk, so that two
    compiled bodies serve every length.

    Args:
        step: maps [b, n, ...] to [b, m, ...], given the history of the chunks before.
        x: the whole clip [b, 1 + rate_in · groups, ...].
        groups: latent frames after the first.
        chunk: groups per chunk; 0 for all at once.
        rate_in, rate_out: frames of the input and of the output in one group.

    Returns:
        The output of the whole clip [b, 1 + rate_out · groups, ...].
    """
    first = groups % chunk if chunk else groups
    history = History()
    start = step(x[:, : 1 + rate_in * first], history)
    if first == groups:
        return start

    # Chunks are read from and written to one buffer in place: a scan would hold a second copy.
    out = jnp.zeros((len(x), 1 + rate_out * groups, *start.shape[2:]), start.dtype)
    out = jax.lax.dynamic_update_slice_in_dim(out, start, 0, axis=1)

    def body(i: Array, carry: tuple[Memory, Array]) -> tuple[Memory, Array]:
        before, out = carry
        group = first + i * chunk
        part = jax.lax.dynamic_slice_in_dim(x, 1 + rate_in * group, rate_in * chunk, axis=1)
        history = History(before)
        y = step(part, history)
        out = jax.lax.dynamic_update_slice_in_dim(out, y, 1 + rate_out * group, axis=1)
        return history.after, out

    return jax.lax.fori_loop(0, (groups - first) // chunk, body, (history.after, out))[1]


class Encoder(nnx.Module):
    """Video to mean and log-variance of the latents."""

    def __init__(self, key: Array, config: WanVAEConfig):
        keys = jax.random.split(key, 10)
        widths, blocks, precision = config.encoder_widths, config.num_res_blocks, config.precision
        d = widths[-1][1]
        self.conv_in = CausalConv(keys[0], 3, widths[0][0])
        for i, (d_in, d_out) in enumerate(widths):
            last = i == len(widths) - 1
            down = None if last else Down(keys[1 + i], d_out, config.temporal_downsample[i])
            setattr(self, f"level_{i}", Level(keys[4 + i], d_in, d_out, blocks, precision, down))
        self.middle = Middle(keys[8], d, precision)
        self.norm_out = ChannelNorm(d, precision)
        self.conv_out = CausalConv(keys[9], d, 2 * config.latent_channels)

    def __call__(self, x: Array, history: History) -> Array:
        """Maps [b, t, h, w, 3] to [b, t', h/8, w/8, 2 c]."""
        x = self.conv_in(x, history)
        for i in range(4):
            x = getattr(self, f"level_{i}")(x, history)
        x = self.middle(x, history)
        return self.conv_out(jax.nn.silu(self.norm_out(x)), history)


class Decoder(nnx.Module):
    """Latents to video."""

    def __init__(self, key: Array, config: WanVAEConfig):
        keys = jax.random.split(key, 10)
        widths, blocks = config.decoder_widths, config.num_res_blocks + 1
        temporal, precision = config.temporal_downsample[::-1], config.precision
        self.conv_in = CausalConv(keys[0], config.latent_channels, widths[0][0])
        self.middle = Middle(keys[1], widths[0][0], precision)
        for i, (d_in, d_out) in enumerate(widths):
            last = i == len(widths) - 1
            up = None if last else Up(keys[2 + i], d_out, temporal[i])
            setattr(self, f"level_{i}", Level(keys[5 + i], d_in, d_out, blocks, precision, up))
        self.norm_out = ChannelNorm(widths[-1][1], precision)
        self.conv_out = CausalConv(keys[9], widths[-1][1], 3)

    def __call__(self, x: Array, history: History) -> Array:
        """Maps [b, t', h/8, w/8, c] to [b, t, h, w, 3]."""
        x = self.middle(self.conv_in(x, history), history)
        for i in range(4):
            x = getattr(self, f"level_{i}")(x, history)
        return self.conv_out(jax.nn.silu(self.norm_out(x)), history)


class Level(nnx.Module):
    """The residual blocks at one resolution, then the change to the next one, if there is one."""

    def __init__(
        self, key: Array, d_in: int, d_out: int, num_blocks: int, precision: str, resample
    ):
        self.num_blocks, self.resample = num_blocks, resample
        for i, block_key in enumerate(jax.random.split(key, num_blocks)):
            block = ResidualBlock(block_key, d_in if i == 0 else d_out, d_out, precision)
            setattr(self, f"block_{i}", block)

    def __call__(self, x: Array, history: History) -> Array:
        """Maps [b, t, h, w, d_in] to the shape that the resampling gives."""
        for i in range(self.num_blocks):
            x = getattr(self, f"block_{i}")(x, history)
        return x if self.resample is None else self.resample(x, history)


class Middle(nnx.Module):
    """Residual block, spatial attention, residual block, at the coarsest resolution."""

    def __init__(self, key: Array, d: int, precision: str):
        keys = jax.random.split(key, 3)
        self.block_0 = ResidualBlock(keys[0], d, d, precision)
        self.attention = SpatialAttention(keys[1], d, precision)
        self.block_1 = ResidualBlock(keys[2], d, d, precision)

    def __call__(self, x: Array, history: History) -> Array:
        """Maps [b, t, h, w, d] to the same shape."""
        return self.block_1(self.attention(self.block_0(x, history)), history)


class Conv(nnx.Module):
    """A convolution with bias, over the axes whose extents `size` gives: (h, w) or (t, h, w)."""

    def __init__(
        self, key: Array, size: tuple[int, ...], d_in: int, d_out: int, stride: tuple[int, ...] = ()
    ):
        self.stride = stride or (1,) * len(size)
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

    With precision "published" every step is rounded to bfloat16, as in the release (not diffusers).
    """

    def __init__(self, d: int, precision: str):
        self.precision = precision
        self.scale = nnx.Param(jnp.ones(d), axes=(None,))

    def __call__(self, x: Array) -> Array:
        """Normalises [..., d]."""
        step = partial(rounded, precision=self.precision)
        wide, scale = x.astype(jnp.float32), self.scale[...].astype(jnp.float32)
        length = step(jnp.sqrt(jnp.sum(wide**2, axis=-1, keepdims=True)))
        unit = step(wide / jnp.maximum(length, 1e-12))
        return (step(unit * math.sqrt(x.shape[-1])) * step(scale)).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """Norm → SiLU → conv, twice, around a residual connection."""

    def __init__(self, key: Array, d_in: int, d_out: int, precision: str):
        keys = jax.random.split(key, 3)
        self.norm1 = ChannelNorm(d_in, precision)
        self.conv1 = CausalConv(keys[0], d_in, d_out)
        self.norm2 = ChannelNorm(d_out, precision)
        self.conv2 = CausalConv(keys[1], d_out, d_out)
        self.shortcut = None if d_in == d_out else pointwise(keys[2], d_in, d_out)

    def __call__(self, x: Array, history: History) -> Array:
        """Maps [b, t, h, w, d_in] to [b, t, h, w, d_out]."""
        y = self.conv1(jax.nn.silu(self.norm1(x)), history)
        y = self.conv2(jax.nn.silu(self.norm2(y)), history)
        return y + (x if self.shortcut is None else self.shortcut(x))


class SpatialAttention(nnx.Module):
    """Self-attention among the positions of each frame, one head as wide as the features."""

    def __init__(self, key: Array, d: int, precision: str):
        keys = jax.random.split(key)
        self.norm = ChannelNorm(d, precision)
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
        # Padded below and on the right alone, as published.
        x = per_frame(lambda frames: self.conv(frames, ((0, 1), (0, 1))), x)
        if self.time_conv is None:
            return x
        # The clip's first frame is kept as it is; then come the windows (0,1,2), (2,3,4), ...
        first = x[:, :1]
        known, _ = history.extend(x, 1)
        if known.shape[1] == 1:  # a clip of one frame has no window
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
        # Twice the channels are the two frames that each one becomes.
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
