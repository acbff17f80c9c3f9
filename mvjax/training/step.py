"""One training step: gradient, optimizer, moving average, metrics, compiled as one program."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mvjax.models.param_tree import Params, merge, split
from mvjax.parallel.rules import Rules, use_rules
from mvjax.training.accumulation import Gradient, mean_gradient
from mvjax.training.stage import Batch, Loss, Stage
from mvjax.training.state import TrainState

Step = Callable[[TrainState, Params, Batch], tuple[TrainState, dict[str, jax.Array]]]


def ema_decay_at(step: jax.Array, decay: float) -> jax.Array:
    """Decay used at a step: (1 + step) / (10 + step), up to `decay`.

    Without the warm-up the average of a short run would be mostly its random start.
    """
    n = step.astype(jnp.float32)
    return jnp.minimum(decay, (1 + n) / (10 + n))


def make_step(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    rules: Rules,
    *,
    seed: int,
    ema_decay: float,
    accumulate: int = 1,
) -> Step:
    """The pure step function (state, frozen, batch) -> (state, metrics).

    Step n draws its randomness from fold_in(key(seed), n), so a resumed run repeats it. Only the
    trainable leaves of `state.params` are differentiated. With `accumulate` > 1 the batch goes
    through the network in as many parts; everything else, the random numbers too, is the same.

    The metrics are float32 scalars: loss, the stage's own, grad_norm (before clipping),
    update_norm, param_norm (both of the trainable parameters), learning_rate, and skipped and
    skipped_in_a_row (steps left out because the gradient was not finite); and "by_level" of
    `error_by_level` where the stage has it.
    """
    param_axes, _ = split(stage.axes, stage.trainable)

    def gradient(
        state: TrainState, trainable: Params, fixed: Params, frozen: Params, batch: Batch
    ) -> Gradient:
        def of_part(trainable: Params, part: Batch, draws: Batch) -> Gradient:
            def loss(trainable: Params) -> Loss:
                return stage.objective(merge(fixed, trainable), frozen, part, draws)

            return jax.value_and_grad(loss, has_aux=True)(trainable)

        key = jax.random.fold_in(jax.random.key(seed), state.step)
        with use_rules(rules):
            draws = stage.draw(batch, key)
            return mean_gradient(
                of_part, trainable, param_axes, batch, draws, stage.batch_axes, accumulate
            )

    def step(
        state: TrainState, frozen: Params, batch: Batch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        trainable, fixed = split(state.params, stage.trainable)
        (loss, own_metrics), grads = gradient(state, trainable, fixed, frozen, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        skips = opt_state.skipped_in_a_row > 0  # and then the average stays where it is, too
        decay = jnp.where(skips, 1.0, ema_decay_at(state.step, ema_decay))
        ema = {}
        if state.ema:
            ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, trainable)
        metrics = {
            "loss": loss,
            **own_metrics,
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(trainable),
            # Skipped steps do not advance the schedule.
            "learning_rate": schedule(state.step - state.opt_state.skipped),
            "skipped": opt_state.skipped,
            "skipped_in_a_row": opt_state.skipped_in_a_row,
        }
        new_state = TrainState(state.step + 1, merge(fixed, trainable), opt_state, ema)
        return new_state, jax.tree.map(lambda m: m.astype(jnp.float32), metrics)

    return step


def compile_step(
    step: Step, state: TrainState, frozen: Params, batch: Batch
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """Compiles `step` for the given (abstract or real) arguments, keeping the state's shardings.

    The state's buffers are donated: the argument passed to a call must not be used again.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (state, frozen, batch))
    whole = jax.sharding.NamedSharding(state.step.sharding.mesh, jax.sharding.PartitionSpec())
    compiled = jax.jit(
        step, in_shardings=shardings, out_shardings=(shardings[0], whole), donate_argnums=0
    )
    return compiled.lower(state, frozen, batch).compile()
