"""The policy: frames, proprioception and an instruction in, an action chunk out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from hashlib import blake2b
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from data_pipelines.cameras import VIDEO, View, arrange, view_cameras
from data_pipelines.clip import Clip
from data_pipelines.lru import LRU
from data_pipelines.normalize import Normalizer
from mvjax.chunking import Pending
from mvjax.flow import (
    CONDITION_SIGMA,
    Sampling,
    Trajectory,
    condition_mask,
    denoise,
    euler_times,
    network_input,
    observed_input,
    published_noise,
    sample_actions,
    sample_video,
    start,
)
from mvjax.models.action_decoder import Levels
from mvjax.models.attention import KeysValues
from mvjax.models.layers import rounded
from mvjax.models.network import Network, Params
from mvjax.models.video_dit import Memory
from mvjax.parallel import Rules, make_mesh, make_rules, spec, split_ways, use_rules
from mvjax.policy.observation import Observation

# The computation of a query, as pure functions:
#
#     pictures ─ encode ─▶ latents ─ context ─▶ hidden states after block k ─ actions ─▶ chunks
#
# `act` is all of it in one compiled program, and `act_and_predict` adds the predicted video. The
# parts are public for benchmarks and the offline evaluation.

Array = jax.Array
Weights = tuple[Any, Params, Params]  # video tokenizer, video DiT, action decoder


class Inputs(NamedTuple):
    """A batch of queries, on the devices.

    Attributes:
        video: uint8 [b, frames, h, w, 3], the observed frames, or all of the clip (oracle).
        views: the observed frames of every other view, uint8 [b, observed, its h, its w, 3].
        text: embeddings float32 [b, l, d].
        proprio: normalised float32 [b, proprio_horizon, dim].
        video_noise: standard normal [b, latent_frames, h/8, w/8, 16]; [b, 0] where no video is
            denoised or read.
        action_noise: standard normal [b, draws, horizon, dim].
        pending: what the robots still have to execute; None where `sampler.chunking` is "none".
    """

    video: Array
    views: Mapping[str, Array]
    text: Array
    proprio: Array
    video_noise: Array
    action_noise: Array
    pending: Pending | None = None


class Scene(NamedTuple):
    """Clean latents of what the policy sees.

    Attributes:
        video: [b, latent_frames, h/8, w/8, 16]; only the observed ones are read, or all (oracle).
        views: of every other view, its observed ones [b, condition_latents, its h/8, its w/8, 16].
    """

    video: Array
    views: Mapping[str, Array]


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: `self` is static under jit
class VideoActionModel:
    """The networks of a policy and how they are sampled.

    Attributes:
        clip: lengths of the video.
        layer: k, the block after which the decoder reads the video DiT.
        backbone, decoder: the video DiT and the action decoder.
        sampling: how video and actions are sampled.
        context_frames: "all", or "observed": the decoder reads the observed frames alone, so that
            no noise of the video enters.
        prefix: the largest number of given actions that the decoder was trained with.
    """

    clip: Clip
    layer: int
    backbone: Network
    decoder: Network
    sampling: Sampling
    context_frames: str = "all"
    prefix: int = 0

    def __post_init__(self):
        if self.sampling.chunking == "prefix" and not self.prefix:
            raise ValueError(
                "sampler.chunking is 'prefix', but this decoder was trained with flow.prefix = 0, "
                "so it has never been given the beginning of a chunk: train it with flow.prefix, "
                "or use --config.sampler.chunking=guided, which takes any decoder."
            )

    @property
    def observed_only(self) -> bool:
        """Whether the chunks depend on no future frames."""
        return self.context_frames == "observed"

    @property
    def context_sigma(self) -> float:
        """The video's noise level that the decoder is told of."""
        return CONDITION_SIGMA if self.observed_only else self.sampling.stop_sigma

    def encode(self, tokenizer: Any, video: Array, views: Mapping[str, Array]) -> Scene:
        """Encodes pictures as of `Inputs`; zeros for frames of the video that are not given."""

        def latents(pictures: Array) -> Array:
            encoded = tokenizer.encode(pictures.astype(jnp.float32) / 127.5 - 1)
            return rounded(encoded, self.backbone.config.precision)

        given = latents(video)
        missing = self.clip.latent_frames - given.shape[1]
        whole = jnp.pad(given, ((0, 0), (0, missing), (0, 0), (0, 0), (0, 0)))
        return Scene(whole, {name: latents(pictures) for name, pictures in views.items()})

    def context(self, params: Params, clean: Scene, text: Array, noise: Array) -> Array:
        """Returns the hidden states after block k of the video at noise level σ_K.

        Or of its observed frames alone, where these are the context: then the noise is not used.

        Args:
            params: of the video DiT.
            clean: of `encode`.
            text: embeddings [b, l, d].
            noise: standard normal, of the shape of `clean.video`.

        Returns:
            [b, tokens, width].
        """
        if self.observed_only:
            return self.read(params, noise, clean, jnp.zeros(()), text)
        if self.sampling.oracle:
            x = self._true_future(clean, noise)
        else:
            begin = start(noise, self.sampling.sigmas)
            x = self._denoise(params, begin, clean, text, last=self.sampling.stop_step).x
        return self.read(params, x, clean, self._sigma(len(x)), text)

    def read(self, params: Params, x: Array, clean: Scene, sigma: Array, text: Array) -> Array:
        """Returns the hidden states after block k of noisy latents `x` at noise level [b, 1].

        Where the context is of the observed frames alone, `x` and its level are not read.
        """
        if self.observed_only:
            i = observed_input(clean.video[:, : self.clip.condition_latents], clean.views)
        else:
            i = network_input(x, clean.video, sigma, self._condition_mask(len(x)), clean.views)
        net = self.backbone.bind(params)
        return net.hidden(
            i.latents, i.timesteps, text, i.condition_mask, views=i.views, layer=self.layer
        )

    def denoised(
        self,
        params: Params,
        x: Array,
        clean: Scene,
        sigma: Array,
        text: Array,
        memory: Memory | None = None,
    ) -> Array:
        """Returns the clean latents that the video DiT predicts from `x` at noise level [b, 1]."""
        velocity = partial(self.backbone.bind(params).velocity, text=text, memory=memory)
        mask = self._condition_mask(len(x))
        return denoise(velocity, x, clean.video, sigma, mask, clean.views)

    def memory(self, params: Params, clean: Scene, text: Array) -> Memory | None:
        """Returns what the video DiT computes once for all steps of a video, if it can."""
        mask, level = self._condition_mask(len(text)), self._sigma(len(text))
        i = network_input(clean.video, clean.video, level, mask, clean.views)
        return self.backbone.bind(params).remember(i, text)

    def actions(
        self,
        params: Params,
        context: Array,
        sigma: Array,
        proprio: Array,
        noise: Array,
        pending: Pending | None = None,
    ) -> Array:
        """Samples normalised chunks, float32 [b, draws, horizon, dim].

        Args:
            params: of the action decoder.
            context: hidden states of `context`.
            sigma: its noise level, one number.
            proprio: normalised [b, proprio_horizon, dim].
            noise: standard normal [b, draws, horizon, dim].
            pending: as in `Inputs`.
        """
        # Keys and values of the context are computed once, for all draws and all Euler steps.
        context_kv = self.keys_values(params, context)
        return self.sample(params, context_kv, sigma, proprio, noise, pending)

    def keys_values(self, params: Params, context: Array) -> KeysValues:
        """Returns the keys and values of the context in every block of the decoder."""
        return self.decoder.bind(params).context_keys_values(context)

    def sample(
        self,
        params: Params,
        context_kv: KeysValues,
        sigma: Array,
        proprio: Array,
        noise: Array,
        pending: Pending | None = None,
    ) -> Array:
        """Samples chunks as `actions` does, from the keys and values of the context."""
        decoder, draws = self.decoder.bind(params), noise.shape[1]
        proprio, steps = jnp.repeat(proprio, draws, axis=0), self.sampling.action_steps
        # Where nothing can be pending, as in a comparison offline, a chunk continues nothing.
        chunking, given = "none" if pending is None else self.sampling.chunking, None
        if chunking != "none":
            pending = jax.tree.map(lambda x: jnp.repeat(x, draws, axis=0), pending)
            given = pending.held if chunking == "prefix" else None
        levels = decoder.levels(euler_times(steps), sigma, clean=given is not None)

        def velocity(actions: Array, level: Levels) -> Array:
            return decoder.at_levels(level._replace(given=given), proprio, actions, context_kv)

        sample = noise.reshape(-1, *noise.shape[2:])
        if self.decoder.config.precision == "published":
            sample = sample.astype(jnp.bfloat16)  # the release integrates in bfloat16
        chunks = sample_actions(velocity, sample, steps, levels, chunking=chunking, pending=pending)
        return chunks.reshape(noise.shape).astype(jnp.float32)

    @partial(jax.jit, static_argnums=0)
    def act(self, weights: Weights, inputs: Inputs) -> Array:
        """Answers queries with normalised chunks, float32 [b, horizon, dim]."""
        tokenizer, backbone, decoder = weights
        clean = self.encode(tokenizer, inputs.video, inputs.views)
        context = self.context(backbone, clean, inputs.text, inputs.video_noise)
        return self._chunks(decoder, context, inputs)

    @partial(jax.jit, static_argnums=0)
    def predict(self, weights: Weights, inputs: Inputs) -> Array:
        """Predicts the fully denoised clip, uint8 [b, frames, h, w, 3]."""
        tokenizer, backbone, _ = weights
        clean = self.encode(tokenizer, inputs.video, inputs.views)
        begin = start(inputs.video_noise, self.sampling.sigmas)
        end = self._denoise(backbone, begin, clean, inputs.text)
        return to_pixels(tokenizer, end.x)

    @partial(jax.jit, static_argnums=0)
    def act_and_predict(self, weights: Weights, inputs: Inputs) -> tuple[Array, Array]:
        """Returns the chunks of `act` and the clip of `predict`, of one trajectory.

        In oracle mode the chunks are read from the true future, which the clip does not depend on.
        """
        tokenizer, backbone, decoder = weights
        text, noise, stop = inputs.text, inputs.video_noise, self.sampling.stop_step
        clean = self.encode(tokenizer, inputs.video, inputs.views)
        begin = start(noise, self.sampling.sigmas)
        here = self._denoise(backbone, begin, clean, text, last=stop)
        x = self._true_future(clean, noise) if self.sampling.oracle else here.x
        context = self.read(backbone, x, clean, self._sigma(len(x)), text)
        end = self._denoise(backbone, here, clean, text, first=stop)
        return self._chunks(decoder, context, inputs), to_pixels(tokenizer, end.x)

    def _chunks(self, decoder: Params, context: Array, inputs: Inputs) -> Array:
        sigma = jnp.float32(self.context_sigma)
        queries = inputs.proprio, inputs.action_noise, inputs.pending
        return medoid(self.actions(decoder, context, sigma, *queries))

    def _true_future(self, clean: Scene, noise: Array) -> Array:
        return clean.video + self.sampling.stop_sigma * noise

    def _denoise(
        self, params: Params, here: Trajectory, clean: Scene, text: Array, **steps: int
    ) -> Trajectory:
        """`sample_video` with the video DiT; `steps` are its `first` and `last`."""
        memory = self.memory(params, clean, text)
        denoise = lambda x, sigma: self.denoised(params, x, clean, sigma, text, memory)  # noqa: E731
        return sample_video(denoise, here, self.sampling.sigmas, **steps)

    def _sigma(self, samples: int) -> Array:
        return jnp.full((samples, 1), self.sampling.stop_sigma)

    def _condition_mask(self, samples: int) -> Array:
        return condition_mask(
            jnp.full(samples, self.clip.condition_latents), self.clip.latent_frames
        )


