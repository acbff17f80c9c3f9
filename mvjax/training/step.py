"""One training step: gradient, optimizer, moving average, metrics, compiled as one program.

`assemble` makes the step of an experiment and the state that it changes; `make_program` the same
with every argument as a shape, for estimates and benchmarks.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mvjax.experiment import Experiment
from mvjax.models.network import Params, merge, split
from mvjax.parallel import (
    Axes,
    Rules,
    compiler_options,
    constrain,
    sharding_tree,
    use_rules,
)
from mvjax.training.bridge import Backbone, load_backbone
from mvjax.training.directory import BACKBONE
from mvjax.training.objectives import Batch, Loss, Stage, make_stage

Gradient = tuple[Loss, Params]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The arrays of a run.

    Attributes:
        step: Number of steps made, int32 scalar.
        params: All parameters, a plain nested dict, float32 unless the stage says otherwise.
        opt_state: Optimizer state of the trainable parameters only.
        ema: Moving average of the trainable parameters; {} when `training.ema_decay` is 0.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params


Step = Callable[[TrainState, Params, Batch], tuple[TrainState, dict[str, jax.Array]]]


def assemble(
    experiment: Experiment, stage: Stage, mesh: Mesh | AbstractMesh
) -> tuple[optax.GradientTransformation, TrainState, Step]:
    """The optimizer, the state as shapes, and the step (not compiled) of a training run.

    Raises:
        ValueError: If batch, mesh and stage do not go together.
    """
    experiment.check_batch(mesh)
    config = experiment.config
    optimizer, averaging = make_optimizer(config.optimizer), config.training.ema_decay > 0
    abstract = abstract_state(stage, optimizer, averaging, mesh, experiment.rules)
    return optimizer, abstract, make_step(experiment, stage, optimizer)


# --- The step ---


def make_step(
    experiment: Experiment, stage: Stage, optimizer: optax.GradientTransformation
) -> Step:
    """The pure step function (state, frozen, batch) -> (state, metrics).

    Step n draws its randomness from fold_in(key(seed), n), so a resumed run repeats it. Only the
    trainable leaves of `state.params` are differentiated. With `training.accumulate` > 1 the batch
    goes through the network in as many parts; everything else, including the random numbers, is
    the same.

    The metrics are float32 scalars: loss, the stage's own, grad_norm (before clipping),
    update_norm, param_norm (both of the trainable parameters), learning_rate, and skipped and
    skipped_in_a_row (steps left out because the gradient was not finite); and "by_level" of
    `error_by_level`, one or several, where the stage has it.
    """
    settings, rules = experiment.config.training, experiment.rules
    schedule = make_schedule(experiment.config.optimizer)
    param_axes, _ = split(stage.axes, stage.trainable)

    def step(
        state: TrainState, frozen: Params, batch: Batch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        trainable, fixed = split(state.params, stage.trainable)

        def gradient(trainable: Params, part: Batch, draws: Batch) -> Gradient:
            def loss(trainable: Params) -> Loss:
                return stage.objective(merge(fixed, trainable), frozen, part, draws)

            return jax.value_and_grad(loss, has_aux=True)(trainable)

        with use_rules(rules):
            draws = stage.draw(batch, jax.random.fold_in(jax.random.key(settings.seed), state.step))
            (loss, own_metrics), grads = mean_gradient(
                gradient,
                trainable,
                param_axes,
                batch,
                draws,
                stage.batch_axes,
                settings.accumulate,
            )
        updates, opt_state = optimizer.update(grads, state.opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        ema = {}
        if state.ema:
            # A skipped step leaves the average unchanged, too.
            skips = opt_state.skipped_in_a_row > 0
            decay = jnp.where(skips, 1.0, ema_decay_at(state.step, settings.ema_decay))
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


def ema_decay_at(step: jax.Array, decay: float) -> jax.Array:
    """Decay used at a step: (1 + step) / (10 + step), up to `decay`.

    Without the warm-up the average of a short run would be mostly its random start.
    """
    n = step.astype(jnp.float32)
    return jnp.minimum(decay, (1 + n) / (10 + n))


def compile_step(
    step: Step, state: TrainState, frozen: Params, batch: Batch
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """Compiles `step` for the given (abstract or real) arguments, keeping the state's shardings.

    The state's buffers are donated: the argument passed to a call must not be used again.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (state, frozen, batch))
    whole = NamedSharding(state.step.sharding.mesh, PartitionSpec())
    compiled = jax.jit(
        step, in_shardings=shardings, out_shardings=(shardings[0], whole), donate_argnums=0
    )
    return compiled.lower(state, frozen, batch).compile(compiler_options=compiler_options())


