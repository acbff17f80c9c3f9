"""What a query computes: frames and words in, an action chunk out, as pure functions.

    video ─ encode ─▶ latents ─ context ─▶ hidden states after block k ─ actions ─▶ chunks

`act` is all of it, one compiled program; the parts are there to be measured and compared.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mvjax.clip import Clip
from mvjax.flow.action import sample_actions
from mvjax.flow.noise_levels import karras_sigmas
from mvjax.flow.sampler import sample_video
from mvjax.flow.video import condition_mask, denoise, network_input
from mvjax.models.attention import KeysValues
from mvjax.models.param_tree import Params
from mvjax.models.parameters import Network
from mvjax.models.precision import rounded
from mvjax.policy.sampling import Sampling

Array = jax.Array
Weights = tuple[Any, Params, Params]  # video tokenizer, video DiT, action decoder


class Inputs(NamedTuple):
    """A batch of queries, on the devices.

    Attributes:
        video: uint8 [b, frames, h, w, 3], the observed frames, or all of the clip (oracle).
        text: embeddings float32 [b, l, d].
        proprio: normalised float32 [b, proprio_horizon, dim].
        video_noise: standard normal [b, latent_frames, h/8, w/8, 16].
        action_noise: standard normal [b, draws, horizon, dim].
    """

    video: Array
    text: Array
    proprio: Array
    video_noise: Array
    action_noise: Array


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: `self` is static under jit
class VideoActionModel:
    """The networks of a policy and how they are sampled.

    Attributes:
        clip: lengths of the video.
        layer: k, the block after which the decoder reads the video DiT.
        backbone, decoder: the video DiT and the action decoder.
        sampling: how a query is answered.
    """

    clip: Clip
    layer: int
    backbone: Network
    decoder: Network
    sampling: Sampling

    @cached_property
    def sigmas(self) -> np.ndarray:
        """Noise levels of the video, float64 [video_steps + 1]."""
        s = self.sampling
        return karras_sigmas(s.video_steps, sigma_max=s.sigma_max, sigma_min=s.sigma_min)

    def encode(self, tokenizer: Any, video: Array) -> Array:
        """Latents of the frames that are given; those that are not are zeros.

        Args:
            tokenizer: has `encode`.
            video: uint8 [b, frames, h, w, 3], the observed frames, or all of the clip (oracle).

        Returns:
            [b, latent_frames, h/8, w/8, 16].
        """
        latents = tokenizer.encode(video.astype(jnp.float32) / 127.5 - 1)
        latents = rounded(latents, self.backbone.config.precision)
        missing = self.clip.latent_frames - latents.shape[1]
        return jnp.pad(latents, ((0, 0), (0, missing), (0, 0), (0, 0), (0, 0)))

    def context(self, params: Params, clean: Array, text: Array, noise: Array) -> Array:
        """Hidden states after block k of the video at noise level σ_K, [b, tokens, width].

        Args:
            params: of the video DiT.
            clean: latents of `encode`; only the observed ones are read, or all (oracle).
            text: embeddings [b, l, d].
            noise: standard normal, as `clean`.
        """
        k = self.sampling.stop_step
        if self.sampling.oracle:
            x = clean + self.sigmas[k] * noise
        else:
            x = self._generate(params, clean, text, noise, k)
        return self.read(params, x, clean, self._sigma(len(clean)), text)

    def read(self, params: Params, x: Array, clean: Array, sigma: Array, text: Array) -> Array:
        """Hidden states after block k of noisy latents `x` at the noise level sigma [b, 1]."""
        i = network_input(x, clean, sigma, self._condition_mask(len(x)))
        net = self.backbone.bind(params)
        return net.hidden(i.latents, i.timesteps, text, i.condition_mask, layer=self.layer)

    def denoised(self, params: Params, x: Array, clean: Array, sigma: Array, text: Array) -> Array:
        """The clean latents that the video DiT predicts from `x` at the noise level [b, 1]."""
        net = self.backbone.bind(params)
        velocity = lambda i: net(i.latents, i.timesteps, text, i.condition_mask)  # noqa: E731
        return denoise(velocity, x, clean, sigma, self._condition_mask(len(x)))

    def actions(
        self, params: Params, context: Array, sigma: Array, proprio: Array, noise: Array
    ) -> Array:
        """Chunks, normalised, float32 [b, draws, horizon, dim].

        Keys and values of the context are computed once, for all draws and all Euler steps.

        Args:
            params: of the action decoder.
            context: of `context`.
            sigma: its noise level [b, 1].
            proprio: normalised [b, proprio_horizon, dim].
            noise: standard normal [b, draws, horizon, dim].
        """
        return self.sample(params, self.keys_values(params, context), sigma, proprio, noise)

    def keys_values(self, params: Params, context: Array) -> KeysValues:
        """What the decoder's blocks read of the context."""
        return self.decoder.bind(params).context_keys_values(context)

    def sample(
        self, params: Params, context_kv: KeysValues, sigma: Array, proprio: Array, noise: Array
    ) -> Array:
        """As `actions`, from the keys and values of the context."""
        decoder, draws = self.decoder.bind(params), noise.shape[1]
        proprio, sigma = (jnp.repeat(x, draws, axis=0) for x in (proprio, sigma))
        velocity = lambda a, time: decoder(proprio, a, time, sigma, context_kv)  # noqa: E731
        sample = noise.reshape(-1, *noise.shape[2:])
        if self.decoder.config.precision == "published":
            sample = sample.astype(jnp.bfloat16)  # it keeps this from step to step
        chunks = sample_actions(velocity, sample, self.sampling.action_steps)
        return chunks.reshape(noise.shape).astype(jnp.float32)

    @partial(jax.jit, static_argnums=0)
    def act(self, weights: Weights, inputs: Inputs) -> Array:
        """From queries to their chunks, normalised, float32 [b, horizon, dim]."""
        tokenizer, backbone, decoder = weights
        clean = self.encode(tokenizer, inputs.video)
        context = self.context(backbone, clean, inputs.text, inputs.video_noise)
        sigma = self._sigma(len(context))
        chunks = self.actions(decoder, context, sigma, inputs.proprio, inputs.action_noise)
        return medoid(chunks)

    @partial(jax.jit, static_argnums=0)
    def predict(self, weights: Weights, inputs: Inputs) -> Array:
        """The fully denoised clip, uint8 [b, frames, h, w, 3], from its observed frames."""
        tokenizer, backbone, _ = weights
        clean, last = self.encode(tokenizer, inputs.video), self.sampling.video_steps
        x = self._generate(backbone, clean, inputs.text, inputs.video_noise, last)
        sigma = jnp.full((len(x), 1), self.sigmas[last])
        return to_pixels(tokenizer, self.denoised(backbone, x, clean, sigma, inputs.text))

    def _generate(
        self, params: Params, clean: Array, text: Array, noise: Array, stop_step: int
    ) -> Array:
        """Noisy latents after `stop_step` evaluations."""
        step = lambda x, sigma: self.denoised(params, x, clean, sigma, text)  # noqa: E731
        return sample_video(step, noise, self.sigmas, stop_step)

    def _sigma(self, samples: int) -> Array:
        return jnp.full((samples, 1), self.sigmas[self.sampling.stop_step])

    def _condition_mask(self, samples: int) -> Array:
        return condition_mask(
            jnp.full(samples, self.clip.condition_latents), self.clip.latent_frames
        )


def to_pixels(tokenizer: Any, latents: Array) -> Array:
    """Latents [b, t', h', w', c] as video, uint8 [b, t, h, w, 3]."""
    return jnp.clip(jnp.round((tokenizer.decode(latents) + 1) * 127.5), 0, 255).astype(jnp.uint8)


def medoid(chunks: Array) -> Array:
    """Of draws [b, r, horizon, dim], per sample the one with the least distance to the others."""
    difference = chunks[:, :, None] - chunks[:, None]
    total = jnp.sqrt(jnp.sum(difference**2, axis=(3, 4))).sum(axis=2)
    best = jnp.argmin(total, axis=1)[:, None, None, None]
    return jnp.take_along_axis(chunks, best, axis=1)[:, 0]
