"""Rectified flow of the video in its σ form, with frame-replacement conditioning.

The network sees (1 - τ) (x0 + σ ε) = (1 - τ) x0 + τ ε and predicts the velocity ε - x0; the first
latent frames are conditioning: they enter clean, with the time of σ = 1e-4 and a mask of ones, and
their prediction is replaced by what they are. Source: Cosmos-Predict2, `RectifiedFlowScaling` and
`pipelines/video2world.py:denoise`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mvjax.flow.noise_levels import flow_time

Array = jax.Array
CONDITION_SIGMA = 1e-4


class NetworkInput(NamedTuple):
    """What the video DiT is called with: latents, timesteps [b, t], condition mask [b, t]."""

    latents: Array
    timesteps: Array
    condition_mask: Array


def condition_mask(num_condition: Array, frames: int) -> Array:
    """1 for the first `num_condition` [b] of `frames` latent frames: float32 [b, frames]."""
    return (jnp.arange(frames) < num_condition[:, None]).astype(jnp.float32)


def network_input(noisy: Array, clean: Array, sigma: Array, mask: Array) -> NetworkInput:
    """Scales the noisy latents and puts the conditioning frames in.

    Args:
        noisy: x0 + σ ε, [b, t, h, w, c].
        clean: latents whose masked frames are the conditioning frames, [b, t, h, w, c].
        sigma: noise level [b, 1].
        mask: 1 for conditioning frames [b, t].
    """
    tau = flow_time(sigma)
    m = mask[:, :, None, None, None]
    latents = m * clean + (1 - m) * (1 - tau)[:, :, None, None, None] * noisy
    times = mask * flow_time(jnp.float32(CONDITION_SIGMA)) + (1 - mask) * tau
    return NetworkInput(latents, times, mask)


def clean_prediction(
    velocity: Array, noisy: Array, clean: Array, sigma: Array, mask: Array
) -> Array:
    """x0 = (1 - τ) x - τ v; conditioning frames are returned as they are."""
    tau = flow_time(sigma)[:, :, None, None, None]
    m = mask[:, :, None, None, None]
    return m * clean + (1 - m) * ((1 - tau) * noisy - tau * velocity)


def denoise(
    velocity: Callable[[NetworkInput], Array], noisy: Array, clean: Array, sigma: Array, mask: Array
) -> Array:
    """The network's prediction of the clean latents at noise level `sigma` [b, 1]."""
    v = velocity(network_input(noisy, clean, sigma, mask))
    return clean_prediction(v, noisy, clean, sigma, mask)


def loss_weight(sigma: Array) -> Array:
    """(1 + σ)² / σ², which makes the error of the clean prediction that of the velocity."""
    return ((1 + sigma) / sigma) ** 2


def video_loss(x0: Array, prediction: Array, sigma: Array) -> Array:
    """Mean over all elements of (1 + σ)² / σ² (x0 - prediction)², per sample [b].

    Equal to the squared velocity error; conditioning frames count as zeros in the mean, as
    published.
    """
    return loss_weight(sigma)[:, 0] * jnp.mean((x0 - prediction) ** 2, axis=(1, 2, 3, 4))
