"""The policy: frames, proprioception and an instruction in, an action chunk out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from hashlib import blake2b
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.normalizer import Normalizer
from data_pipelines.transforms import resize_area
from mvjax.clip import Clip
from mvjax.flow.action import sample_actions
from mvjax.flow.noise_levels import karras_sigmas
from mvjax.flow.sampler import published_noise, sample_video
from mvjax.flow.video import condition_mask, denoise, network_input
from mvjax.models.param_tree import Params
from mvjax.models.parameters import Network
from mvjax.models.precision import rounded
from mvjax.models.video_dit import VideoDiT
from mvjax.policy.observation import Observation

Array = jax.Array


@dataclass(frozen=True)
class Sampling:
    """How a query is answered.

    Attributes:
        video_steps: steps of the full video schedule (published: 35).
        stop_step: K, evaluations of the video before the partial pass; 0 (published) denoises
            nothing, `video_steps` denoises fully.
        action_steps: Euler steps of the action chunk (published: 10).
        sigma_max: noise level the video starts from (published: 80).
        sigma_min: noise level of the last, clean prediction (published: 0.002).
        oracle: take the true future video, noised at σ_K, instead of generating one.
        seed: of the video and action noise (published: 0).
        fresh_noise: draw new noise at every query, from the seed and the observation; the published
            policy takes the same noise at every query, so the error that noise brings repeats.
        draws: action chunks sampled per query; the one nearest to all others (the medoid) is
            executed. They share one context, so a draw costs ten small Euler steps (published: 1).
    """

    video_steps: int = 35
    stop_step: int = 0
    action_steps: int = 10
    sigma_max: float = 80.0
    sigma_min: float = 0.002
    oracle: bool = False
    seed: int = 0
    fresh_noise: bool = False
    draws: int = 1


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: `self` is static under jit
class Policy:
    """A trained video-action model. `plan` answers a batch of observations.

    Deterministic: equal observations give equal chunks, in whatever batch they are asked.
    """

    clip: Clip
    layer: int
    tokenizer: Any
    text_encoder: Any
    backbone: Network
    backbone_params: Params
    decoder: Network
    decoder_params: Params
    normalizer: Normalizer
    sampling: Sampling = Sampling()
    batch_size: int = 8
    _texts: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        steps, stop = self.sampling.video_steps, self.sampling.stop_step
        if not 0 <= stop <= steps:
            raise ValueError(f"stop_step must be between 0 and video_steps = {steps}, got {stop}.")
        for name, value in (("draws", self.sampling.draws), ("batch_size", self.batch_size)):
            if value < 1:
                raise ValueError(f"The policy's {name} must be at least 1, got {value}.")

    def plan(self, observations: Sequence[Observation]) -> np.ndarray:
        """Action chunks in environment units, float32 [n, action_horizon, action_dim].

        Queries are answered in compiled batches of `batch_size`, the last one padded.
        """
        chunks = []
        for batch in self._batches(observations):
            video = self._frames(batch, with_future=self.sampling.oracle)
            proprio = self.normalizer.normalize("proprio", np.stack([o.proprio for o in batch]))
            text, noise = self._text(batch), self._noise(batch)
            chunks.append(np.asarray(self._act(self._params, video, text, proprio, *noise)))
        actions = np.concatenate(chunks)[: len(observations)]
        return self.normalizer.unnormalize("actions", actions)

    def warm_up(self) -> None:
        """Compiles `plan`, so that the first real query is not slow."""
        clip, config = self.clip, self.decoder.config
        frames = np.zeros((clip.frames, clip.height, clip.width, 3), np.uint8)
        proprio = np.zeros((config.proprio_horizon, config.proprio_dim), np.float32)
        observed, future = np.split(frames, [clip.observed_frames])
        self.plan([Observation(observed, proprio, "", future)])

    def predict_video(self, observations: Sequence[Observation]) -> np.ndarray:
        """Fully denoised video with the observed frames first, uint8 [n, frames, h, w, 3]."""
        videos = []
        for batch in self._batches(observations):
            video, text = self._frames(batch, with_future=False), self._text(batch)
            noise, _ = self._noise(batch)
            videos.append(np.asarray(self._predict(self._params, video, text, noise)))
        return np.concatenate(videos)[: len(observations)]

    def _batches(self, observations):
        for start in range(0, len(observations), self.batch_size):
            batch = list(observations[start : start + self.batch_size])
            yield batch + batch[-1:] * (self.batch_size - len(batch))

    def _frames(self, batch: Sequence[Observation], with_future: bool) -> np.ndarray:
        clip, clips = self.clip, []
        for o in batch:
            if len(o.frames) != clip.observed_frames:
                raise ValueError(
                    f"An observation has {len(o.frames)} frames; this policy was trained with "
                    f"clip.observed_frames = {clip.observed_frames}."
                )
            frames = o.frames
            if with_future:
                if o.future is None or len(o.future) != clip.future_frames:
                    raise ValueError(
                        f"Oracle mode needs observations with the {clip.future_frames} true future "
                        "frames."
                    )
                frames = np.concatenate([frames, o.future])
            clips.append(resize_area(frames, clip.height, clip.width))
        return np.stack(clips)

    def _text(self, batch: Sequence[Observation]) -> np.ndarray:
        new = sorted({o.instruction for o in batch} - self._texts.keys())
        if new:
            self._texts.update(zip(new, self.text_encoder.encode(new)))
        return np.stack([self._texts[o.instruction] for o in batch])

    @property
    def _params(self):
        return self.tokenizer, self.backbone_params, self.decoder_params

    @cached_property
    def _sigmas(self) -> np.ndarray:
        s = self.sampling
        return karras_sigmas(s.video_steps, sigma_max=s.sigma_max, sigma_min=s.sigma_min)

    def _encode(self, tokenizer, video: Array) -> Array:
        """Latents [b, latent_frames, ...]; those past the given frames are zeros."""
        latents = tokenizer.encode(video.astype(jnp.float32) / 127.5 - 1)
        latents = rounded(latents, self.backbone.config.precision)
        missing = self.clip.latent_frames - latents.shape[1]
        return jnp.pad(latents, ((0, 0), (0, missing), (0, 0), (0, 0), (0, 0)))

    def _noise(self, batch: Sequence[Observation]) -> tuple[np.ndarray, np.ndarray]:
        """Video noise [b, t, h, w, c] and action noise [b, draws, horizon, dim].

        A sample's noise depends on nothing but its own observation, so a chunk does not depend on
        the batch it is asked in.
        """
        config, sampling = self.decoder.config, self.sampling
        seeds = [sampling.seed] * len(batch)
        if sampling.fresh_noise:
            seeds = [_observation_seed(sampling.seed, o) for o in batch]
        actions = (sampling.draws, config.action_horizon, config.action_dim)
        return (
            np.concatenate([published_noise(s, (1, *self.clip.latent_shape)) for s in seeds]),
            np.stack([published_noise(s, actions) for s in seeds]),
        )

    def _generate(self, net: VideoDiT, clean: Array, text: Array, noise: Array, stop_step: int):
        """Noisy latents after `stop_step` evaluations, and the denoiser that made them."""
        mask = self._condition_mask(len(clean))

        def denoiser(x, sigma):
            velocity = lambda i: net(i.latents, i.timesteps, text, i.condition_mask)  # noqa: E731
            return denoise(velocity, x, clean, sigma, mask)

        return sample_video(denoiser, noise, self._sigmas, stop_step), denoiser

    def _condition_mask(self, samples: int) -> Array:
        return condition_mask(
            jnp.full(samples, self.clip.condition_latents), self.clip.latent_frames
        )

    @partial(jax.jit, static_argnums=0)
    def _act(self, params, video, text, proprio, video_noise, action_noise) -> Array:
        tokenizer, backbone_params, decoder_params = params
        net, decoder = self.backbone.bind(backbone_params), self.decoder.bind(decoder_params)
        k = self.sampling.stop_step
        clean = self._encode(tokenizer, video)
        sigma = jnp.full((len(clean), 1), self._sigmas[k])
        if self.sampling.oracle:
            x = clean + self._sigmas[k] * video_noise
        else:
            x, _ = self._generate(net, clean, text, video_noise, k)
        i = network_input(x, clean, sigma, self._condition_mask(len(clean)))
        context = net.hidden(i.latents, i.timesteps, text, i.condition_mask, layer=self.layer)

        context_kv = decoder.context_keys_values(context)
        proprio, sigma = (jnp.repeat(x, self.sampling.draws, axis=0) for x in (proprio, sigma))
        velocity = lambda a, time: decoder(proprio, a, time, sigma, context_kv)  # noqa: E731
        noise = action_noise.reshape(-1, *action_noise.shape[2:])
        if self.decoder.config.precision == "published":
            noise = noise.astype(jnp.bfloat16)  # the sample keeps it from step to step
        chunks = sample_actions(velocity, noise, self.sampling.action_steps)
        return _medoid(chunks.reshape(action_noise.shape).astype(jnp.float32))

    @partial(jax.jit, static_argnums=0)
    def _predict(self, params, video: Array, text: Array, noise: Array) -> Array:
        tokenizer, backbone_params, _ = params
        clean = self._encode(tokenizer, video)
        net, last = self.backbone.bind(backbone_params), self.sampling.video_steps
        x, denoiser = self._generate(net, clean, text, noise, last)
        x0 = denoiser(x, jnp.full((len(x), 1), self._sigmas[last]))
        frames = (tokenizer.decode(x0) + 1) * 127.5
        return jnp.clip(jnp.round(frames), 0, 255).astype(jnp.uint8)


def _medoid(chunks: Array) -> Array:
    """Of draws [b, r, horizon, dim], per sample the one with the least distance to the others."""
    difference = chunks[:, :, None] - chunks[:, None]
    total = jnp.sqrt(jnp.sum(difference**2, axis=(3, 4))).sum(axis=2)
    best = jnp.argmin(total, axis=1)[:, None, None, None]
    return jnp.take_along_axis(chunks, best, axis=1)[:, 0]


def _observation_seed(seed: int, observation: Observation) -> int:
    digest = blake2b(observation.instruction.encode(), digest_size=4, salt=seed.to_bytes(8, "big"))
    digest.update(np.ascontiguousarray(observation.frames))
    digest.update(np.ascontiguousarray(observation.proprio))
    return int.from_bytes(digest.digest(), "big")
