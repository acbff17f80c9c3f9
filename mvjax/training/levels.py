"""The error by noise level: one number hides that a model learns the noisy end first.

Levels are flow times τ between 0 (clean) and 1 (pure noise), in five equal bins. A step sees few
samples, so sums and counts are kept apart and added over steps before they are divided.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

BINS = 5


def error_by_level(error: jax.Array, level: jax.Array) -> jax.Array:
    """Sums and counts of the errors in each bin.

    Args:
        error: [n].
        level: τ [n], between 0 and 1.

    Returns:
        float32 [2, BINS]: sums, then counts.
    """
    bin_of = jnp.clip(jnp.floor(level * BINS), 0, BINS - 1)
    inside = bin_of[:, None] == jnp.arange(BINS)
    # Not a product: one error that is not finite would spoil the sums of all bins.
    sums = jnp.where(inside, error[:, None], 0.0).sum(0)
    return jnp.stack([sums, inside.sum(0)]).astype(jnp.float32)


def named_levels(steps: Sequence[np.ndarray]) -> dict[str, float]:
    """Mean error and number of samples of each bin over several steps; no mean for an empty bin.

    Args:
        steps: of `error_by_level`, [2, BINS] each.
    """
    if not steps:
        return {}
    sums, counts = np.sum(steps, axis=0, dtype=np.float64)
    named: dict[str, float] = {}
    for number, (total, count) in enumerate(zip(sums, counts)):
        name = f"tau_{number / BINS:.1f}_{(number + 1) / BINS:.1f}"
        named[f"samples/{name}"] = float(count)
        if count:
            named[f"velocity_mse/{name}"] = float(total / count)
    return named
