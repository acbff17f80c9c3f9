"""What the two stages learn: a network with its loss, as data for the training loop.

Stage 1, `video_stage`: the video DiT learns to predict video, from language and one or two observed
latents. Stage 2, `action_stage`: the action decoder learns to read the frozen DiT's hidden states.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from data_pipelines.records import entry
from mvjax.experiment import Experiment
from mvjax.flow import (
    action_loss,
    condition_mask,
    denoise,
    flow_time,
    network_input,
    sample_action_time,
    sample_video_sigma,
    video_loss,
)
from mvjax.models.flops import step_flops
from mvjax.models.lora import learns_with_lora
from mvjax.models.network import Params
from mvjax.models.presets import video_network
from mvjax.training.bridge import Backbone, load_backbone
from mvjax.training.memory import chosen_remat

Batch = dict[str, jax.Array]
Loss = tuple[jax.Array, dict[str, jax.Array]]


@dataclass(frozen=True)
class Stage:
    """A model with its loss, as data for `mvjax.training.train.train`.

    Random numbers are drawn for the whole batch and then go with their samples, so that the loss
    does not depend on how a batch is split: over devices, or into micro-batches.

    Attributes:
        name: "video" or "action".
        init: PRNG key -> parameter tree (a plain nested dict); pure and jit-able.
        axes: The same structure; each leaf is a tuple of logical axis names.
        trainable: Path of a leaf -> whether it learns.
        draw: (batch, key) -> the random numbers of the batch (noise, times, choices), a dict of
            arrays that all lead with the samples.
        objective: (params, frozen, batch, output of `draw`) -> (scalar float32 loss, metrics), the
            mean over the samples. Metrics are scalars, means over the samples too, and, under the
            name "by_level", sums of `error_by_level`.
        batch_axes: Logical axes of each batch entry, "batch" first; other entries are not sent to
            the devices.
        frozen: {} in stage 1; the sharded frozen backbone in stage 2.
        tokens: Tokens of a sample in the video DiT, with those of views; 0 where there are none.
        flops: Floating-point operations of a step per sample; 0 where not known.
    """

    name: str
    init: Callable[[jax.Array], Params]
    axes: Params
    trainable: Callable[[tuple[str, ...]], bool]
    draw: Callable[[Batch, jax.Array], Batch]
    objective: Callable[[Params, Params, Batch, Batch], Loss]
    batch_axes: dict[str, tuple[str | None, ...]]
    frozen: Params
    tokens: int = 0
    flops: float = 0.0

    def loss(self, params: Params, frozen: Params, batch: Batch, key: jax.Array) -> Loss:
        """The objective with the random numbers of a key."""
        return self.objective(params, frozen, batch, self.draw(batch, key))


def make_stage(experiment: Experiment, mesh: Mesh, backbone_of: Backbone = load_backbone) -> Stage:
    """The stage of an experiment.

    Args:
        experiment: Of either stage.
        mesh: What stage 1 chooses its rematerialisation for, where that is "auto"; where stage 2
            places its backbone.
        backbone_of: Loads the backbone of stage 2.
    """
    if experiment.stage == "video":
        if experiment.video.remat == "auto" and mesh is not None:
            experiment = experiment.changed({"video_model.remat": chosen_remat(experiment, mesh)})
        return video_stage(experiment)
    return action_stage(experiment, mesh, backbone_of)


def video_stage(experiment: Experiment) -> Stage:
    """The published objective: velocity loss at σ drawn per sample, with frame replacement."""
    clip, flow, network = experiment.clip, experiment.config.flow, experiment.video_network

    def draw(batch: Batch, key: jax.Array) -> Batch:
        sigma_key, noise_key, condition_key = jax.random.split(key, 3)
        x0 = batch["latents"]
        samples = len(x0)
        sigma = sample_video_sigma(sigma_key, samples, scale=flow.sigma_scale, tail=flow.sigma_tail)
        # One observed latent in some samples, two in others: the model must handle both.
        observed = jax.random.randint(
            condition_key, (samples,), flow.min_condition_latents, clip.condition_latents + 1
        )
        noise = jax.random.normal(noise_key, x0.shape)
        return {"sigma": sigma, "noise": noise, "observed": observed}

    def objective(params: Params, frozen: Params, batch: Batch, draws: Batch) -> Loss:
        del frozen
        x0, text, sigma = batch["latents"], batch["text"], draws["sigma"]
        mask = condition_mask(draws["observed"], clip.latent_frames)
        noisy = x0 + sigma[..., None, None, None] * draws["noise"]
        net = network.bind(params)
        velocity = lambda i: net(  # noqa: E731
            i.latents, i.timesteps, text, i.condition_mask, views=i.views
        )
        # Views enter whole, however little of the video is observed.
        prediction = denoise(velocity, noisy, x0, sigma, mask, batch_views(experiment, batch))
        error = video_loss(x0, prediction, sigma)
        mse = jnp.mean(error)
        levels = error_by_level(error, flow_time(sigma[:, 0]))
        return flow.loss_scale * mse, {"velocity_mse": mse, "by_level": levels}

    return Stage(
        name="video",
        init=network.init,
        axes=network.axes,
        trainable=learns_with_lora if experiment.video.lora else lambda path: True,
        draw=draw,
        objective=objective,
        batch_axes=_batch_axes(experiment),
        frozen={},
        tokens=experiment.tokens,
        flops=step_flops(experiment),
    )


def action_stage(
    experiment: Experiment, mesh: Mesh, backbone_of: Backbone = load_backbone
) -> Stage:
    """The published objective: action velocity loss, video noise and action noise independent.

    One backbone pass serves `flow.action_draws` draws of action noise and time (1 is the published
    recipe); the loss is their mean. A share `flow.sampling_sigma_share` of the samples takes the
    noise level at which the policy runs (σ_max) instead of a drawn one (published: 0).

    With `flow.prefix` = n, the first actions of each draw are given, uniformly 0 to n of them: so a
    policy learns to continue what the robot is executing (published: 0; see `flow.action_loss`).

    `action_mask` marks the numbers of a chunk that are learned. The loss is the mean over the
    samples of the mean over their learned numbers, so that it is linear in the samples: one
    without actions counts as zero.

    The frozen backbone of `backbone_of` is placed on `mesh`; `abstract_backbone` gives only shapes.
    """
    config, clip, decoder = experiment.config, experiment.clip, experiment.decoder_network
    flow, layer, draws = config.flow, config.context_layer, config.flow.action_draws
    longest = flow.get("prefix", 0)  # earlier versions have none
    model, frozen = backbone_of(experiment, mesh)
    backbone = video_network(model)

    def draw(batch: Batch, key: jax.Array) -> Batch:
        video_key, time_key, noise_key, drop_key = jax.random.split(key, 4)
        sigma_key, share_key, video_noise_key = jax.random.split(video_key, 3)
        samples, (horizon, dim) = len(batch["latents"]), batch["actions"].shape[1:]
        sigma = sample_video_sigma(sigma_key, samples, scale=flow.sigma_scale, tail=flow.sigma_tail)
        at_sampling = jax.random.bernoulli(share_key, flow.sampling_sigma_share, (samples, 1))
        time = sample_action_time(
            time_key, samples * draws, alpha=flow.action_time_alpha, beta=flow.action_time_beta
        )
        noise = jax.random.normal(noise_key, (samples * draws, horizon, dim))
        given = {}
        if longest:  # a key of its own: the other random numbers are those without a prefix
            prefix_key = jax.random.fold_in(key, 4)
            given = {"prefix": jax.random.randint(prefix_key, (samples, draws), 0, longest + 1)}
        return given | {
            "sigma": jnp.where(at_sampling, config.sampler.sigma_max, sigma),
            "video_noise": jax.random.normal(video_noise_key, batch["latents"].shape),
            "time": time.reshape(samples, draws, 1),
            "noise": noise.reshape(samples, draws, horizon, dim),
            "drop": jax.random.bernoulli(drop_key, flow.proprio_dropout, (samples, draws)),
        }

    def objective(params: Params, frozen: Params, batch: Batch, random: Batch) -> Loss:
        x0, sigma = batch["latents"], random["sigma"]
        noisy = x0 + sigma[..., None, None, None] * random["video_noise"]
        mask = condition_mask(jnp.full(len(x0), clip.condition_latents), clip.latent_frames)
        i = network_input(noisy, x0, sigma, mask, batch_views(experiment, batch))
        context = backbone.bind(frozen).hidden(
            i.latents, i.timesteps, batch["text"], i.condition_mask, views=i.views, layer=layer
        )
        time, noise, drop, prefix = (
            random[name].reshape(-1, *random[name].shape[2:]) if name in random else None
            for name in ("time", "noise", "drop", "prefix")
        )
        # The context is not repeated: the decoder shares it among the draws of a sample.
        actions, action_mask, proprio, sigma = (
            jnp.repeat(x, draws, axis=0)
            for x in (batch["actions"], batch["action_mask"], batch["proprio"], sigma)
        )
        net = decoder.bind(params)

        def velocity(noisy, time):
            return net(proprio, noisy, time, sigma, context, drop)

        error = action_loss(velocity, actions, noise, time, action_mask, prefix)
        mse = jnp.mean(error)
        # A sample without actions, or with given ones alone, belongs to no level.
        learned = action_mask
        if prefix is not None:
            later = jnp.arange(actions.shape[1]) >= prefix[:, None]
            learned = action_mask * later[..., None]
        level = jnp.where(learned.any(axis=(1, 2)), time[:, 0], jnp.nan)
        levels = error_by_level(error, level)
        return flow.loss_scale * mse, {"velocity_mse": mse, "by_level": levels}

    return Stage(
        name="action",
        init=decoder.init,
        axes=decoder.axes,
        trainable=lambda path: True,
        draw=draw,
        objective=objective,
        batch_axes=_batch_axes(experiment),
        frozen=frozen,
        tokens=experiment.tokens,
        flops=step_flops(experiment),
    )


def batch_views(experiment: Experiment, batch: Batch) -> dict[str, jax.Array]:
    """The latents of the observed views of a batch, by their names."""
    return {name: batch[entry(name)] for name in experiment.clip.view_shapes}


def _batch_axes(experiment: Experiment) -> dict[str, tuple[str | None, ...]]:
    shapes = experiment.batch_shapes
    return {name: ("batch", *[None] * len(shape)) for name, shape in shapes.items()}


# --- The error by noise level: a single number hides that a model learns the noisy end first ---

BINS = 5  # equal bins of the flow time τ between 0 (clean) and 1 (pure noise)


def error_by_level(error: jax.Array, level: jax.Array) -> jax.Array:
    """Sums and counts of the errors in each bin of τ.

    A step sees few samples, so sums and counts are added over steps before they are divided.

    Args:
        error: [n].
        level: τ [n], between 0 and 1; NaN belongs to no bin.

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
        steps: `error_by_level` of each, [2, BINS].
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
