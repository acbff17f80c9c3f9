"""Noise levels: distributions of σ (video) and τ (action) in training, the σ table of sampling.

Everywhere τ = σ / (1 + σ); τ = 1 is pure noise, τ = 0 is clean.
"""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
TAIL_SIGMA = (200.0, 1e5)


def flow_time(sigma: Array) -> Array:
    """τ = σ / (1 + σ)."""
    return sigma / (1 + sigma)


def sample_video_sigma(key: Array, batch: int, *, scale: float, tail: float) -> Array:
    """σ = scale · exp(N(0, 1)); with probability `tail` log-uniform on [200, 1e5] instead.

    The published scale is √(latent frames) = 4 and the published tail 0.05 (mimic-video release,
    `draw_video_sigma`; Cosmos-Predict2, `high_sigma_ratio`).

    Returns:
        float32 [batch, 1], shared by all frames of a sample.
    """
    normal, uniform, choice = jax.random.split(key, 3)
    sigma = scale * jnp.exp(jax.random.normal(normal, (batch, 1)))
    low, high = np.log(TAIL_SIGMA)
    extreme = jnp.exp(jax.random.uniform(uniform, (batch, 1), minval=low, maxval=high))
    return jnp.where(jax.random.bernoulli(choice, tail, (batch, 1)), extreme, sigma)


def sample_action_time(key: Array, batch: int, *, alpha: float, beta: float) -> Array:
    """t = 0.999 u + 0.001 with u ~ Beta(alpha, beta).

    The released configurations use Beta(1, 1), uniform; the paper's density ∝ √(t - 0.001) is
    Beta(1.5, 1) (mimic-video release, `schedulers/beta_scheduler.py`).

    Returns:
        float32 [batch, 1].
    """
    return 0.999 * jax.random.beta(key, alpha, beta, (batch, 1)) + 0.001


def karras_sigmas(
    steps: int, *, sigma_max: float = 80.0, sigma_min: float = 0.002, rho: float = 7.0
) -> np.ndarray:
    """The `steps` + 1 noise levels of sampling, from σ_max down to σ_min, float64.

    Karras et al. 2022, eq. 5; the release uses 35 steps.
    """
    if steps < 1:
        raise ValueError(f"Sampling needs at least one step, got {steps}.")
    ramp = np.arange(steps + 1, dtype=np.float64) / steps
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (top + ramp * (bottom - top)) ** rho
