"""Stage 1: the video DiT learns to predict video, from language and one or two observed latents."""

from typing import Any

import jax
import jax.numpy as jnp

from mvjax.clip import Clip
from mvjax.flow.noise_levels import sample_video_sigma
from mvjax.flow.video import condition_mask, denoise, video_loss
from mvjax.models.build import video_dit_config, video_network
from mvjax.models.lora import learns_with_lora
from mvjax.models.param_tree import Params
from mvjax.training.stage import Batch, Stage


def video_stage(config: Any) -> Stage:
    """The published objective: velocity loss at σ drawn per sample, with frame replacement.

    Args:
        config: `clip`, `video_model`, `text`, `lora`, and `flow {sigma_scale, sigma_tail,
            loss_scale, min_condition_latents}`.
    """
    clip, flow = Clip(**config.clip), config.flow
    model = video_dit_config(config)
    network = video_network(model)
    if not 1 <= flow.min_condition_latents <= clip.condition_latents:
        raise ValueError(
            f"flow.min_condition_latents is {flow.min_condition_latents}; with "
            f"{clip.observed_frames} observed frames it must be between 1 and "
            f"{clip.condition_latents}."
        )

    def loss(params: Params, frozen: Params, batch: Batch, key: jax.Array):
        del frozen
        sigma_key, noise_key, condition_key = jax.random.split(key, 3)
        x0, text = batch["latents"], batch["text"]
        samples = len(x0)
        sigma = sample_video_sigma(sigma_key, samples, scale=flow.sigma_scale, tail=flow.sigma_tail)
        observed = jax.random.randint(
            condition_key, (samples,), flow.min_condition_latents, clip.condition_latents + 1
        )
        mask = condition_mask(observed, clip.latent_frames)
        noisy = x0 + sigma[..., None, None, None] * jax.random.normal(noise_key, x0.shape)
        net = network.bind(params)
        prediction = denoise(
            lambda i: net(i.latents, i.timesteps, text, i.condition_mask), noisy, x0, sigma, mask
        )
        mse = jnp.mean(video_loss(x0, prediction, sigma))
        return flow.loss_scale * mse, {"velocity_mse": mse}

    return Stage(
        name="video",
        init=network.init,
        axes=network.axes,
        trainable=learns_with_lora if model.lora else lambda path: True,
        loss=loss,
        batch_axes={"latents": ("batch", None, None, None, None), "text": ("batch", None, None)},
        frozen={},
    )
