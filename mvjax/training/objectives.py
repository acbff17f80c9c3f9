"""What the stages learn: networks with their losses, as data for the training loop.

Stage 1, `video_stage`: the video DiT learns to predict video, from language and one or two observed
latents. Stage 2, `action_stage`: the action decoder learns to read the frozen DiT's hidden states.
`joint_stage`: both learn together, each with its own loss, from one pass of the DiT.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from data_pipelines.records import entry
from mvjax.experiment import Experiment
from mvjax.flow import (
    CONDITION_SIGMA,
    action_loss,
    condition_mask,
    denoise,
    flow_time,
    network_input,
    observed_input,
    sample_action_time,
    sample_video_sigma,
    video_loss,
)
from mvjax.models.action_decoder import ActionDecoder
from mvjax.models.flops import step_flops
from mvjax.models.lora import learning
from mvjax.models.network import Params
from mvjax.models.presets import video_network
from mvjax.training.bridge import Backbone, load_backbone
from mvjax.training.directory import BACKBONE, DECODER
from mvjax.training.memory import chosen_remat

Batch = dict[str, jax.Array]
Loss = tuple[jax.Array, dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """A model with its loss, as data for `mvjax.training.train.train`.

    Random numbers are drawn for the whole batch and then go with their samples, so that the loss
    does not depend on how a batch is split: over devices, or into micro-batches.

    Attributes:
        name: "video", "action" or "joint".
        init: PRNG key -> parameter tree (a plain nested dict); pure and jit-able.
        axes: The same structure; each leaf is a tuple of logical axis names.
        trainable: Path of a leaf -> whether it learns.
        draw: (batch, key) -> the random numbers of the batch (noise, times, choices), a dict of
            arrays that all lead with the samples.
        objective: (params, frozen, batch, output of `draw`) -> (scalar float32 loss, metrics), the
            mean over the samples. Metrics are scalars, means over the samples too, and, under the
            name "by_level", sums of `error_by_level`, or of several losses a dict of them.
        batch_axes: Logical axes of each batch entry, "batch" first; other entries are not sent to
            the devices.
        frozen: The sharded frozen backbone in stage 2; {} in the others.
        tokens: Tokens of a sample in the video DiT, with those of views; 0 where there are none.
        flops: Floating-point operations of a step per sample; 0 where not known.
        parts: Where the parameters are those of several networks, the names of these in the tree.
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
    parts: tuple[str, ...] = ()

    def loss(self, params: Params, frozen: Params, batch: Batch, key: jax.Array) -> Loss:
        """The objective with the random numbers of a key."""
        return self.objective(params, frozen, batch, self.draw(batch, key))


