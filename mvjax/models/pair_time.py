"""The decoder's joint encoding of action time and video time (paper: low-rank bilinear-affine)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mvjax.models.layers import Linear, silu
from mvjax.models.precision import round_to_bfloat16
from mvjax.parallel.rules import constrain

Array = jax.Array
MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0


def time_features(t: Array, d: int) -> Array:
    """concat(sin, cos) of 2π t / period, for d/2 periods from 4e-3 to 4, rounded to bfloat16.

    The release computes the angle in float64 and rounds the features to bfloat16 in every
    precision, so the rounding is part of the network. Without float64 on accelerators the number
    of turns is reduced modulo one exactly: `t` and the frequencies are cut into 12-bit pieces
    whose products fit float32.

    Args:
        t: flow times in [0, 1], any shape.
        d: number of features.

    Returns:
        float32 [..., d], each value representable in bfloat16.
    """
    exponent = np.arange(d // 2) / (d // 2 - 1)
    frequency = 1.0 / (MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** exponent)
    f_high = _high_bits_numpy(frequency)
    f_mid = _high_bits_numpy(frequency - f_high)
    f_low = (frequency - f_high - f_mid).astype(np.float32)
    t = t.astype(jnp.float32)[..., None]
    t_high = _high_bits(t)
    t_low = t - t_high
    turns = sum(
        _fraction(product)
        for product in (t_high * f_high, t_high * f_mid, t_low * f_high, t_low * f_mid, t * f_low)
    )
    angle = 2 * np.pi * _fraction(turns)
    features = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return round_to_bfloat16(features)


def _high_bits(x: Array) -> Array:
    """The leading 12 significant bits of float32 values."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _high_bits_numpy(x: np.ndarray) -> np.ndarray:
    bits = x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFF000)
    return bits.view(np.float32)


def _fraction(turns: Array) -> Array:
    return turns - jnp.round(turns)


class PairTimeEmbedding(nnx.Module):
    """z = B(φ_a) ⊙ C(φ_v) - b_B ⊙ b_C, with φ = SiLU(Linear(features of the time)).

    Subtracting the product of the biases leaves the bilinear term and both linear marginals
    (mimic-video release, `World2ActionDIT.t_embedder.pair`).
    """

    def __init__(self, key: Array, d: int, rank: int):
        keys = jax.random.split(key, 5)
        axes = ("embed", None)
        self.d = d
        self.proj_action = Linear(keys[0], d, d, axes, bias=True)
        self.proj_video = Linear(keys[1], d, d, axes, bias=True)
        self.to_rank_action = Linear(keys[2], d, rank, axes, bias=True)
        self.to_rank_video = Linear(keys[3], d, rank, axes, bias=True)
        self.to_rank_action.bias[...] = jnp.full(rank, 0.382050174)
        self.to_rank_video.bias[...] = jnp.full(rank, 0.382050174)
        self.to_shared = Linear(keys[4], rank, 3 * d, axes)

    def __call__(self, action_time: Array, video_time: Array, dtype) -> tuple[Array, Array]:
        """Time embedding z [b, n, rank] and the shared modulation term [b, n, 3 d].

        Args:
            action_time: flow time of every token [b, n].
            video_time: flow time τ of the video [b, 1].
            dtype: compute dtype.
        """
        action = time_features(action_time, self.d).astype(dtype)
        video = time_features(video_time, self.d).astype(dtype)
        # Said here, since the compiler would rather split the width, as the kernels are.
        wide = silu(self.proj_action(action)), silu(self.proj_video(video))
        wide = [constrain(x, "batch", None, None) for x in wide]
        action, video = self.to_rank_action(wide[0]), self.to_rank_video(wide[1])
        constant = self.to_rank_action.bias[...].astype(dtype)
        constant *= self.to_rank_video.bias[...].astype(dtype)
        z = action * video - constant
        return z, self.to_shared(z)
