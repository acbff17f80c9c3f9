"""The two-step Adams-Bashforth video sampler, and the noise of published runs."""

from collections.abc import Callable
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
