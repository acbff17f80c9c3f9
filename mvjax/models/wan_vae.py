"""The Wan 2.1 VAE, the video tokenizer of Cosmos-Predict2: 8× in space, 4× in time, causal.

The release streams a clip through caches, a few frames at a time. The same numbers come from one
pass over the whole clip, or from chunks of it with bounded memory (`WanVAEConfig.chunk`).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from mvjax.clip import SPATIAL, TEMPORAL, check_frames
from mvjax.models.precision import round_to_bfloat16
from mvjax.models.wan_vae_config import WanVAEConfig
from mvjax.models.wan_vae_layers import (
    CausalConv,
    ChannelNorm,
    Down,
    History,
    ResidualBlock,
    SpatialAttention,
    Up,
    pointwise,
)

Array = jax.Array
Memory = list[Array]


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

        Raises:
            ValueError: the frames are not 1 + 4k, or their size does not fit.
        """
        _, t, h, w, c = video.shape
        check_frames(t)
        if h % SPATIAL or w % SPATIAL or c != 3:
            raise ValueError(
                f"Frames of {h}x{w} with {c} channels cannot be encoded: height and width must be "
                f"multiples of {SPATIAL}, and the three channels come last."
            )

        def encode_chunk(x: Array, history: History) -> Array:
            moments = self.quant_conv(self.encoder(x.astype(self.config.dtype), history))
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

        Raises:
            ValueError: no latent frame, or another number of channels.
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
        step = round_to_bfloat16 if self.config.rounded else lambda x: x
        mean = jnp.asarray(self.config.latent_mean, jnp.float32)
        std = jnp.asarray(self.config.latent_std, jnp.float32)
        return step, step(mean), step(1 / step(std))


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


class Level(nnx.Module):
    """The residual blocks at one resolution, then the change to the next one, if there is one."""

    def __init__(self, key: Array, d_in: int, d_out: int, num_blocks: int, rounded: bool, resample):
        keys = jax.random.split(key, num_blocks)
        self.num_blocks = num_blocks
        for i in range(num_blocks):
            block = ResidualBlock(keys[i], d_in if i == 0 else d_out, d_out, rounded)
            setattr(self, f"block_{i}", block)
        self.resample = resample

    def __call__(self, x: Array, history: History) -> Array:
        """Maps [b, t, h, w, d_in] to the shape that the resampling gives."""
        for i in range(self.num_blocks):
            x = getattr(self, f"block_{i}")(x, history)
        return x if self.resample is None else self.resample(x, history)


class Middle(nnx.Module):
    """Residual block, spatial attention, residual block, at the coarsest resolution."""

    def __init__(self, key: Array, d: int, rounded: bool):
        keys = jax.random.split(key, 3)
        self.block_0 = ResidualBlock(keys[0], d, d, rounded)
        self.attention = SpatialAttention(keys[1], d, rounded)
        self.block_1 = ResidualBlock(keys[2], d, d, rounded)

    def __call__(self, x: Array, history: History) -> Array:
        """Maps [b, t, h, w, d] to the same shape."""
        return self.block_1(self.attention(self.block_0(x, history)), history)


class Encoder(nnx.Module):
    """Video to mean and log-variance of the latents."""

    def __init__(self, key: Array, config: WanVAEConfig):
        keys = jax.random.split(key, 10)
        widths, blocks, rounded = config.encoder_widths, config.num_res_blocks, config.rounded
        d = widths[-1][1]
        self.conv_in = CausalConv(keys[0], 3, widths[0][0])
        for i, (d_in, d_out) in enumerate(widths):
            last = i == len(widths) - 1
            down = None if last else Down(keys[1 + i], d_out, config.temporal_downsample[i])
            setattr(self, f"level_{i}", Level(keys[4 + i], d_in, d_out, blocks, rounded, down))
        self.middle = Middle(keys[8], d, rounded)
        self.norm_out = ChannelNorm(d, rounded)
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
        widths, blocks, rounded = config.decoder_widths, config.num_res_blocks + 1, config.rounded
        temporal = config.temporal_downsample[::-1]
        self.conv_in = CausalConv(keys[0], config.latent_channels, widths[0][0])
        self.middle = Middle(keys[1], widths[0][0], rounded)
        for i, (d_in, d_out) in enumerate(widths):
            last = i == len(widths) - 1
            up = None if last else Up(keys[2 + i], d_out, temporal[i])
            setattr(self, f"level_{i}", Level(keys[5 + i], d_in, d_out, blocks, rounded, up))
        self.norm_out = ChannelNorm(widths[-1][1], rounded)
        self.conv_out = CausalConv(keys[9], widths[-1][1], 3)

    def __call__(self, x: Array, history: History) -> Array:
        """Maps [b, t', h/8, w/8, c] to [b, t, h, w, 3]."""
        x = self.middle(self.conv_in(x, history), history)
        for i in range(4):
            x = getattr(self, f"level_{i}")(x, history)
        return self.conv_out(jax.nn.silu(self.norm_out(x)), history)