# --- Micro-batches, for a batch too large for the devices: one after the other in the step ---


def mean_gradient(
    gradient: Callable[[Params, Batch, Batch], Gradient],
    trainable: Params,
    param_axes: Params,
    batch: Batch,
    draws: Batch,
    batch_axes: Mapping[str, Axes],
    count: int,
) -> Gradient:
    """Loss, metrics and gradient of a batch, as the mean over `count` micro-batches.

    Sums are float32. Call it inside `use_rules`.

    Args:
        gradient: (trainable, batch, draws) -> ((loss, metrics), gradient), means over the samples.
        trainable: The parameters that learn.
        param_axes: Their logical axes: sums of gradients are split like them.
        batch, draws: As in `Stage`, of all samples.
        batch_axes: Logical axes of the batch's entries.
        count: 1 for the whole batch at once.
    """
    if count == 1:
        return gradient(trainable, batch, draws)
    draw_axes = {name: ("batch", *[None] * (x.ndim - 1)) for name, x in draws.items()}
    parts = (_split(batch, batch_axes, count), _split(draws, draw_axes, count))

    def placed(tree: Params) -> Params:
        return jax.tree.map(lambda leaf, names: constrain(leaf, *names), tree, param_axes)

    def add(sums: Any, part: tuple[Batch, Batch]) -> tuple[Any, dict[str, jax.Array]]:
        (loss, metrics), grads = gradient(trainable, *part)
        sums = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), sums, (loss, grads))
        return (sums[0], placed(sums[1])), metrics

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), trainable)
    sums, metrics = jax.lax.scan(add, (jnp.zeros(()), placed(zeros)), parts)
    loss, grads = jax.tree.map(lambda total: total / count, sums)
    # Sums and counts by noise level add up; everything else is a mean over the samples.
    merged = {
        name: jax.tree.map(lambda x, name=name: x.sum(0) if name == "by_level" else x.mean(0), m)
        for name, m in metrics.items()
    }
    return (loss, merged), grads


def _split(arrays: Batch, axes: Mapping[str, Axes], count: int) -> Batch:
    """[b, ...] -> [count, b / count, ...]."""
    # Micro-batch j of m takes the samples j, j + m, j + 2m, ... Every device holds consecutive
    # samples, so each splits its own and no sample moves between devices; and which samples go
    # together does not depend on the mesh.
    return {
        name: constrain(jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), None, *axes[name])
        for name, x in arrays.items()
    }


# --- The state of step 0 ---


def fresh_state(
    params: Params, stage: Stage, optimizer: optax.GradientTransformation, ema: bool
) -> TrainState:
    """The state of step 0 around given parameters."""
    trainable, _ = split(params, stage.trainable)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(trainable),
        # A copy: params and ema are both donated to the step, so they must not share buffers.
        ema=jax.tree.map(jnp.copy, trainable) if ema else {},
    )


