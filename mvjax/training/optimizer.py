"""AdamW with the release's learning-rate schedules, skipping steps that went wrong."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

WARMUP_START = 1e-6  # fraction of the learning rate at step 0 (release: LambdaLinear f_start)


class SkipState(NamedTuple):
    """Optimizer state with counts of the skipped steps (int32 scalars)."""

    skipped: jax.Array
    skipped_in_a_row: jax.Array
    inner: Any


def make_schedule(config: Any) -> optax.Schedule:
    """The learning rate as a function of the number of updates made so far.

    `constant` holds the rate. `linear` is the release's LambdaLinear: the fraction of the rate is
    final + (1 - final) (decay_steps - n) / decay_steps, so it starts just below 1 after the warm-up
    and ends at `final_fraction`. `cosine` goes from 1 to `final_fraction` between the end of the
    warm-up and `decay_steps`. All start with a linear warm-up over `warmup_steps` (0: none).

    Args:
        config: learning_rate, schedule ("constant" | "linear" | "cosine"), warmup_steps,
            decay_steps, final_fraction.
    """
    kind, warmup, decay = config.schedule, int(config.warmup_steps), int(config.decay_steps)
    final = float(config.final_fraction)
    if kind not in ("constant", "linear", "cosine"):
        raise ValueError(
            f"optimizer.schedule is {kind!r}; expected 'constant', 'linear' or 'cosine'."
        )
    if kind != "constant" and decay <= warmup:
        raise ValueError(
            f"optimizer.decay_steps is {decay}, but a {kind} schedule must end after the "
            f"{warmup} warm-up steps; raise optimizer.decay_steps."
        )

    def fraction(n: jax.Array) -> jax.Array:
        if kind == "linear":
            return final + (1 - final) * jnp.maximum(decay - n, 0) / decay
        if kind == "cosine":
            progress = jnp.clip((n - warmup) / (decay - warmup), 0, 1)
            return final + (1 - final) * 0.5 * (1 + jnp.cos(math.pi * progress))
        return jnp.ones_like(n)

    def schedule(count: jax.Array) -> jax.Array:
        n = jnp.asarray(count, jnp.float32)
        warm = WARMUP_START + (1 - WARMUP_START) * n / max(warmup, 1)
        return config.learning_rate * jnp.where(n < warmup, warm, fraction(n))

    return schedule


def make_optimizer(config: Any) -> optax.GradientTransformation:
    """AdamW: clip by global norm, Adam, weight decay on every parameter, learning rate.

    The release's settings are b1 0.9, b2 0.99, eps 1e-8, weight_decay 0.1 on all parameters and
    clip_norm 10. A step whose gradient norm is not finite changes nothing but the counts in
    `SkipState`; in particular it does not advance the schedule.

    Args:
        config: What `make_schedule` reads, and b1, b2, eps, weight_decay, clip_norm (0: no clip),
            mu_dtype ("bfloat16" halves the memory of the first moment; "" keeps it float32).
    """
    if config.mu_dtype not in ("", "bfloat16"):
        raise ValueError(f"optimizer.mu_dtype is {config.mu_dtype!r}; expected '' or 'bfloat16'.")
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    return _skip_nonfinite(
        optax.chain(
            *clip,
            optax.scale_by_adam(
                b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=config.mu_dtype or None
            ),
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(make_schedule(config)),
        )
    )


def _skip_nonfinite(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    def init(params: Any) -> SkipState:
        zero = jnp.zeros((), jnp.int32)
        return SkipState(zero, zero, inner.init(params))

    def update(grads: Any, state: SkipState, params: Any = None) -> tuple[Any, SkipState]:
        finite = jnp.isfinite(optax.tree.norm(grads))
        updates, new_inner = inner.update(grads, state.inner, params)
        updates = jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), updates)
        new_inner = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new_inner, state.inner)
        one = jnp.where(finite, 0, 1)
        in_a_row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
        return updates, SkipState(state.skipped + one, in_a_row, new_inner)

    return optax.GradientTransformation(init, update)
