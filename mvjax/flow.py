"""The two-step Adams-Bashforth video sampler, and the noise of published runs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


class Trajectory(NamedTuple):
    """A video between noise and its end.

    Attributes:
        x: noisy latents [b, t, h, w, c].
        previous: the clean prediction one evaluation before; before the first one, zeros.
    """

    x: Array
    previous: Array


def step_coefficients(sigmas: np.ndarray) -> np.ndarray:
    """Coefficients (a, b, c) of x' = a x + b x0 + c x0_previous for every step, float64 [n, 3].

    The first step is Euler in x0 form; later ones are exponential two-step Adams-Bashforth in
    λ = -ln σ. Source: Cosmos-Predict2, `RectifiedFlowAB2Scheduler`, `res_x0_rk2_step`.
    """
    lam = -np.log(np.asarray(sigmas, np.float64))
    table = [(sigmas[1] / sigmas[0], 1 - sigmas[1] / sigmas[0], 0.0)]
    for previous, here, after in zip(lam, lam[1:], lam[2:]):
        h = after - here
        phi1 = np.expm1(-h) / -h
        phi2 = (phi1 - 1) / -h
        b2 = phi2 / ((previous - here) / h)
        table.append((np.exp(-h), h * (phi1 - b2), h * b2))
    return np.asarray(table, np.float64)


def evaluations(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Noise levels and coefficients of a whole run, the last clean prediction included.

    Args:
        sigmas: decreasing noise levels, float64 [steps + 1].

    Returns:
        The noise levels, float32 [steps + 1]; coefficients (a, b, c), float32 [steps + 1, 3]. The
        last row is (0, 1, 0): the sample is what the network predicts there.
    """
    table = np.concatenate([step_coefficients(sigmas), [(0.0, 1.0, 0.0)]])
    return sigmas.astype(np.float32), table.astype(np.float32)


def advance(x: Array, x0: Array, previous: Array, coefficients: Array) -> Array:
    """The sample at the next noise level, from the clean predictions here and one step before."""
    a, b, c = coefficients
    return a * x + b * x0 + c * previous


def sample_video(
    denoise: Callable[[Array, Array], Array], noise: Array, sigmas: np.ndarray, stop_step: int
) -> Array:
    """The noisy latents at σ[stop_step], reached by `stop_step` full evaluations.

    With stop_step = 0 nothing is denoised: the result is σ_max · noise, and one partial forward
    pass on it gives the plan. The evaluation at σ[stop_step] itself is the caller's: the partial
    pass of the policy, or the final clean prediction at stop_step = len(sigmas) - 1.

    Args:
        denoise: called with noisy latents and σ [b, 1]; returns the clean prediction.
        noise: standard normal [b, t, h, w, c].
        sigmas: decreasing noise levels, float64 [steps + 1].
        stop_step: between 0 and `steps`.
    """
    if not 0 <= stop_step < len(sigmas):
        raise ValueError(
            f"stop_step must be between 0 and {len(sigmas) - 1} (the number of sampling steps), "
            f"got {stop_step}."
        )
    return sample_on(denoise, start(noise, sigmas), sigmas, 0, stop_step).x


def start(noise: Array, sigmas: np.ndarray) -> Trajectory:
    """The trajectory before the first evaluation, from standard normal noise."""
    return Trajectory(noise * sigmas[0], jnp.zeros_like(noise))


def sample_on(
    denoise: Callable[[Array, Array], Array],
    here: Trajectory,
    sigmas: np.ndarray,
    first: int,
    last: int,
) -> Trajectory:
    """The trajectory after the evaluations `first`, ..., `last` - 1 of `evaluations(sigmas)`.

    Args:
        denoise: called with noisy latents and σ [b, 1]; returns the clean prediction.
        here: the trajectory before evaluation `first`.
        sigmas: decreasing noise levels, float64 [steps + 1].
        first, last: between 0 and steps + 1; after all steps + 1, x is the clean prediction.
    """
    if first == last:
        return here

    def step(here, inputs):
        sigma, coefficients = inputs
        x0 = denoise(here.x, jnp.full((len(here.x), 1), sigma))
        return Trajectory(advance(here.x, x0, here.previous, coefficients), x0), None

    inputs = tuple(jnp.asarray(array[first:last]) for array in evaluations(sigmas))
    return jax.lax.scan(step, here, inputs)[0]


