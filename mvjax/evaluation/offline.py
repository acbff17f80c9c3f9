"""Action errors on held-out episodes, for true and for generated video, and the video's own error.

The release validates a decoder with two tables: the error of its actions when it reads the true
future video at every noise level of the schedule ("gtvid"), and when it reads the video model's own
at every stop step ("genvid"). Both are here, per step of the chunk and dimension, with PSNR and
SSIM of the video that full denoising ends with.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np

from mvjax.evaluation.held_out import Window
from mvjax.evaluation.similarity import psnr, ssim
from mvjax.flow.sampler import Trajectory, advance, evaluations, start
from mvjax.policy.model import Inputs, VideoActionModel, Weights, medoid, to_pixels
from mvjax.policy.policy import Policy


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


def window_errors(
    policy: Policy, windows: Iterable[Window], stop_steps: Sequence[int]
) -> Iterator[tuple[Window, WindowErrors]]:
    """Every window with its errors, computed in batches of the policy.

    Args:
        policy: its sampling says the schedule; its stop step and mode are not used.
        windows: no more than a batch of them is held at a time.
        stop_steps: at which steps K of the schedule to read the video.
    """
    windows = iter(windows)
    while batch := list(islice(windows, policy.batch_size)):
        (full,) = policy.batches(batch)
        yield from zip(batch, _batch_errors(policy, full, stop_steps))


def _batch_errors(
    policy: Policy, batch: list[Window], stop_steps: Sequence[int]
) -> Iterator[WindowErrors]:
    model, clip, sigmas = policy.model, policy.model.clip, policy.model.sampling.sigmas
    inputs = policy.inputs([window.observation for window in batch], with_future=True)
    read_true, read_generated = [], []
    with policy.devices():
        clean = _encode(model, policy.weights, inputs.video)
        here = start(inputs.video_noise, sigmas)
        for k, (sigma, coefficients) in enumerate(zip(*evaluations(sigmas))):
            if k in stop_steps:
                noisy = clean + sigma * inputs.video_noise
                for video, chunks in ((noisy, read_true), (here.x, read_generated)):
                    act = _act(model, policy.weights, video, clean, sigma, inputs)
                    chunks.append(np.asarray(act))
            here = _step(model, policy.weights, here, clean, sigma, coefficients, inputs)
        made = np.asarray(_decode(policy.weights, here.x))[:, clip.observed_frames :]
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
def _step(
    model, weights: Weights, here: Trajectory, clean, sigma, coefficients, inputs: Inputs
) -> Trajectory:
    x0 = model.denoised(weights[1], here.x, clean, jnp.full((len(clean), 1), sigma), inputs.text)
    return Trajectory(advance(here.x, x0, here.previous, coefficients), x0)


@jax.jit
def _decode(weights: Weights, latents: jax.Array) -> jax.Array:
    return to_pixels(weights[0], latents)
