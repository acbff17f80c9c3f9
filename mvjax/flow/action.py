"""Rectified flow of the action chunk: loss and ten-step Euler sampling (mimic-video release)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array


def scale_noisy_actions(noisy: Array, time: Array) -> Array:
    """Divides (1 - t) x0 + t ε by its std √((1 - t)² + t²).

    Args:
        noisy: [b, horizon, dim].
        time: flow time [b, 1].
    """
    return noisy / jnp.sqrt((1 - time) ** 2 + time**2)[..., None]


def action_loss(
    velocity: Callable[[Array, Array], Array], actions: Array, noise: Array, time: Array
) -> Array:
    """Mean squared error of the velocity ε - x0, per sample [b].

    Args:
        velocity: called with the scaled noisy actions and their time [b, 1].
        actions, noise: [b, horizon, dim].
        time: flow time [b, 1].
    """
    noisy = (1 - time)[..., None] * actions + time[..., None] * noise
    v = velocity(scale_noisy_actions(noisy, time), time)
    return jnp.mean((v - (noise - actions)) ** 2, axis=(1, 2))


def sample_actions(velocity: Callable[[Array, Array], Array], noise: Array, steps: int) -> Array:
    """Integrates from noise (t = 1) to actions (t = 0) with `steps` Euler steps.

    Args:
        velocity: as in `action_loss`.
        noise: [b, horizon, dim].
        steps: number of steps; the release uses 10.
    """

    def step(i, x):
        time = jnp.full((x.shape[0], 1), 1.0) - i / steps
        return x - velocity(scale_noisy_actions(x, time), time) / steps

    return jax.lax.fori_loop(0, steps, step, noise)