def published_noise(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 noise of the release, the same on every machine.

    For video the published order of axes is channels first; noise [b, t, h, w, c] is drawn in that
    order and transposed.
    """
    draw = np.random.RandomState(seed).standard_normal
    if len(shape) != 5:
        return draw(shape).astype(np.float32)
    b, t, h, w, c = shape
    return draw((b, c, t, h, w)).astype(np.float32).transpose(0, 2, 3, 4, 1)


# Noise levels: distributions of σ (video) and τ (action) in training, the σ table of sampling.
#
# Everywhere τ = σ / (1 + σ); τ = 1 is pure noise, τ = 0 is clean.


Array = jax.Array
TAIL_SIGMA = (200.0, 1e5)


def flow_time(sigma: Array) -> Array:
    """τ = σ / (1 + σ)."""
    return sigma / (1 + sigma)


def sample_video_sigma(key: Array, batch: int, *, scale: float, tail: float) -> Array:
    """σ = scale · exp(N(0, 1)); with probability `tail` log-uniform on [200, 1e5] instead.

    The published scale is √(latent frames) = 4 and the published tail 0.05 (mimic-video release,
    `draw_video_sigma`; Cosmos-Predict2, `high_sigma_ratio`).

    Returns:
        float32 [batch, 1], shared by all frames of a sample.
    """
    normal, uniform, choice = jax.random.split(key, 3)
    sigma = scale * jnp.exp(jax.random.normal(normal, (batch, 1)))
    low, high = np.log(TAIL_SIGMA)
    extreme = jnp.exp(jax.random.uniform(uniform, (batch, 1), minval=low, maxval=high))
    return jnp.where(jax.random.bernoulli(choice, tail, (batch, 1)), extreme, sigma)


def sample_action_time(key: Array, batch: int, *, alpha: float, beta: float) -> Array:
    """t = 0.999 u + 0.001 with u ~ Beta(alpha, beta).

    The released configurations use Beta(1, 1), uniform; the paper's density ∝ √(t - 0.001) is
    Beta(1.5, 1) (mimic-video release, `schedulers/beta_scheduler.py`).

    Returns:
        float32 [batch, 1].
    """
    return 0.999 * jax.random.beta(key, alpha, beta, (batch, 1)) + 0.001


def karras_sigmas(
    steps: int, *, sigma_max: float = 80.0, sigma_min: float = 0.002, rho: float = 7.0
) -> np.ndarray:
    """The `steps` + 1 noise levels of sampling, from σ_max down to σ_min, float64.

    Karras et al. 2022, eq. 5; the release uses 35 steps.
    """
    if steps < 1:
        raise ValueError(f"Sampling needs at least one step, got {steps}.")
    ramp = np.arange(steps + 1, dtype=np.float64) / steps
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (top + ramp * (bottom - top)) ** rho


# Rectified flow of the action chunk: loss and ten-step Euler sampling (mimic-video release).


Array = jax.Array


def scale_noisy_actions(noisy: Array, time: Array) -> Array:
    """Divides (1 - t) x0 + t ε by its std √((1 - t)² + t²).

    Args:
        noisy: [b, horizon, dim].
        time: flow time [b, 1].
    """
    return noisy / jnp.sqrt((1 - time) ** 2 + time**2)[..., None]


def action_loss(
    velocity: Callable[[Array, Array], Array],
    actions: Array,
    noise: Array,
    time: Array,
    mask: Array | None = None,
) -> Array:
    """Mean squared error of the velocity ε - x0, per sample [b].

    Args:
        velocity: called with the scaled noisy actions and their time [b, 1].
        actions, noise: [b, horizon, dim].
        time: flow time [b, 1].
        mask: [b, horizon, dim], 1 where an action is to be learned and 0 elsewhere; None for all.
            The mean is over the former, and 0 for a sample that has none.
    """
    noisy = (1 - time)[..., None] * actions + time[..., None] * noise
    v = velocity(scale_noisy_actions(noisy, time), time)
    error = (v - (noise - actions)) ** 2
    if mask is None:
        return jnp.mean(error, axis=(1, 2))
    return (mask * error).sum(axis=(1, 2)) / jnp.maximum(mask.sum(axis=(1, 2)), 1)


def sample_actions(velocity: Callable[[Array, Array], Array], noise: Array, steps: int) -> Array:
    """Integrates from noise (t = 1) to actions (t = 0) with `steps` Euler steps.

    Args:
        velocity: as in `action_loss`.
        noise: [b, horizon, dim]; the sample keeps its dtype from step to step (the release's is
            bfloat16), while every step is computed in float32.
        steps: number of steps; the release uses 10.
    """
    # Summed in float32, as released: the decoder's time features have periods down to 0.004 and
    # are rounded to bfloat16, so a last digit of the time can turn into one of theirs.
    times = np.cumsum([1.0] + [-1 / steps] * (steps - 1), dtype=np.float32)

    def step(x, time):
        wide, time = x.astype(jnp.float32), jnp.full((x.shape[0], 1), time)
        wide -= velocity(scale_noisy_actions(wide, time), time) / steps
        return wide.astype(x.dtype), None

    return jax.lax.scan(step, noise, times)[0]


# Rectified flow of the video in its σ form, with frame-replacement conditioning.
#
# The network sees (1 - τ) (x0 + σ ε) = (1 - τ) x0 + τ ε and predicts the velocity ε - x0; the
# first latent frames are conditioning: they enter clean, with the time of σ = 1e-4 and a mask of
# ones, and their prediction is replaced by what they are. Source: Cosmos-Predict2,
# `RectifiedFlowScaling` and `pipelines/video2world.py:denoise`.


Array = jax.Array
CONDITION_SIGMA = 1e-4


class NetworkInput(NamedTuple):
    """What the video DiT is called with: latents, timesteps [b, t], condition mask [b, t]."""

    latents: Array
    timesteps: Array
    condition_mask: Array


def condition_mask(num_condition: Array, frames: int) -> Array:
    """1 for the first `num_condition` [b] of `frames` latent frames: float32 [b, frames]."""
    return (jnp.arange(frames) < num_condition[:, None]).astype(jnp.float32)


def network_input(noisy: Array, clean: Array, sigma: Array, mask: Array) -> NetworkInput:
    """Scales the noisy latents and puts the conditioning frames in.

    Args:
        noisy: x0 + σ ε, [b, t, h, w, c].
        clean: latents whose masked frames are the conditioning frames, [b, t, h, w, c].
        sigma: noise level [b, 1].
        mask: 1 for conditioning frames [b, t].
    """
    tau = flow_time(sigma)
    m = mask[:, :, None, None, None]
    latents = m * clean + (1 - m) * (1 - tau)[:, :, None, None, None] * noisy
    times = mask * flow_time(jnp.float32(CONDITION_SIGMA)) + (1 - mask) * tau
    return NetworkInput(latents, times, mask)


def clean_prediction(
    velocity: Array, noisy: Array, clean: Array, sigma: Array, mask: Array
) -> Array:
    """x0 = (1 - τ) x - τ v; conditioning frames are returned as they are."""
    tau = flow_time(sigma)[:, :, None, None, None]
    m = mask[:, :, None, None, None]
    return m * clean + (1 - m) * ((1 - tau) * noisy - tau * velocity)


def denoise(
    velocity: Callable[[NetworkInput], Array], noisy: Array, clean: Array, sigma: Array, mask: Array
) -> Array:
    """The network's prediction of the clean latents at noise level `sigma` [b, 1]."""
    v = velocity(network_input(noisy, clean, sigma, mask))
    return clean_prediction(v, noisy, clean, sigma, mask)


def loss_weight(sigma: Array) -> Array:
    """(1 + σ)² / σ², which makes the error of the clean prediction that of the velocity."""
    return ((1 + sigma) / sigma) ** 2


def video_loss(x0: Array, prediction: Array, sigma: Array) -> Array:
    """Mean over all elements of (1 + σ)² / σ² (x0 - prediction)², per sample [b].

    Equal to the squared velocity error; conditioning frames count as zeros in the mean, as
    published.
    """
    return loss_weight(sigma)[:, 0] * jnp.mean((x0 - prediction) ** 2, axis=(1, 2, 3, 4))


# How a query to the policy is answered.


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

    def __post_init__(self):
        if not 0 <= self.stop_step <= self.video_steps:
            raise ValueError(
                f"stop_step must be between 0 and video_steps = {self.video_steps}, got "
                f"{self.stop_step}."
            )
        for name in ("draws", "action_steps"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"The policy's {name} must be at least 1, got {getattr(self, name)}."
                )

    @cached_property
    def sigmas(self) -> np.ndarray:
        """Noise levels of the video, float64 [video_steps + 1]."""
        return karras_sigmas(self.video_steps, sigma_max=self.sigma_max, sigma_min=self.sigma_min)

    @property
    def stop_sigma(self) -> float:
        """σ_K, the noise level at which the plan is read."""
        return float(self.sigmas[self.stop_step])

    @property
    def evaluations(self) -> int:
        """Evaluations of the network for a whole video: the steps and the clean prediction."""
        return self.video_steps + 1