def to_pixels(tokenizer: Any, latents: Array) -> Array:
    """Decodes latents [b, t', h', w', c] to video, uint8 [b, t, h, w, 3]."""
    return jnp.clip(jnp.round((tokenizer.decode(latents) + 1) * 127.5), 0, 255).astype(jnp.uint8)


def medoid(chunks: Array) -> Array:
    """Returns of draws [b, r, horizon, dim] the one closest to all others, for each sample."""
    difference = chunks[:, :, None] - chunks[:, None]
    total = jnp.sqrt(jnp.sum(difference**2, axis=(3, 4))).sum(axis=2)
    best = jnp.argmin(total, axis=1)[:, None, None, None]
    return jnp.take_along_axis(chunks, best, axis=1)[:, 0]


_TEXTS_KEPT = 256  # embeddings of 512 x 1024 numbers are 2 MB each


@dataclass(frozen=True, eq=False)
class Policy:
    """A trained video-action model. `act` answers a batch of observations.

    It is deterministic: equal observations (of equal `noise_key`, where noise is fresh) give equal
    chunks, in any batch.

    Attributes:
        model: the networks and how they are sampled.
        weights: video tokenizer, and parameters of the video DiT and the action decoder.
        text_encoder: embeds instructions; each is encoded once.
        normalizer: of "proprio" and "actions".
        batch_size: queries per compiled batch, a multiple of the devices that share a batch.
        mesh, rules: the devices, and how batch and networks are split over them.
        views: the pictures that it sees and their cameras, "video" first; () if they are not known:
            then there is one, of the clip's size.
        identity: what was loaded ("what": digests and settings) and "where", as JSON values
            (`mvjax.identity`); without the sampling, which is `model.sampling`.
    """

    model: VideoActionModel
    weights: Weights
    text_encoder: Any
    normalizer: Normalizer
    batch_size: int = 8
    mesh: Mesh = field(default_factory=lambda: make_mesh({}, jax.local_devices()[:1]))
    rules: Rules = field(default_factory=make_rules)
    views: tuple[View, ...] = ()
    identity: Mapping[str, Any] = field(default_factory=dict, repr=False)
    _texts: LRU = field(default_factory=lambda: LRU(_TEXTS_KEPT), repr=False)

    def __post_init__(self):
        if not self.views:
            clip = self.model.clip
            object.__setattr__(self, "views", (View(VIDEO, (), clip.height, clip.width),))
        ways = split_ways("batch", self.mesh, self.rules)
        if self.batch_size < 1 or self.batch_size % ways:
            raise ValueError(
                f"The policy's batch_size must be a positive multiple of {ways}, the number of "
                f"devices that share a batch, got {self.batch_size}."
            )

    @property
    def cameras(self) -> tuple[str, ...]:
        """Those of which an observation must have frames; () if they are not known."""
        return view_cameras(self.views)

    def act(self, observations: Sequence[Observation]) -> np.ndarray:
        """Returns action chunks in environment units, float32 [n, action_horizon, action_dim].

        Queries are answered in compiled batches of `batch_size`, the last one padded.
        """
        chunks = self._answer(self.model.act, observations, self.model.sampling.oracle)
        return self.normalizer.unnormalize("actions", chunks)

    def act_with_video(self, observations: Sequence[Observation]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the chunks of `act`, and the video of `predict_video` they were read from.

        The video that is read at σ_K is denoised to the end, which is too slow for control. In
        oracle mode the chunks are read from the true future.
        """
        program, oracle = self.model.act_and_predict, self.model.sampling.oracle
        chunks, video = self._answer(program, observations, oracle, predicts=True)
        return self.normalizer.unnormalize("actions", chunks), video

    def predict_video(self, observations: Sequence[Observation]) -> np.ndarray:
        """Returns fully denoised video, observed frames first, uint8 [n, frames, h, w, 3]."""
        return self._answer(self.model.predict, observations, with_future=False, predicts=True)

    def sampled(self, sampling: Sampling) -> "Policy":
        """Returns the policy with other sampling; both share weights and text embeddings."""
        return replace(self, model=replace(self.model, sampling=sampling))

    def warm_up(self) -> None:
        """Compiles `act`, so that the first real query is not slow."""
        self.act([self.blank_observation()])

    def blank_observation(self) -> Observation:
        """Returns a query of the right shapes, all zeros."""
        clip, config = self.model.clip, self.model.decoder.config
        proprio = np.zeros((config.proprio_horizon, config.proprio_dim), np.float32)

        def black(view: View, frames: int) -> np.ndarray:
            return np.zeros((frames, view.height, view.width, 3), np.uint8)

        frames = {view.name: black(view, clip.observed_frames) for view in self.views}
        future = {VIDEO: black(self.views[0], clip.future_frames)}
        return Observation(frames, proprio, "", future, ("blank", 0), arranged=True)

    def batches(self, observations: Sequence[Observation]) -> Iterator[list[Observation]]:
        """Yields batches of `batch_size`; the last one is padded with its last query."""
        for first in range(0, len(observations), self.batch_size):
            batch = list(observations[first : first + self.batch_size])
            yield batch + batch[-1:] * (self.batch_size - len(batch))

    @contextmanager
    def devices(self) -> Iterator[None]:
        """Runs the model's functions inside it on the policy's devices."""
        with jax.set_mesh(self.mesh), use_rules(self.rules):
            yield

    def inputs(
        self, batch: Sequence[Observation], with_future: bool, predicts: bool = False
    ) -> Inputs:
        """Checks `batch_size` queries and moves them to the devices, with their futures or not.

        `predicts` says that a video is denoised: chunks alone may need none of its noise.
        """
        pictures = [self._pictures(observation, with_future) for observation in batch]
        video, *views = (
            self._split(np.stack([one[view.name] for one in pictures])) for view in self.views
        )
        proprio = self.normalizer.normalize("proprio", np.stack([o.proprio for o in batch]))
        return Inputs(
            video,
            {view.name: array for view, array in zip(self.views[1:], views)},
            *map(self._split, (self._text(batch), proprio)),
            *self._noise(batch, predicts or not self.model.observed_only),
            self._pending(batch),
        )

    def _answer(
        self,
        program: Callable[[Weights, Inputs], Any],
        observations: Sequence[Observation],
        with_future: bool,
        predicts: bool = False,
    ) -> Any:
        """The results of a program of the model, one per observation, on the host."""
        answers = []
        for batch in self.batches(observations):
            inputs = self.inputs(batch, with_future, predicts)
            with self.devices():
                answers.append(jax.device_get(program(self.weights, inputs)))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(observations)], *answers)

    def _split(self, array: np.ndarray | jax.Array) -> jax.Array:
        """An array whose first dimension is the batch, on the devices."""
        axes = ("batch", *[None] * (array.ndim - 1))
        return jax.device_put(array, NamedSharding(self.mesh, spec(axes, self.rules)))

    def _pictures(self, o: Observation, with_future: bool) -> dict[str, np.ndarray]:
        """The frames of every view of a query, "video" with the future after them or not."""
        clip = self.model.clip
        pictures = arrange(self.views, o.frames, arranged=o.arranged)
        if (count := len(pictures[VIDEO])) != clip.observed_frames:
            raise ValueError(
                f"An observation has {count} frames; this policy was trained with "
                f"clip.observed_frames = {clip.observed_frames}."
            )
        if with_future:
            future: Any = ()
            if o.future is not None:
                future = arrange(self.views[:1], o.future, arranged=o.arranged)[VIDEO]
            if len(future) != clip.future_frames:
                raise ValueError(
                    f"Oracle mode needs observations with the {clip.future_frames} true future "
                    f"frames, got {len(future)}."
                )
            pictures[VIDEO] = np.concatenate([pictures[VIDEO], future])
        return pictures

    def _text(self, batch: Sequence[Observation]) -> np.ndarray:
        # One at a time, so that the encoder is compiled for one shape only.
        texts = [observation.instruction for observation in batch]
        return np.stack(
            [self._texts.get(t, lambda t=t: self.text_encoder.encode([t])[0]) for t in texts]
        )

    def _pending(self, batch: Sequence[Observation]) -> Pending | None:
        """What the robots of a batch still have to execute, on the devices."""
        if self.model.sampling.chunking == "none":
            return None
        config = self.model.decoder.config
        horizon, dim = config.action_horizon, config.action_dim
        actions = np.zeros((len(batch), horizon, dim), np.float32)
        counts, delays = np.zeros((2, len(batch)), np.int32)
        for i, query in enumerate(batch):
            if query.pending is None:
                continue
            rest = np.asarray(query.pending, np.float32)
            if rest.ndim != 2 or rest.shape[1] != dim or not np.isfinite(rest).all():
                raise ValueError(
                    f"Observation.pending must be finite numbers [n, {dim}], one row for each "
                    f"action that is still to be executed; got shape {list(rest.shape)}."
                )
            self._check_delay(query.delay, len(rest))
            counts[i], delays[i] = min(len(rest), horizon), query.delay
            actions[i, : counts[i]] = rest[:horizon]
        # Zeros would be normalised to something else.
        there = (np.arange(horizon) < counts[:, None])[..., None]
        actions = np.where(there, self.normalizer.normalize("actions", actions), 0)
        return Pending(*map(self._split, (actions.astype(np.float32), counts, delays)))

    def _check_delay(self, delay: int, count: int) -> None:
        if not 0 <= delay <= min(count, self.model.decoder.config.action_horizon):
            raise ValueError(
                f"An observation's delay is {delay} actions, but {count} are pending and chunks "
                f"have {self.model.decoder.config.action_horizon}: ask earlier."
            )
        longest = self.model.prefix
        if self.model.sampling.chunking == "prefix" and delay > longest:
            raise ValueError(
                f"An observation's delay is {delay} actions, but this decoder was trained with "
                f"flow.prefix = {longest}: give at most that, or use "
                "--config.sampler.chunking=guided."
            )

    def _noise(self, batch: Sequence[Observation], video: bool) -> tuple[jax.Array, jax.Array]:
        """Video noise [b, t, h, w, c], or [b, 0], and action noise [b, draws, horizon, dim]."""
        if not self.model.sampling.fresh_noise:
            of_video, of_actions = self._fixed_noise
            return of_video if video else self._split(_nothing(batch)), of_actions
        # By name: neither the rest of the batch nor the last bit of an observation changes it.
        seeds = [_query_seeds(self.model.sampling.seed, query.noise_key) for query in batch]
        # A million numbers take longer than a query that does not read them.
        of_video = [self._video_noise(seed) for seed, _ in seeds] if video else _nothing(batch)
        of_actions = [self._action_noise(seed) for _, seed in seeds]
        return self._split(np.stack(of_video)), self._split(np.stack(of_actions))

    @cached_property
    def _fixed_noise(self) -> tuple[jax.Array, jax.Array]:
        # Cached: drawing a million numbers takes longer than a query.
        seed = self.model.sampling.seed  # of both, as published
        drawn = self._video_noise(seed), self._action_noise(seed)
        return tuple(self._split(np.stack([noise] * self.batch_size)) for noise in drawn)

    def _video_noise(self, seed: int) -> np.ndarray:
        return published_noise(seed, (1, *self.model.clip.latent_shape))[0]

    def _action_noise(self, seed: int) -> np.ndarray:
        config, draws = self.model.decoder.config, self.model.sampling.draws
        return published_noise(seed, (draws, config.action_horizon, config.action_dim))


def _nothing(batch: Sequence[Observation]) -> np.ndarray:
    return np.zeros((len(batch), 0), np.float32)


def _query_seeds(seed: int, noise_key: tuple[str, int] | None) -> tuple[int, int]:
    if noise_key is None:  # any default would repeat its noise
        raise ValueError(
            "With sampler.fresh_noise every observation needs its noise_key, (episode, number of "
            "the query in it), but this one has none."
        )
    episode, number = noise_key
    name = f"{seed} {number} {episode}".encode("utf-8", "surrogatepass")
    digest = blake2b(name, digest_size=8).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")
