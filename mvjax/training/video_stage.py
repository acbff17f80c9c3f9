"""Stage 1: the video DiT learns to predict video, from language and one or two observed latents."""

from typing import Any

import jax
import jax.numpy as jnp

from mvjax.clip import Clip
from mvjax.flow.noise_levels import flow_time, sample_video_sigma
from mvjax.flow.video import condition_mask, denoise, video_loss
from mvjax.models.build import video_dit_config, video_network
from mvjax.models.lora import learns_with_lora
from mvjax.models.param_tree import Params
from mvjax.training.flops import step_flops
from mvjax.training.levels import error_by_level
from mvjax.training.stage import Batch, Loss, Stage


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

    def draw(batch: Batch, key: jax.Array) -> Batch:
        sigma_key, noise_key, condition_key = jax.random.split(key, 3)
        x0 = batch["latents"]
        samples = len(x0)
        return {
            "sigma": sample_video_sigma(
                sigma_key, samples, scale=flow.sigma_scale, tail=flow.sigma_tail
            ),
            "noise": jax.random.normal(noise_key, x0.shape),
            "observed": jax.random.randint(
                condition_key, (samples,), flow.min_condition_latents, clip.condition_latents + 1
            ),
        }

    def objective(params: Params, frozen: Params, batch: Batch, draws: Batch) -> Loss:
        del frozen
        x0, text, sigma = batch["latents"], batch["text"], draws["sigma"]
        mask = condition_mask(draws["observed"], clip.latent_frames)
        noisy = x0 + sigma[..., None, None, None] * draws["noise"]
        net = network.bind(params)
        prediction = denoise(
            lambda i: net(i.latents, i.timesteps, text, i.condition_mask), noisy, x0, sigma, mask
        )
        error = video_loss(x0, prediction, sigma)
        mse = jnp.mean(error)
        levels = error_by_level(error, flow_time(sigma[:, 0]))
        return flow.loss_scale * mse, {"velocity_mse": mse, "by_level": levels}

    return Stage(
        name="video",
        init=network.init,
        axes=network.axes,
        trainable=learns_with_lora if model.lora else lambda path: True,
        draw=draw,
        objective=objective,
        batch_axes={"latents": ("batch", None, None, None, None), "text": ("batch", None, None)},
        frozen={},
        tokens=clip.tokens,
        flops=step_flops(config),
    )
