"""Stage 2: the action decoder learns to read the frozen video DiT's hidden states."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mvjax.checkpoints.backbone import load_backbone
from mvjax.clip import Clip
from mvjax.flow.action import action_loss
from mvjax.flow.noise_levels import sample_action_time, sample_video_sigma
from mvjax.flow.video import condition_mask, network_input
from mvjax.models.build import action_decoder_config, decoder_network, video_network
from mvjax.models.param_tree import Params
from mvjax.parallel.rules import Rules
from mvjax.training.stage import Batch, Stage


def action_stage(config: Any, mesh: Mesh, rules: Rules) -> Stage:
    """The published objective: action velocity loss, video noise and action noise independent.

    One backbone pass serves `flow.action_draws` draws of action noise and time (1 is the published
    recipe); the loss is their mean. A share `flow.sampling_sigma_share` of the samples takes the
    noise level at which the policy runs (σ_max) instead of a drawn one (published: 0).

    Args:
        config: as for `video_stage`, and `backbone {checkpoint, precision}`, `context_layer`,
            `decoder`, `policy_io`, `sampler {sigma_max}`, `flow {action_time_alpha,
            action_time_beta, action_draws, proprio_dropout, sampling_sigma_share}`.
        mesh: where the frozen backbone is placed.
        rules: how it is sharded.
    """
    clip, flow, layer = Clip(**config.clip), config.flow, config.context_layer
    decoder = decoder_network(action_decoder_config(config))
    draws = flow.action_draws
    if draws < 1:
        raise ValueError(f"flow.action_draws must be at least 1, got {draws}.")
    model, frozen = load_backbone(config, mesh, rules)
    backbone = video_network(model)

    def context(frozen: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        sigma_key, share_key, noise_key = jax.random.split(key, 3)
        x0 = batch["latents"]
        samples = len(x0)
        sigma = sample_video_sigma(sigma_key, samples, scale=flow.sigma_scale, tail=flow.sigma_tail)
        at_sampling = jax.random.bernoulli(share_key, flow.sampling_sigma_share, (samples, 1))
        sigma = jnp.where(at_sampling, config.sampler.sigma_max, sigma)
        noisy = x0 + sigma[..., None, None, None] * jax.random.normal(noise_key, x0.shape)
        mask = condition_mask(jnp.full(samples, clip.condition_latents), clip.latent_frames)
        i = network_input(noisy, x0, sigma, mask)
        net = backbone.bind(frozen)
        hidden = net.hidden(i.latents, i.timesteps, batch["text"], i.condition_mask, layer=layer)
        return hidden, sigma

    def loss(params: Params, frozen: Params, batch: Batch, key: jax.Array):
        video_key, time_key, noise_key, drop_key = jax.random.split(key, 4)
        hidden, sigma = context(frozen, batch, video_key)

        def per_draw(x):
            return jnp.repeat(x, draws, axis=0)

        actions, proprio, sigma = (per_draw(x) for x in (batch["actions"], batch["proprio"], sigma))
        time = sample_action_time(
            time_key, len(actions), alpha=flow.action_time_alpha, beta=flow.action_time_beta
        )
        noise = jax.random.normal(noise_key, actions.shape)
        drop = jax.random.bernoulli(drop_key, flow.proprio_dropout, (len(actions),))
        net = decoder.bind(params)
        context_kv = net.context_keys_values(hidden)

        def velocity(noisy, time):
            return net(proprio, noisy, time, sigma, context_kv, drop)

        mse = jnp.mean(action_loss(velocity, actions, noise, time))
        return flow.loss_scale * mse, {"velocity_mse": mse}

    return Stage(
        name="action",
        init=decoder.init,
        axes=decoder.axes,
        trainable=lambda path: True,
        loss=loss,
        batch_axes={
            "latents": ("batch", None, None, None, None),
            "text": ("batch", None, None),
            "actions": ("batch", None, None),
            "proprio": ("batch", None, None),
        },
        frozen=frozen,
    )
