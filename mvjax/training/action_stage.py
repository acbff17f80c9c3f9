"""Stage 2: the action decoder learns to read the frozen video DiT's hidden states."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mvjax.checkpoints.backbone import Backbone, load_backbone
from mvjax.clip import Clip
from mvjax.flow.action import action_loss
from mvjax.flow.noise_levels import sample_action_time, sample_video_sigma
from mvjax.flow.video import condition_mask, network_input
from mvjax.models.build import action_decoder_config, decoder_network, video_network
from mvjax.models.param_tree import Params
from mvjax.parallel.rules import Rules
from mvjax.training.flops import step_flops
from mvjax.training.levels import error_by_level
from mvjax.training.stage import Batch, Loss, Stage


def action_stage(
    config: Any, mesh: Mesh, rules: Rules, backbone_of: Backbone = load_backbone
) -> Stage:
    """The published objective: action velocity loss, video noise and action noise independent.

    One backbone pass serves `flow.action_draws` draws of action noise and time (1 is the published
    recipe); the loss is their mean. A share `flow.sampling_sigma_share` of the samples takes the
    noise level at which the policy runs (σ_max) instead of a drawn one (published: 0).

    `action_mask` says which numbers of a chunk are learned. The loss is the mean over the samples
    of the mean over their learned numbers, so that it is linear in the samples: one without actions
    counts as zero.

    Args:
        config: as for `video_stage`, and `backbone {checkpoint, precision}`, `context_layer`,
            `decoder`, `policy_io`, `sampler {sigma_max}`, `flow {action_time_alpha,
            action_time_beta, action_draws, proprio_dropout, sampling_sigma_share}`.
        mesh: where the frozen backbone is placed.
        rules: how it is sharded.
        backbone_of: gives the backbone; `abstract_backbone` where only its shapes are needed.
    """
    clip, flow, layer = Clip(**config.clip), config.flow, config.context_layer
    decoder = decoder_network(action_decoder_config(config))
    draws = flow.action_draws
    if draws < 1:
        raise ValueError(f"flow.action_draws must be at least 1, got {draws}.")
    model, frozen = backbone_of(config, mesh, rules)
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
        return {
            "sigma": jnp.where(at_sampling, config.sampler.sigma_max, sigma),
            "video_noise": jax.random.normal(video_noise_key, batch["latents"].shape),
            "time": time.reshape(samples, draws, 1),
            "noise": noise.reshape(samples, draws, horizon, dim),
            "drop": jax.random.bernoulli(drop_key, flow.proprio_dropout, (samples, draws)),
        }

    def context(frozen: Params, batch: Batch, random: Batch) -> jax.Array:
        x0, sigma = batch["latents"], random["sigma"]
        noisy = x0 + sigma[..., None, None, None] * random["video_noise"]
        mask = condition_mask(jnp.full(len(x0), clip.condition_latents), clip.latent_frames)
        i = network_input(noisy, x0, sigma, mask)
        net = backbone.bind(frozen)
        return net.hidden(i.latents, i.timesteps, batch["text"], i.condition_mask, layer=layer)

    def objective(params: Params, frozen: Params, batch: Batch, random: Batch) -> Loss:
        hidden = context(frozen, batch, random)
        time, noise, drop = (
            random[name].reshape(-1, *random[name].shape[2:]) for name in ("time", "noise", "drop")
        )
        actions, mask, proprio, sigma = (
            jnp.repeat(x, draws, axis=0)
            for x in (batch["actions"], batch["action_mask"], batch["proprio"], random["sigma"])
        )
        net = decoder.bind(params)

        def velocity(noisy, time):
            return net(proprio, noisy, time, sigma, hidden, drop)

        error = action_loss(velocity, actions, noise, time, mask)
        mse = jnp.mean(error)
        # A sample without actions is in no level.
        level = jnp.where(mask.any(axis=(1, 2)), time[:, 0], jnp.nan)
        levels = error_by_level(error, level)
        return flow.loss_scale * mse, {"velocity_mse": mse, "by_level": levels}

    return Stage(
        name="action",
        init=decoder.init,
        axes=decoder.axes,
        trainable=lambda path: True,
        draw=draw,
        objective=objective,
        batch_axes={
            "latents": ("batch", None, None, None, None),
            "text": ("batch", None, None),
            "actions": ("batch", None, None),
            "action_mask": ("batch", None, None),
            "proprio": ("batch", None, None),
        },
        frozen=frozen,
        tokens=clip.tokens,
        flops=step_flops(config),
    )
