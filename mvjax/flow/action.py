"""Rectified flow of the action chunk: loss and ten-step Euler sampling (mimic-video release)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def scale_noisy_actions(noisy: Array, time: Array) -> Array:
    """Divides (1 - t) x0 + t ε by its std √((1 - t)² + t²).

    Args:
        noisy: [b, horizon, dim].
        time: flow time [b, 1].
    """
    return noisy / jnp.sqrt((1 - time) ** 2 + time**2)[..., None]


def action_loss(
    velocity: Callable[[Array, Array], Array],
    actions: Array,
    noise: Array,
    time: Array,
    mask: Array | None = None,
) -> Array:
    """Mean squared error of the velocity ε - x0, per sample [b].

    Args:
        velocity: called with the scaled noisy actions and their time [b, 1].
        actions, noise: [b, horizon, dim].
        time: flow time [b, 1].
        mask: [b, horizon, dim], 1 where an action is to be learned and 0 elsewhere; None for all.
            The mean is over the former, and 0 for a sample that has none.
    """
    noisy = (1 - time)[..., None] * actions + time[..., None] * noise
    v = velocity(scale_noisy_actions(noisy, time), time)
    error = (v - (noise - actions)) ** 2
    if mask is None:
        return jnp.mean(error, axis=(1, 2))
    return (mask * error).sum(axis=(1, 2)) / jnp.maximum(mask.sum(axis=(1, 2)), 1)


def sample_actions(velocity: Callable[[Array, Array], Array], noise: Array, steps: int) -> Array:
    """Integrates from noise (t = 1) to actions (t = 0) with `steps` Euler steps.

    Args:
        velocity: as in `action_loss`.
        noise: [b, horizon, dim]; the sample keeps its dtype from step to step (the release's is
            bfloat16), while every step is computed in float32.
        steps: number of steps; the release uses 10.
    """
    # Summed in float32, as released: the decoder's time features have periods down to 0.004 and
    # are rounded to bfloat16, so a last digit of the time can turn into one of theirs.
    times = np.cumsum([1.0] + [-1 / steps] * (steps - 1), dtype=np.float32)

    def step(x, time):
        wide, time = x.astype(jnp.float32), jnp.full((x.shape[0], 1), time)
        wide -= velocity(scale_noisy_actions(wide, time), time) / steps
        return wide.astype(x.dtype), None

    return jax.lax.scan(step, noise, times)[0]
