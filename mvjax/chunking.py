"""Real-time chunking: a chunk of actions continues the one that the robot is executing meanwhile.

There are two ways. A decoder that was trained with given actions is given those that will be
executed ("prefix", Black et al. 2025, arXiv 2512.05964); or the Euler steps of any decoder are
turned towards them ("guided", Black et al. 2025, arXiv 2506.07339). `mvjax.flow.sample_actions`
does both.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

CHUNKING = ("none", "prefix", "guided")


class Pending(NamedTuple):
    """What a robot still has to execute of its last chunk, as a batch of queries is answered.

    Attributes:
        actions: from the moment of the observation on, [b, horizon, dim], normalised; zeros after
            the last one.
        count: how many there are, int32 [b]; 0: the query begins an episode.
        delay: how many will be executed before the answer arrives, int32 [b].
    """

    actions: Array
    count: Array
    delay: Array

    @property
    def held(self) -> Array:
        """The actions that are executed whatever the answer, bool [b, horizon]."""
        held = jnp.minimum(self.delay, self.count)
        return jnp.arange(self.actions.shape[1]) < held[:, None]


GUIDANCE = 5.0  # the largest weight of the guidance (β of Black et al. 2025)


def pending_weights(pending: Pending) -> Array:
    """How much each action of the new chunk shall be that of the last one: [b, horizon], 0 to 1.

    1 for those that are executed meanwhile, then falling to 0 at the last one that there is
    (real-time chunking, Black et al. 2025, arXiv 2506.07339, eq. 5: H - s is `count`, d `delay`).
    """
    index = jnp.arange(pending.actions.shape[1])
    end = pending.count[:, None]
    start = jnp.minimum(pending.delay[:, None], end)
    c = jnp.clip((end - index) / (end - start + 1), 0.0, 1.0)
    falling = jnp.where(index < end, c * jnp.expm1(c) / (np.e - 1), 0.0)
    return jnp.where(index < start, 1.0, falling)


def guided_velocity(
    velocity: Callable[[Array], Array], x: Array, time: Array, pending: Pending
) -> Array:
    """The velocity, turned so that the chunk ends near what is pending.

    Real-time chunking (Black et al. 2025, arXiv 2506.07339, eq. 2 to 4), whose time 1 - t runs from
    noise to data: v - min(β, ((1 - t)² + t²) / (t (1 - t))) · ∂x0/∂xᵀ W (Y - x0), with the clean
    prediction x0 = x - t v(x) and the `pending_weights` W.

    Args:
        velocity: of noisy actions on the line, before `scale_noisy_actions`.
        x: those actions, float32 [b, horizon, dim].
        time: their flow time, one number.
        pending: what the chunk shall continue.
    """

    def clean(x: Array) -> tuple[Array, Array]:
        v = velocity(x)
        return x - time * v, v

    x0, pull, v = jax.vjp(clean, x, has_aux=True)
    (correction,) = pull(pending_weights(pending)[..., None] * (pending.actions - x0))
    # At pure noise the quotient is infinite, and β is the smaller.
    quotient = ((1 - time) ** 2 + time**2) / jnp.maximum(time * (1 - time), 1e-9)
    return v - jnp.minimum(GUIDANCE, quotient) * correction
