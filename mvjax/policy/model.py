"""What a query computes: frames and words in, an action chunk out, as pure functions.

    video ─ encode ─▶ latents ─ context ─▶ hidden states after block k ─ actions ─▶ chunks

`act` is all of it, one compiled program, and `act_and_predict` the same with the video that the
model expects; the parts are there to be measured and compared.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mvjax.clip import Clip
from mvjax.flow.action import sample_actions
from mvjax.flow.sampler import Trajectory, sample_on, start
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
        if self.sampling.oracle:
            x = self._true_future(clean, noise)
        else:
            begin, stop = start(noise, self.sampling.sigmas), self.sampling.stop_step
            x = self._denoise(params, begin, clean, text, 0, stop).x
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
        return self._chunks(decoder, context, inputs)

    @partial(jax.jit, static_argnums=0)
    def predict(self, weights: Weights, inputs: Inputs) -> Array:
        """The fully denoised clip, uint8 [b, frames, h, w, 3], from its observed frames."""
        tokenizer, backbone, _ = weights
        clean = self.encode(tokenizer, inputs.video)
        begin = start(inputs.video_noise, self.sampling.sigmas)
        end = self._denoise(backbone, begin, clean, inputs.text, 0, self.sampling.evaluations)
        return to_pixels(tokenizer, end.x)

    @partial(jax.jit, static_argnums=0)
    def act_and_predict(self, weights: Weights, inputs: Inputs) -> tuple[Array, Array]:
        """The chunks of `act` and the clip of `predict`.

        One video is denoised to σ_K, read there for the chunks, and denoised on to its end. In
        oracle mode the chunks are read from the true future, and the clip is what the model
        expects without having seen it.
        """
        tokenizer, backbone, decoder = weights
        text, noise, stop = inputs.text, inputs.video_noise, self.sampling.stop_step
        clean, begin = self.encode(tokenizer, inputs.video), start(noise, self.sampling.sigmas)
        here = self._denoise(backbone, begin, clean, text, 0, stop)
        x = self._true_future(clean, noise) if self.sampling.oracle else here.x
        context = self.read(backbone, x, clean, self._sigma(len(x)), text)
        end = self._denoise(backbone, here, clean, text, stop, self.sampling.evaluations)
        return self._chunks(decoder, context, inputs), to_pixels(tokenizer, end.x)

    def _chunks(self, decoder: Params, context: Array, inputs: Inputs) -> Array:
        sigma = self._sigma(len(context))
        return medoid(self.actions(decoder, context, sigma, inputs.proprio, inputs.action_noise))

    def _true_future(self, clean: Array, noise: Array) -> Array:
        return clean + self.sampling.stop_sigma * noise

    def _denoise(
        self, params: Params, here: Trajectory, clean: Array, text: Array, first: int, last: int
    ) -> Trajectory:
        """The video after the evaluations `first`, ..., `last` - 1."""
        step = lambda x, sigma: self.denoised(params, x, clean, sigma, text)  # noqa: E731
        return sample_on(step, here, self.sampling.sigmas, first, last)

    def _sigma(self, samples: int) -> Array:
        return jnp.full((samples, 1), self.sampling.stop_sigma)

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