def make_stage(experiment: Experiment, mesh: Mesh, backbone_of: Backbone = load_backbone) -> Stage:
    """The stage of an experiment.

    Args:
        experiment: Of any stage.
        mesh: What a video DiT that learns is given its rematerialisation for, where that is "auto";
            where stage 2 places its backbone.
        backbone_of: Loads the backbone of stage 2.
    """
    if not experiment.learns_video:
        return action_stage(experiment, mesh, backbone_of)
    if experiment.video.remat == "auto" and mesh is not None:
        experiment = experiment.changed({"video_model.remat": chosen_remat(experiment, mesh)})
    return joint_stage(experiment) if experiment.learns_actions else video_stage(experiment)


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
        velocity = partial(network.bind(params).velocity, text=text)
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
        trainable=learning(experiment.video.lora),
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

    Where `config.context_frames` is "observed", the video DiT is given the observed frames alone,
    and there is no noise of the video: the decoder learns at the level of what is observed.

    One backbone pass serves `flow.action_draws` draws of action noise and time (1 is the published
    recipe); the loss is their mean. A share `flow.sampling_sigma_share` of the samples takes the
    noise level at which the policy runs (σ_max) instead of a drawn one (published: 0).

    With `flow.prefix` = n, the first actions are given, uniformly 1 to n of them, in a share
    `flow.prefix_share` of the draws: so a policy learns to continue what the robot is executing
    (published: 0; see `flow.action_loss`).

    `action_mask` marks the numbers of a chunk that are learned. The loss is the mean over the
    samples of the mean over their learned numbers, so that it is linear in the samples: one
    without actions counts as zero.

    The frozen backbone of `backbone_of` is placed on `mesh`; `abstract_backbone` gives only shapes.
    """
    config, clip, decoder = experiment.config, experiment.clip, experiment.decoder_network
    flow, layer = config.flow, config.context_layer
    model, frozen = backbone_of(experiment, mesh)
    backbone = video_network(model)

    observed_only = experiment.context_frames == "observed"

    def objective(params: Params, frozen: Params, batch: Batch, random: Batch) -> Loss:
        x0, views = batch["latents"], batch_views(experiment, batch)
        if observed_only:
            sigma = jnp.full((len(x0), 1), CONDITION_SIGMA)
            i = observed_input(x0[:, : clip.condition_latents], views)
        else:
            sigma = random["sigma"]
            noisy = x0 + sigma[..., None, None, None] * random["video_noise"]
            mask = condition_mask(jnp.full(len(x0), clip.condition_latents), clip.latent_frames)
            i = network_input(noisy, x0, sigma, mask, views)
        context = backbone.bind(frozen).hidden(
            i.latents, i.timesteps, batch["text"], i.condition_mask, views=i.views, layer=layer
        )
        mse, levels = _action_error(decoder.bind(params), context, sigma, batch, random)
        return flow.loss_scale * mse, {"velocity_mse": mse, "by_level": levels}

    return Stage(
        name="action",
        init=decoder.init,
        axes=decoder.axes,
        trainable=lambda path: True,
        draw=partial(_action_draws, experiment, of_video=not observed_only),
        objective=objective,
        batch_axes=_batch_axes(experiment),
        frozen=frozen,
        tokens=experiment.tokens,
        flops=step_flops(experiment),
    )


def joint_stage(experiment: Experiment) -> Stage:
    """Both objectives on the same batch, from one pass of the video DiT.

    The noisy video at its drawn σ gives the velocity, whose loss is that of stage 1, and after
    block `context_layer` the context, which the decoder reads as in stage 2. What is drawn is drawn
    as in stage 2. All observed latents are clean in every sample, as at run time: the decoder must
    read here what it will read there, so `flow.min_condition_latents` has no place.

    The loss is `flow.video_weight` times the velocity error of the video plus `flow.action_weight`
    times that of the actions. With `flow.action_gradient` the latter reaches the backbone too;
    without, its gradient stops at the context: each network then learns as in its own stage.

    A sample without actions counts as zero in the mean of the action loss, as in stage 2, so that
    the loss is linear in the samples however a batch is split. The metric "action/share" says which
    share had actions: the mean over those is "action/velocity_mse" divided by it.

    Where `config.context_frames` is "observed", the decoder reads the observed frames and the views
    alone, at the noise level of what is observed. The video DiT must have attention
    "observed_first": then their states are those that the policy computes without the future.
    """
    config, clip = experiment.config, experiment.clip
    flow, layer = config.flow, config.context_layer
    networks = {BACKBONE: experiment.video_network, DECODER: experiment.decoder_network}
    observed_only = experiment.context_frames == "observed"
    of_backbone = learning(experiment.video.lora)

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key)
        return {name: networks[name].init(k) for name, k in zip(networks, keys)}

    def objective(params: Params, frozen: Params, batch: Batch, random: Batch) -> Loss:
        del frozen
        x0, sigma, views = batch["latents"], random["sigma"], batch_views(experiment, batch)
        noisy = x0 + sigma[..., None, None, None] * random["video_noise"]
        mask = condition_mask(jnp.full(len(x0), clip.condition_latents), clip.latent_frames)
        i = network_input(noisy, x0, sigma, mask, views)
        net = networks[BACKBONE].bind(params[BACKBONE])
        velocity, hidden = net.velocity_and_hidden(
            i, batch["text"], layer=layer, observed_only=observed_only
        )
        prediction = denoise(lambda _: velocity, noisy, x0, sigma, mask, views)
        error = video_loss(x0, prediction, sigma)
        video = jnp.mean(error)
        video_levels = error_by_level(error, flow_time(sigma[:, 0]))

        context = hidden if flow.action_gradient else jax.lax.stop_gradient(hidden)
        level = jnp.full_like(sigma, CONDITION_SIGMA) if observed_only else sigma
        decoder = networks[DECODER].bind(params[DECODER])
        action, action_levels = _action_error(decoder, context, level, batch, random)
        return flow.video_weight * video + flow.action_weight * action, {
            "video/velocity_mse": video,
            "action/velocity_mse": action,
            "action/share": jnp.mean(_has_actions(batch["action_mask"]).astype(jnp.float32)),
            "by_level": {"video": video_levels, "action": action_levels},
        }

    return Stage(
        name="joint",
        init=init,
        axes={name: network.axes for name, network in networks.items()},
        trainable=lambda path: path[0] == DECODER or of_backbone(path[1:]),
        draw=partial(_action_draws, experiment),
        objective=objective,
        batch_axes=_batch_axes(experiment),
        frozen={},
        tokens=experiment.tokens,
        flops=step_flops(experiment),
        parts=tuple(networks),
    )


def _action_draws(
    experiment: Experiment, batch: Batch, key: jax.Array, *, of_video: bool = True
) -> Batch:
    """The random numbers of stage 2, without those of the video where it has no noise."""
    config, flow = experiment.config, experiment.config.flow
    video_key, time_key, noise_key, drop_key = jax.random.split(key, 4)
    samples, (horizon, dim) = len(batch["latents"]), batch["actions"].shape[1:]
    draws, drawn = flow.action_draws, {}
    time = sample_action_time(
        time_key, samples * draws, alpha=flow.action_time_alpha, beta=flow.action_time_beta
    )
    noise = jax.random.normal(noise_key, (samples * draws, horizon, dim))
    if of_video:
        sigma_key, share_key, video_noise_key = jax.random.split(video_key, 3)
        sigma = sample_video_sigma(sigma_key, samples, scale=flow.sigma_scale, tail=flow.sigma_tail)
        at_sampling = jax.random.bernoulli(share_key, flow.sampling_sigma_share, (samples, 1))
        drawn["sigma"] = jnp.where(at_sampling, config.sampler.sigma_max, sigma)
        drawn["video_noise"] = jax.random.normal(video_noise_key, batch["latents"].shape)
    if longest := flow.get("prefix", 0):  # earlier versions have none
        # Keys of their own: the other random numbers are those without a prefix.
        count_key, given_key = jax.random.split(jax.random.fold_in(key, 4))
        count = jax.random.randint(count_key, (samples, draws), 1, longest + 1)
        given = jax.random.bernoulli(given_key, flow.prefix_share, (samples, draws))
        drawn["prefix"] = jnp.where(given, count, 0)
    return {
        **drawn,
        "time": time.reshape(samples, draws, 1),
        "noise": noise.reshape(samples, draws, horizon, dim),
        "drop": jax.random.bernoulli(drop_key, flow.proprio_dropout, (samples, draws)),
    }


def _action_error(
    net: ActionDecoder, context: jax.Array, sigma: jax.Array, batch: Batch, random: Batch
) -> tuple[jax.Array, jax.Array]:
    """The mean error of the actions' velocity, and its `error_by_level` by the actions' time."""
    draws = random["time"].shape[1]
    time, noise, drop, prefix = (
        random[name].reshape(-1, *random[name].shape[2:]) if name in random else None
        for name in ("time", "noise", "drop", "prefix")
    )
    # The context is not repeated: the decoder shares it among the draws of a sample.
    actions, action_mask, proprio, sigma = (
        jnp.repeat(x, draws, axis=0)
        for x in (batch["actions"], batch["action_mask"], batch["proprio"], sigma)
    )

    def velocity(noisy, time):
        return net(proprio, noisy, time, sigma, context, drop)

    error = action_loss(velocity, actions, noise, time, action_mask, prefix)
    mse, learned = jnp.mean(error), action_mask
    if prefix is not None:
        later = jnp.arange(actions.shape[1]) >= prefix[:, None]
        learned = action_mask * later[..., None]
    # A sample without actions, or with given ones alone, belongs to no level.
    level = jnp.where(_has_actions(learned), time[:, 0], jnp.nan)
    return mse, error_by_level(error, level)


def _has_actions(action_mask: jax.Array) -> jax.Array:
    return action_mask.any(axis=(1, 2))


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


def named_levels(steps: Sequence[Any]) -> dict[str, float]:
    """Mean error and number of samples of each bin over several steps; no mean for an empty bin.

    Args:
        steps: `error_by_level` of each, [2, BINS]; or of several losses by their names, which then
            stand before those of the numbers.
    """
    if not steps:
        return {}
    if isinstance(steps[0], Mapping):
        return {
            f"{loss}/{name}": number
            for loss in steps[0]
            for name, number in named_levels([step[loss] for step in steps]).items()
        }
    sums, counts = np.sum(steps, axis=0, dtype=np.float64)
    named: dict[str, float] = {}
    for number, (total, count) in enumerate(zip(sums, counts)):
        name = f"tau_{number / BINS:.1f}_{(number + 1) / BINS:.1f}"
        named[f"samples/{name}"] = float(count)
        if count:
            named[f"velocity_mse/{name}"] = float(total / count)
    return named
