"""The policy: frames, proprioception and an instruction in, an action chunk out."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from data_pipelines.normalization.normalizer import Normalizer
from data_pipelines.transforms import resize_area
from mvjax.flow.sampler import published_noise
from mvjax.parallel.mesh import make_mesh
from mvjax.parallel.rules import Rules, make_rules, spec, split_ways, use_rules
from mvjax.policy.model import Inputs, VideoActionModel, Weights
from mvjax.policy.observation import Observation
from mvjax.policy.sampling import Sampling

_TEXTS_KEPT = 256  # embeddings of 512 x 1024 numbers are 2 MB each


@dataclass(frozen=True, eq=False)
class Policy:
    """A trained video-action model. `plan` answers a batch of observations.

    Deterministic: equal observations give equal chunks, in whatever batch they are asked.

    Attributes:
        model: the networks and how they are sampled.
        weights: video tokenizer, and parameters of the video DiT and the action decoder.
        text_encoder: instructions to embeddings; each is encoded once.
        normalizer: of "proprio" and "actions".
        batch_size: queries per compiled batch, a multiple of the devices that share a batch.
        mesh, rules: the devices that answer, and how batch and networks are split over them.
    """

    model: VideoActionModel
    weights: Weights
    text_encoder: Any
    normalizer: Normalizer
    batch_size: int = 8
    mesh: Mesh = field(default_factory=lambda: make_mesh({}, jax.local_devices()[:1]))
    rules: Rules = field(default_factory=make_rules)
    _texts: OrderedDict[str, np.ndarray] = field(default_factory=OrderedDict, repr=False)

    def __post_init__(self):
        ways = split_ways("batch", self.mesh, self.rules)
        if self.batch_size < 1 or self.batch_size % ways:
            raise ValueError(
                f"The policy's batch_size must be a positive multiple of {ways}, the devices that "
                f"share a batch, got {self.batch_size}."
            )

    def plan(self, observations: Sequence[Observation]) -> np.ndarray:
        """Action chunks in environment units, float32 [n, action_horizon, action_dim].

        Queries are answered in compiled batches of `batch_size`, the last one padded.
        """
        chunks = self._answer(self.model.act, observations, self.model.sampling.oracle)
        return self.normalizer.unnormalize("actions", chunks)

    def plan_with_video(self, observations: Sequence[Observation]) -> tuple[np.ndarray, np.ndarray]:
        """The chunks of `plan`, and the video of `predict_video` they were read from.

        The video that the plan is read from at σ_K is denoised on to its end, so all steps of the
        schedule are computed once, whatever K is: meant for looking on, not for control. In oracle
        mode the plan is read from the true future, and the video is what the model expects instead.
        """
        program, oracle = self.model.act_and_predict, self.model.sampling.oracle
        chunks, video = self._answer(program, observations, oracle)
        return self.normalizer.unnormalize("actions", chunks), video

    def predict_video(self, observations: Sequence[Observation]) -> np.ndarray:
        """Fully denoised video with the observed frames first, uint8 [n, frames, h, w, 3]."""
        return self._answer(self.model.predict, observations, with_future=False)

    def sampled(self, sampling: Sampling) -> "Policy":
        """The same networks, answering in another way; both share memory and remembered texts."""
        return replace(self, model=replace(self.model, sampling=sampling))

    def warm_up(self) -> None:
        """Compiles `plan`, so that the first real query is not slow."""
        self.plan([self.blank_observation()])

    def blank_observation(self) -> Observation:
        """A query of the right shapes, all black and at rest."""
        clip, config = self.model.clip, self.model.decoder.config
        frames = np.zeros((clip.frames, clip.height, clip.width, 3), np.uint8)
        proprio = np.zeros((config.proprio_horizon, config.proprio_dim), np.float32)
        observed, future = np.split(frames, [clip.observed_frames])
        return Observation(observed, proprio, "", future)

    def batches(self, observations: Sequence[Observation]) -> Iterator[list[Observation]]:
        """Queries in batches of `batch_size`; the last one is filled up with its last query."""
        for start in range(0, len(observations), self.batch_size):
            batch = list(observations[start : start + self.batch_size])
            yield batch + batch[-1:] * (self.batch_size - len(batch))

    @contextmanager
    def devices(self) -> Iterator[None]:
        """Inside, the model's functions run on the policy's devices."""
        with jax.set_mesh(self.mesh), use_rules(self.rules):
            yield

    def inputs(self, batch: Sequence[Observation], with_future: bool) -> Inputs:
        """A full batch of queries, checked and brought to the devices.

        Args:
            batch: `batch_size` queries.
            with_future: take their true future frames as well.
        """
        video = self._frames(batch, with_future)
        proprio = self.normalizer.normalize("proprio", np.stack([o.proprio for o in batch]))
        arrays = map(self._split, (video, self._text(batch), proprio))
        return Inputs(*arrays, *self._noise(batch))

    def _answer(
        self,
        program: Callable[[Weights, Inputs], Any],
        observations: Sequence[Observation],
        with_future: bool,
    ) -> Any:
        """What a program of the model says to each observation, on the host."""
        answers = []
        for batch in self.batches(observations):
            inputs = self.inputs(batch, with_future)
            with self.devices():
                answers.append(jax.device_get(program(self.weights, inputs)))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(observations)], *answers)

    def _split(self, array: np.ndarray | jax.Array) -> jax.Array:
        """An array whose first dimension is the batch, on the devices."""
        axes = ("batch", *[None] * (array.ndim - 1))
        return jax.device_put(array, NamedSharding(self.mesh, spec(axes, self.rules)))

    def _frames(self, batch: Sequence[Observation], with_future: bool) -> np.ndarray:
        clip, clips = self.model.clip, []
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
        wanted = [o.instruction for o in batch]
        new = sorted(set(wanted) - self._texts.keys())
        if new:
            self._texts.update(zip(new, self.text_encoder.encode(new)))
        for text in wanted:
            self._texts.move_to_end(text)
        embeddings = np.stack([self._texts[text] for text in wanted])
        while len(self._texts) > _TEXTS_KEPT:
            self._texts.popitem(last=False)
        return embeddings

    def _noise(self, batch: Sequence[Observation]) -> tuple[jax.Array, jax.Array]:
        """Video noise [b, t, h, w, c] and action noise [b, draws, horizon, dim] of a full batch.

        A sample's noise depends on nothing but its own observation, so a chunk does not depend on
        the batch it is asked in.
        """
        if not self.model.sampling.fresh_noise:
            return self._fixed_noise
        seed = self.model.sampling.seed
        drawn = [self._draw(_observation_seed(seed, o)) for o in batch]
        return tuple(self._split(np.stack(noise)) for noise in zip(*drawn))

    @cached_property
    def _fixed_noise(self) -> tuple[jax.Array, jax.Array]:
        # A million numbers for every query would take longer to draw than to use.
        drawn = self._draw(self.model.sampling.seed)
        return tuple(self._split(np.stack([noise] * self.batch_size)) for noise in drawn)

    def _draw(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        config, draws = self.model.decoder.config, self.model.sampling.draws
        return (
            published_noise(seed, (1, *self.model.clip.latent_shape))[0],
            published_noise(seed, (draws, config.action_horizon, config.action_dim)),
        )


def _observation_seed(seed: int, observation: Observation) -> int:
    digest = blake2b(observation.instruction.encode(), digest_size=4, salt=seed.to_bytes(8, "big"))
    digest.update(np.ascontiguousarray(observation.frames))
    digest.update(np.ascontiguousarray(observation.proprio))
    return int.from_bytes(digest.digest(), "big")
