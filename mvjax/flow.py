"""The method on one page: rectified flow of the video and of the action chunk.

Clean data x0 and Gaussian noise ε are joined by a straight line, (1 - τ) x0 + τ ε: τ = 0 is clean,
τ = 1 is noise. A network sees a point of the line and predicts the velocity ε - x0 along it.

The video is kept in σ form, x = x0 + σ ε with τ = σ / (1 + σ); then (1 - τ) x is the point on the
line. Its first latent frames are observed: they enter clean, with the time of σ = 1e-4 and a mask
of ones, and what is predicted for them is replaced by what they are (Cosmos-Predict2,
`RectifiedFlowScaling` and `pipelines/video2world.py:denoise`). Views beside the video, such as a
wrist camera, enter like such frames and are never predicted: they have no noise and no loss. The
actions are kept on the line itself and scaled to unit variance for the network (mimic-video
release).

In the order of this file: noise levels; the video's loss; how a video is sampled (`sample_video` is
the one denoising loop); the actions' loss and how they are sampled, also as the continuation of a
chunk that is still being executed; the settings of a query.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mvjax.chunking import CHUNKING, Pending, guided_velocity

Array = jax.Array
Views = Mapping[str, Array]  # clean latents [b, t', h', w', c] of observed views by their names

TAIL_SIGMA = (200.0, 1e5)  # the range of the extreme noise levels in training
CONDITION_SIGMA = 1e-4  # the noise level that observed frames are said to have


# --- Noise levels ---


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
    # Without the tail, σ of 80 and more, where sampling starts, would be one sample in 700.
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


# --- Video: what the network sees, what it predicts, the loss ---


class ObservedView(NamedTuple):
    """What the video DiT sees of a view: clean latents [b, t', h', w', c], their time [b, 1]."""

    latents: Array
    time: Array


class NetworkInput(NamedTuple):
    """What the video DiT is called with.

    Attributes:
        latents: of the video [b, t, h, w, c].
        timesteps: of every latent frame [b, t].
        condition_mask: 1 for conditioning frames [b, t].
        views: what is observed beside the video, by name.
    """

    latents: Array
    timesteps: Array
    condition_mask: Array
    views: Mapping[str, ObservedView]


def condition_mask(num_condition: Array, frames: int) -> Array:
    """1 for the first `num_condition` [b] of `frames` latent frames: float32 [b, frames]."""
    return (jnp.arange(frames) < num_condition[:, None]).astype(jnp.float32)


def network_input(
    noisy: Array, clean: Array, sigma: Array, mask: Array, views: Views | None = None
) -> NetworkInput:
    """Scales the noisy latents and puts the conditioning frames and the views in.

    Args:
        noisy: x0 + σ ε, [b, t, h, w, c].
        clean: latents whose masked frames are the conditioning frames, [b, t, h, w, c].
        sigma: noise level [b, 1].
        mask: 1 for conditioning frames [b, t].
        views: clean latents [b, t', h', w', c] of every observed view by its name; None for none.
    """
    # A wrong shape would broadcast here, and train or sample something else in silence.
    chex.assert_equal_shape([noisy, clean])
    chex.assert_shape(sigma, (len(noisy), 1))
    chex.assert_shape(mask, noisy.shape[:2])
    tau = flow_time(sigma)
    m = mask[:, :, None, None, None]
    # Times 1 - τ = 1 / (1 + σ), so that the network's input is of order one at every noise level.
    latents = m * clean + (1 - m) * (1 - tau)[:, :, None, None, None] * noisy
    observed = flow_time(jnp.float32(CONDITION_SIGMA))
    times = mask * observed + (1 - mask) * tau
    seen = {
        name: ObservedView(view, jnp.full((len(view), 1), observed))
        for name, view in (views or {}).items()
    }
    return NetworkInput(latents, times, mask, seen)


def observed_input(observed: Array, views: Views | None = None) -> NetworkInput:
    """`network_input` of the observed latent frames alone, [b, condition latents, h, w, c].

    All of them are clean, so there is no noise level.
    """
    sigma = jnp.full((len(observed), 1), CONDITION_SIGMA)
    return network_input(observed, observed, sigma, jnp.ones(observed.shape[:2]), views)


def denoise(
    velocity: Callable[[NetworkInput], Array],
    noisy: Array,
    clean: Array,
    sigma: Array,
    mask: Array,
    views: Views | None = None,
) -> Array:
    """The clean latents that the network predicts, x0 = (1 - τ) x - τ v.

    Conditioning frames are returned as they are. Arguments as for `network_input`.
    """
    v = velocity(network_input(noisy, clean, sigma, mask, views))
    # From x = x0 + σ ε and v = ε - x0, with 1 - τ = 1 / (1 + σ).
    tau = flow_time(sigma)[:, :, None, None, None]
    m = mask[:, :, None, None, None]
    return m * clean + (1 - m) * ((1 - tau) * noisy - tau * v)


def loss_weight(sigma: Array) -> Array:
    """(1 + σ)² / σ², which makes the error of the clean prediction that of the velocity."""
    return ((1 + sigma) / sigma) ** 2


def video_loss(x0: Array, prediction: Array, sigma: Array) -> Array:
    """Mean over all elements of (1 + σ)² / σ² (x0 - prediction)², per sample [b].

    Equal to the squared velocity error; conditioning frames count as zeros in the mean, as
    published.
    """
    chex.assert_equal_shape([x0, prediction])
    chex.assert_shape(sigma, (len(x0), 1))
    return loss_weight(sigma)[:, 0] * jnp.mean((x0 - prediction) ** 2, axis=(1, 2, 3, 4))


# --- Video: from noise to the clip, or part of the way ---


class Trajectory(NamedTuple):
    """A video between noise and its end.

    Attributes:
        x: noisy latents [b, t, h, w, c].
        previous: the clean prediction one evaluation before; before the first one, zeros.
    """

    x: Array
    previous: Array


def start(noise: Array, sigmas: np.ndarray) -> Trajectory:
    """The trajectory before the first evaluation, from standard normal noise [b, t, h, w, c]."""
    return Trajectory(noise * np.float32(sigmas[0]), jnp.zeros_like(noise))


def schedule(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The noise level of every evaluation and the coefficients (a, b, c) of the step after it.

    A step is x' = a x + b x0 + c x0_previous. The first is Euler in x0 form; later ones are
    exponential two-step Adams-Bashforth in λ = -ln σ (Cosmos-Predict2, `RectifiedFlowAB2Scheduler`,
    `res_x0_rk2_step`).

    Args:
        sigmas: decreasing noise levels, float64 [steps + 1].

    Returns:
        The noise levels, float32 [steps + 1]; the coefficients, float32 [steps + 1, 3].
    """
    # In float64: near the end h is small and phi1 - 1 would lose most of its digits.
    lam = -np.log(np.asarray(sigmas, np.float64))
    table = [(sigmas[1] / sigmas[0], 1 - sigmas[1] / sigmas[0], 0.0)]
    for previous, here, after in zip(lam, lam[1:], lam[2:]):
        h = after - here
        phi1 = np.expm1(-h) / -h
        phi2 = (phi1 - 1) / -h
        b2 = phi2 / ((previous - here) / h)
        table.append((np.exp(-h), h * (phi1 - b2), h * b2))
    table.append((0.0, 1.0, 0.0))  # the sample is the network's prediction at the last level
    return sigmas.astype(np.float32), np.asarray(table, np.float64).astype(np.float32)


def advance(here: Trajectory, x0: Array, coefficients: Array) -> Trajectory:
    """One step of `schedule`, from the clean prediction x0 at the present noise level.

    Arithmetic alone, so that it serves the loop below, a caller who wants to see every step, and
    the PyTorch peer.
    """
    a, b, c = coefficients
    return Trajectory(a * here.x + b * x0 + c * here.previous, x0)


def sample_video(
    denoiser: Callable[[Array, Array], Array],
    here: Trajectory,
    sigmas: np.ndarray,
    first: int = 0,
    last: int | None = None,
) -> Trajectory:
    """The denoising loop: makes the evaluations `first`, ..., `last` - 1 of `schedule(sigmas)`.

    `last` = K stops at σ_K, where the policy reads the video with one partial pass of its own
    (K = 0: nothing is denoised); by default the video is denoised to its end, and the result's `x`
    is the clean prediction at σ_min. What stopped can go on with `first` = K.

    Args:
        denoiser: called with noisy latents and σ [b, 1]; returns the clean prediction.
        here: `start(noise, sigmas)`, or what an earlier call returned.
        sigmas: decreasing noise levels, float64 [steps + 1].
        first, last: between 0 and steps + 1.
    """
    last = len(sigmas) if last is None else last
    if not 0 <= first <= last <= len(sigmas):
        raise ValueError(
            f"A video of {len(sigmas)} evaluations cannot be denoised from {first} to {last}."
        )

    def step(here: Trajectory, inputs: tuple[Array, Array]) -> tuple[Trajectory, None]:
        sigma, coefficients = inputs
        x0 = denoiser(here.x, jnp.full((len(here.x), 1), sigma))
        return advance(here, x0, coefficients), None

    # A scan, so that the network is compiled once and not once per step. An empty one would still
    # compile it.
    inputs = tuple(jnp.asarray(array[first:last]) for array in schedule(sigmas))
    return here if first == last else jax.lax.scan(step, here, inputs)[0]


# --- Actions: the loss, and ten Euler steps ---


def scale_noisy_actions(noisy: Array, time: Array) -> Array:
    """Divides (1 - t) x0 + t ε by its std √((1 - t)² + t²).

    Args:
        noisy: [b, horizon, dim].
        time: flow time [b, 1], or of every action [b, horizon].
    """
    return noisy / jnp.sqrt((1 - time) ** 2 + time**2)[..., None]


def action_loss(
    velocity: Callable[[Array, Array], Array],
    actions: Array,
    noise: Array,
    time: Array,
    mask: Array | None = None,
    prefix: Array | None = None,
) -> Array:
    """Mean squared error of the velocity ε - x0, per sample [b].

    Args:
        velocity: called with the scaled noisy actions and their time [b, 1], with a prefix [b,
            horizon].
        actions, noise: [b, horizon, dim].
        time: flow time [b, 1].
        mask: [b, horizon, dim], 1 where an action is to be learned and 0 elsewhere; None for all.
            The mean is over the former, and 0 for a sample that has none.
        prefix: how many actions at the chunk's beginning are given, [b]: they are clean, at time 0,
            and not learned (Black et al. 2025, arXiv 2512.05964); None for none.
    """
    if prefix is not None:
        chex.assert_shape([time, prefix], [(len(actions), 1), (len(actions),)])
        given = jnp.arange(actions.shape[1]) < prefix[:, None]
        time = jnp.where(given, 0.0, time)
        learned = jnp.broadcast_to(1.0 - given[..., None], actions.shape)
        mask = learned if mask is None else mask * learned
    noisy = (1 - time)[..., None] * actions + time[..., None] * noise
    v = velocity(scale_noisy_actions(noisy, time), time)
    # As in `network_input`: each of these would broadcast.
    chex.assert_equal_shape([v, actions, noise] + ([] if mask is None else [mask]))
    chex.assert_shape(time, (len(actions), 1 if prefix is None else actions.shape[1]))
    error = (v - (noise - actions)) ** 2
    if mask is None:
        return jnp.mean(error, axis=(1, 2))
    # A mean per sample, so that a batch is the mean of its parts however it is split.
    return (mask * error).sum(axis=(1, 2)) / jnp.maximum(mask.sum(axis=(1, 2)), 1)


def euler_times(steps: int) -> np.ndarray:
    """Flow times at which `sample_actions` evaluates the velocity: 1, ..., 1 / steps."""
    # Summed in float32, as released: the decoder's time features have periods down to 0.004 and
    # are rounded to bfloat16, so a last digit of the time can turn into one of theirs.
    return np.cumsum([1.0] + [-1 / steps] * (steps - 1), dtype=np.float32)


def sample_actions(
    velocity: Callable[[Array, Any], Array],
    noise: Array,
    steps: int,
    levels: Any = None,
    *,
    chunking: str = "none",
    pending: Pending | None = None,
) -> Array:
    """Integrates from noise (t = 1) to actions (t = 0) with `steps` Euler steps.

    Args:
        velocity: as in `action_loss`.
        noise: [b, horizon, dim]; the sample keeps its dtype from step to step (the release's is
            bfloat16), while every step is computed in float32.
        steps: number of steps; the release uses 10.
        levels: arrays [steps, ...], of which `velocity` gets a step's entry in place of the time:
            what it has computed from all `euler_times` at once.
        chunking: one of `CHUNKING`: how the chunk continues what is pending. With "prefix" the
            velocity is called with the time of every action [b, horizon].
        pending: needed unless that is "none".

    Returns:
        [b, horizon, dim] in the dtype of the noise; with "prefix" float32, whose actions that are
        executed meanwhile are those of `pending` to the last bit.
    """
    if chunking == "prefix":
        held = pending.held

        def given(x: Array) -> Array:
            return jnp.where(held[..., None], pending.actions, x)

    def step(x, time_and_level):
        moment, level = time_and_level
        wide, time = x.astype(jnp.float32), jnp.full((x.shape[0], 1), moment)
        if chunking == "prefix":
            wide, time = given(wide), jnp.where(held, 0.0, time)

        def at(wide: Array) -> Array:
            return velocity(scale_noisy_actions(wide, time), time if levels is None else level)

        guided = chunking == "guided"
        wide -= (guided_velocity(at, wide, moment, pending) if guided else at(wide)) / steps
        return wide.astype(x.dtype), None

    end = jax.lax.scan(step, noise, (euler_times(steps), levels))[0]
    return given(end.astype(jnp.float32)) if chunking == "prefix" else end


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
        fresh_noise: draw new noise at every query, from the seed and the query's name
            (`Observation.noise_key`); the published policy takes the same noise at every query, so
            the error that noise brings repeats.
        draws: action chunks sampled per query; the one nearest to all others (the medoid) is
            executed. They share one context, so a draw costs ten small Euler steps (published: 1).
        chunking: how a chunk continues the one that the robot is executing meanwhile
            (`Observation.pending`): "none" (published) does not know it; "prefix" begins with its
            actions, for a decoder trained with `flow.prefix`; "guided" turns the Euler steps
            towards it, for any decoder, at about three times their cost.
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
    chunking: str = "none"

    def __post_init__(self):
        if self.chunking not in CHUNKING:
            raise ValueError(
                f"sampler.chunking must be one of {', '.join(CHUNKING)}, got {self.chunking!r}."
            )
        if not 0 <= self.stop_step <= self.video_steps:
            raise ValueError(
                f"stop_step must be between 0 and video_steps = {self.video_steps}, got "
                f"{self.stop_step}."
            )
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                "Noise levels must go down, from sigma_max to a positive sigma_min; got sigma_max "
                f"{self.sigma_max} and sigma_min {self.sigma_min}."
            )
        if self.draws < 1 or self.action_steps < 1:
            raise ValueError(
                f"draws and action_steps must be at least 1, got draws={self.draws} and "
                f"action_steps={self.action_steps}."
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
    def identity(self) -> dict[str, Any]:
        """The fields, for the identity of results; those that earlier versions lack if they act."""
        fields = asdict(self)
        if self.chunking == "none":
            del fields["chunking"]
        return fields

    @property
    def evaluations(self) -> int:
        """Evaluations of the network for a whole video: the steps, and one at the last level."""
        return self.video_steps + 1