def abstract_state(
    stage: Stage, optimizer: optax.GradientTransformation, ema: bool, mesh: Mesh, rules: Rules
) -> TrainState:
    """Shapes, dtypes and shardings of the state; nothing is allocated.

    Moments and moving averages are split like the parameters they belong to; counts are replicated.

    Raises:
        ValueError: If `stage.axes` does not fit the parameters or the mesh, naming the parameter.
    """
    shapes = jax.eval_shape(
        lambda key: fresh_state(stage.init(key), stage, optimizer, ema), jax.random.key(0)
    )
    params = sharding_tree(stage.axes, mesh, rules, shapes.params)
    trainable, _ = split(params, stage.trainable)
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = TrainState(
        step=whole,
        params=params,
        opt_state=optax.tree.map_params(
            optimizer,
            lambda _, sharding: sharding,
            shapes.opt_state,
            trainable,
            transform_non_params=lambda _: whole,
        ),
        ema=trainable if ema else {},
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def create_state(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    seed: int,
    params: Params | None = None,
) -> TrainState:
    """Makes the state of step 0 on the devices, each creating only its own part.

    Args:
        stage, optimizer: Of the run.
        abstract: Of `abstract_state`; decides every sharding.
        seed: Of the initial parameters.
        params: Already placed parameters that replace those of `stage.init`; donated.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def make(given: Params, key: jax.Array) -> TrainState:
        everything = merge(stage.init(key), given)  # the compiler drops what `given` replaces
        return fresh_state(everything, stage, optimizer, bool(abstract.ema))

    # Step n uses fold_in(key(seed), n); this is a step no run reaches.
    key = jax.random.fold_in(jax.random.key(seed), 2**32 - 1)
    return jax.jit(make, out_shardings=shardings, donate_argnums=0)(params or {}, key)


# --- AdamW with the release's learning-rate schedules, skipping non-finite gradients ---

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
            mu_dtype ("bfloat16" halves the memory of the first moment; "" keeps it float32), and in
            joint training backbone_rate, a factor of the learning rate of the backbone.
    """
    # A place of its own also where nothing is clipped: the state must not depend on settings.
    norm = config.clip_norm
    clip = optax.clip_by_global_norm(norm) if norm else optax.identity()
    return _skip_nonfinite(
        optax.chain(
            clip,
            optax.scale_by_adam(
                b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=config.mu_dtype or None
            ),
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(make_schedule(config)),
            *([_scaled_backbone(config.backbone_rate)] if "backbone_rate" in config else []),
        )
    )


def _scaled_backbone(rate: float) -> optax.GradientTransformation:
    """Multiplies the updates of a joint run's backbone."""

    def scale(updates: Params, params: Params) -> Params:
        del params
        return updates | {BACKBONE: jax.tree.map(lambda u: rate * u, updates[BACKBONE])}

    return optax.stateless(scale)


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


# --- The step with every argument as a shape, for estimates and benchmarks ---


@dataclass(frozen=True)
class Program:
    """A train step and its arguments as shapes with shardings.

    Attributes:
        mesh: The devices; abstract (`abstract_mesh`) where only shapes are wanted.
        stage, optimizer: What is trained, and how.
        step: Not compiled.
        state, batch: Its arguments, beside `stage.frozen`.
    """

    mesh: Mesh | AbstractMesh
    stage: Stage
    optimizer: optax.GradientTransformation
    step: Step
    state: TrainState
    batch: Batch

    @property
    def argument_bytes(self) -> int:
        """Of state, frozen network and batch, per device, without the compiler's padding."""
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves((self.state, self.stage.frozen, self.batch))
        )

    def compile(self) -> Callable[..., Any]:
        """The compiled step (state, frozen, batch) -> (state, metrics)."""
        with jax.set_mesh(self.mesh):
            return compile_step(self.step, self.state, self.stage.frozen, self.batch)


def make_program(
    experiment: Experiment, mesh: Mesh | AbstractMesh, backbone_of: Backbone = load_backbone
) -> Program:
    """The step that `train` would run on this mesh, not compiled yet.

    Args:
        experiment: A training run; no data is read.
        mesh: Of `make_mesh`, whose devices may be those of a pod that is not here, or of
            `abstract_mesh`, which has none: nothing can be compiled for it.
        backbone_of: `abstract_backbone` where only the shapes of the frozen network are needed.

    Raises:
        ValueError: If batch, mesh, network and devices do not go together.
    """
    stage = make_stage(experiment, mesh, backbone_of)
    optimizer, state, step = assemble(experiment, stage, mesh)
    samples, shapes = experiment.config.training.batch_size, experiment.batch_shapes
    batch = {
        name: jax.ShapeDtypeStruct((samples, *shapes[name]), "float32", sharding=sharding)
        for name, sharding in sharding_tree(stage.batch_axes, mesh, experiment.rules).items()
    }
    return Program(mesh, stage, optimizer, step, state, batch)
