"""Generating video: observed frames and a text in, the whole clip out.

The policy samples inside one compiled program and needs few steps of it. A person who waits for a
video wants to see how far it is, so here a Python loop calls one compiled step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data_pipelines.pictures import cover
from mvjax.clip import Clip
from mvjax.flow.noise_levels import karras_sigmas
from mvjax.flow.sampler import advance, evaluations, published_noise
from mvjax.flow.video import condition_mask, denoise
from mvjax.models.param_tree import Params
from mvjax.models.parameters import Network
from mvjax.models.precision import rounded
from mvjax.parallel.rules import Rules, use_rules

Array = jax.Array


@dataclass(frozen=True)
class Denoising:
    """How a video is sampled; the defaults are published.

    Attributes:
        steps: of the noise schedule; one more evaluation gives the clean prediction at its end.
        sigma_max, sigma_min: the first and the last noise level.
        seed: of the noise.
        guidance: g of x0 = x0_c + g (x0_c - x0_u), where x0_u is predicted for the negative text;
            0 (mimic-video; Cosmos-Predict2 has 7) runs the network once per evaluation, not twice.
    """

    steps: int = 35
    sigma_max: float = 80.0
    sigma_min: float = 0.002
    seed: int = 0
    guidance: float = 0.0

    def __post_init__(self):
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"The noise must go down, from sigma_max to a positive sigma_min; got sigma_max "
                f"{self.sigma_max} and sigma_min {self.sigma_min}."
            )
        if self.guidance < 0:
            raise ValueError(f"guidance must be 0 (none) or more, got {self.guidance}.")

    @property
    def evaluations(self) -> int:
        """Evaluations of the network."""
        return self.steps + 1


class Conditions(NamedTuple):
    """What a video is generated from.

    Attributes:
        clean: latents that begin with the observed frames [1, t, h, w, c]; the others are zeros.
        mask: 1 for the observed latent frames [1, t].
        text: embedding [1, l, dim]; with guidance [2, l, dim], the negative text second.
        guidance: g, a scalar.
    """

    clean: Array
    mask: Array
    text: Array
    guidance: Array


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: `self` is static under jit
class VideoModel:
    """A video DiT on the devices of a mesh.

    Attributes:
        network, params: the video DiT, LoRA merged.
        mesh, rules: where its parameters and its computation lie.
    """

    network: Network
    params: Params
    mesh: Mesh
    rules: Rules

    def sample(
        self,
        noise: np.ndarray,
        conditions: Conditions,
        settings: Denoising,
        progress: Callable[[int], None] = lambda evaluations: None,
    ) -> np.ndarray:
        """Clean latents float32 [1, t, h, w, c], from standard normal noise of that shape.

        Args:
            noise: where to start.
            conditions: from what.
            settings: how.
            progress: called with the number of evaluations that are done, after each.
        """
        sigmas = karras_sigmas(
            settings.steps, sigma_max=settings.sigma_max, sigma_min=settings.sigma_min
        )
        whole = NamedSharding(self.mesh, PartitionSpec())
        x, previous = noise * np.float32(sigmas[0]), np.zeros_like(noise)
        x, previous, conditions = jax.device_put((x, previous, conditions), whole)
        with jax.set_mesh(self.mesh), use_rules(self.rules):
            for done, numbers in enumerate(zip(*evaluations(sigmas)), 1):
                x, previous = self._step(self.params, x, previous, conditions, *numbers)
                x.block_until_ready()  # what is not yet computed is no progress
                progress(done)
        return np.asarray(x)

    @partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
    def _step(self, params, x, previous, conditions, sigma, coefficients) -> tuple[Array, Array]:
        """The next noisy latents, and the clean prediction here; σ is an input: one compilation."""
        x0 = self._clean_prediction(params, x, conditions, sigma)
        x = advance(x, x0, previous, coefficients)
        whole = PartitionSpec()  # as they came in, so that the next step is the same program
        return jax.lax.with_sharding_constraint((x, x0), whole)

    def _clean_prediction(self, params, x, conditions, sigma) -> Array:
        clean, mask, text, guidance = conditions
        copies = len(text)
        x, clean, mask = (jnp.repeat(array, copies, axis=0) for array in (x, clean, mask))
        net = self.network.bind(params)
        clean = rounded(clean, self.network.config.precision)
        velocity = lambda i: net(i.latents, i.timesteps, text, i.condition_mask)  # noqa: E731
        x0 = denoise(velocity, x, clean, jnp.full((copies, 1), sigma), mask)
        return x0 if copies == 1 else x0[:1] + guidance * (x0[:1] - x0[1:])


def generate(
    model: VideoModel,
    tokenizer: Any,
    clip: Clip,
    frames: np.ndarray,
    text: np.ndarray,
    settings: Denoising = Denoising(),
    *,
    negative: np.ndarray | None = None,
    progress: Callable[[int], None] = lambda evaluations: None,
) -> np.ndarray:
    """Generates a video that begins with what was observed.

    Equal arguments give the same video, on the same kind of device.

    Args:
        model: the video DiT.
        tokenizer: the video tokenizer whose latents it was trained on.
        clip: how long and large the video is.
        frames: the observed ones, uint8 [clip.observed_frames, any h, any w, 3]; they are scaled
            to cover the clip's size, and their centre is taken.
        text: embedding of the prompt, float32 [l, dim].
        settings: how it is sampled.
        negative: embedding of the text to move away from; needed with guidance.
        progress: called with the number of evaluations that are done, after each.

    Returns:
        uint8 [clip.frames, clip.height, clip.width, 3]; the observed frames have passed through
        the tokenizer as the others have.

    Raises:
        ValueError: if frames or texts do not fit.
    """
    if len(frames) != clip.observed_frames:
        raise ValueError(
            f"There are {len(frames)} frames to begin with, but clip.observed_frames is "
            f"{clip.observed_frames}."
        )
    texts = [text]
    if settings.guidance:
        if negative is None or negative.shape != text.shape:
            raise ValueError(
                f"Guidance needs the embedding of a negative text of the shape {text.shape}, got "
                f"{None if negative is None else negative.shape}."
            )
        texts.append(negative)
    video = cover(frames, clip.height, clip.width)[None].astype(np.float32) / 127.5 - 1
    clean = np.zeros((1, *clip.latent_shape), np.float32)
    clean[:, : clip.condition_latents] = np.asarray(tokenizer.encode(video))
    conditions = Conditions(
        clean=clean,
        mask=np.asarray(condition_mask(np.full(1, clip.condition_latents), clip.latent_frames)),
        text=np.stack(texts),
        guidance=np.float32(settings.guidance),
    )
    noise = published_noise(settings.seed, clean.shape)
    latents = model.sample(noise, conditions, settings, progress)
    decoded = np.asarray(tokenizer.decode(latents))[0]
    return np.clip(np.round((decoded + 1) * 127.5), 0, 255).astype(np.uint8)
