"""Action errors on held-out episodes, for true and for generated video, and the video's own error.

The release validates a decoder with two tables: the error of its actions when it reads the true
future video at every noise level of the schedule ("gtvid"), and when it reads the video model's own
at every stop step ("genvid"). Both are here, per step of the chunk and dimension, with PSNR and
SSIM of the video that full denoising ends with.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from data_pipelines.clips import cut_episode
from data_pipelines.encoding.job import split_of
from data_pipelines.episode import Episode
from mvjax.evaluation.similarity import psnr, ssim
from mvjax.flow.sampler import advance, evaluations
from mvjax.policy.model import Inputs, VideoActionModel, Weights, medoid, to_pixels
from mvjax.policy.observation import Observation
from mvjax.policy.policy import Policy


@dataclass(frozen=True)
class Window:
    """A moment of a held-out episode.

    Attributes:
        episode: its id.
        observation: with the true future.
        actions: what was done, raw units [horizon, dim].
    """

    episode: str
    observation: Observation
    actions: np.ndarray


@dataclass(frozen=True)
class WindowErrors:
    """What the policy would have done there; s stop steps.

    Attributes:
        true_video, generated_video: squared error of the normalised actions [s, horizon, dim].
        raw_true_video, raw_generated_video: absolute error in the actions' units, likewise.
        psnr, ssim: of every future frame of the fully denoised video [future_frames].
    """

    true_video: np.ndarray
    generated_video: np.ndarray
    raw_true_video: np.ndarray
    raw_generated_video: np.ndarray
    psnr: np.ndarray
    ssim: np.ndarray


def held_out_windows(
    episodes: Sequence[Episode], dataset: ConfigDict, config: ConfigDict, count: int
) -> list[Window]:
    """So many moments, spread over the validation episodes and over their length.

    Args:
        episodes: of the dataset.
        dataset: its config section, with actions.
        config: `clip`, `policy_io`, `validation_share`.
        count: how many.

    Raises:
        ValueError: if no episode is held out.
    """
    held_out = [
        i
        for i in range(len(episodes))
        if split_of(episodes[i].id, config.validation_share) == "validation"
    ]
    if not held_out:
        raise ValueError(
            f"Dataset {dataset.name!r} has no held-out episode: config.validation_share is "
            f"{config.validation_share}; train with a larger one."
        )
    chosen = [held_out[n * len(held_out) // count] for n in range(count)]
    windows, observed = [], config.clip.observed_frames
    for index in dict.fromkeys(chosen):
        episode, many = episodes[index], chosen.count(index)
        cuts = cut_episode(episode, dataset, config.clip, config.policy_io)
        for n in range(many):
            at = (2 * n + 1) * len(cuts.clips) // (2 * many)
            past, future = np.split(cuts.frames[cuts.clips[at]], [observed])
            proprio = cuts.columns["proprio"][at]
            observation = Observation(past, proprio, episode.instructions[0], future)
            windows.append(Window(episode.id, observation, cuts.columns["actions"][at]))
    return windows


def window_errors(
    policy: Policy, windows: Sequence[Window], stop_steps: Sequence[int]
) -> Iterator[WindowErrors]:
    """Errors of each window, computed in batches of the policy.

    Args:
        policy: its sampling says the schedule; its stop step and mode are not used.
        windows: of `held_out_windows`.
        stop_steps: at which steps K of the schedule to read the video.
    """
    for start in range(0, len(windows), policy.batch_size):
        batch = list(windows[start : start + policy.batch_size])
        full = batch + batch[-1:] * (policy.batch_size - len(batch))
        yield from list(_batch_errors(policy, full, stop_steps))[: len(batch)]


def _batch_errors(
    policy: Policy, batch: list[Window], stop_steps: Sequence[int]
) -> Iterator[WindowErrors]:
    model, clip = policy.model, policy.model.clip
    inputs = policy.inputs([window.observation for window in batch], with_future=True)
    read_true, read_generated = [], []
    with policy.devices():
        clean = _encode(model, policy.weights, inputs.video)
        x, previous = inputs.video_noise * np.float32(model.sigmas[0]), jnp.zeros_like(clean)
        for k, (sigma, coefficients) in enumerate(zip(*evaluations(model.sigmas))):
            if k in stop_steps:
                noisy = clean + sigma * inputs.video_noise
                for video, chunks in ((noisy, read_true), (x, read_generated)):
                    act = _act(model, policy.weights, video, clean, sigma, inputs)
                    chunks.append(np.asarray(act))
            step = _step(model, policy.weights, x, previous, clean, sigma, coefficients, inputs)
            x, previous = step
        made = np.asarray(_decode(policy.weights, x))[:, clip.observed_frames :]
    shown = np.asarray(inputs.video)[:, clip.observed_frames :]
    wanted = np.stack([window.actions for window in batch])
    normalised = policy.normalizer.normalize("actions", wanted)
    for i in range(len(batch)):
        true, generated = (np.stack(chunks)[:, i] for chunks in (read_true, read_generated))
        raw_true, raw_generated = (
            policy.normalizer.unnormalize("actions", chunks) for chunks in (true, generated)
        )
        yield WindowErrors(
            true_video=(true - normalised[i]) ** 2,
            generated_video=(generated - normalised[i]) ** 2,
            raw_true_video=np.abs(raw_true - wanted[i]),
            raw_generated_video=np.abs(raw_generated - wanted[i]),
            psnr=psnr(made[i], shown[i]),
            ssim=ssim(made[i], shown[i]),
        )


# The noise level is an argument, so that the whole schedule needs one program of each kind.


@partial(jax.jit, static_argnums=0)
def _encode(model: VideoActionModel, weights: Weights, video: jax.Array) -> jax.Array:
    return model.encode(weights[0], video)


@partial(jax.jit, static_argnums=0)
def _act(model, weights: Weights, x, clean, sigma, inputs: Inputs) -> jax.Array:
    level = jnp.full((len(x), 1), sigma)
    context = model.read(weights[1], x, clean, level, inputs.text)
    chunks = model.actions(weights[2], context, level, inputs.proprio, inputs.action_noise)
    return medoid(chunks)


@partial(jax.jit, static_argnums=0)
def _step(model, weights: Weights, x, previous, clean, sigma, coefficients, inputs: Inputs):
    x0 = model.denoised(weights[1], x, clean, jnp.full((len(x), 1), sigma), inputs.text)
    return advance(x, x0, previous, coefficients), x0


@jax.jit
def _decode(weights: Weights, latents: jax.Array) -> jax.Array:
    return to_pixels(weights[0], latents)
