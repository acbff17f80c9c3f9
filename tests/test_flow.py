"""Losses and samplers, beside the published numbers in `test_networks.py`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvjax.flow import (
    Sampling,
    action_loss,
    advance,
    condition_mask,
    denoise,
    network_input,
    sample_video,
    schedule,
    start,
    video_loss,
)

SAMPLES, HORIZON, DIM = 6, 4, 3
RNG = np.random.default_rng(0)
ACTIONS, NOISE = RNG.normal(size=(2, SAMPLES, HORIZON, DIM)).astype(np.float32)
TIME = RNG.uniform(0.1, 0.9, (SAMPLES, 1)).astype(np.float32)
WEIGHT = jnp.asarray(RNG.normal(size=(DIM, DIM)).astype(np.float32))
MASK = (RNG.random((SAMPLES, HORIZON, DIM)) < 0.6).astype(np.float32)
MASK[2] = 0  # of a dataset without actions


def losses(mask, actions=ACTIONS, weight=WEIGHT, of=slice(None)):
    # Every number is predicted from itself alone, so that what is masked cannot be seen at all.
    def velocity(noisy, time):
        return noisy * jnp.diag(weight) + time[..., None]

    mask = None if mask is None else mask[of]
    return action_loss(velocity, actions[of], NOISE[of], TIME[of], mask)


def test_a_mask_of_ones_changes_nothing():
    np.testing.assert_allclose(losses(np.ones_like(MASK)), losses(None), rtol=1e-6)


def test_the_mean_is_over_what_is_learned():
    error = losses(MASK)
    for row in range(SAMPLES):
        singles = [
            losses(np.eye(HORIZON * DIM)[k].reshape(1, HORIZON, DIM) * np.ones_like(MASK))[row]
            for k in np.flatnonzero(MASK[row])
        ]
        np.testing.assert_allclose(error[row], np.mean(singles) if singles else 0.0, rtol=1e-5)
    assert error[2] == 0


def test_what_is_masked_is_seen_neither_by_the_loss_nor_by_its_gradient():
    other = np.where(MASK > 0, ACTIONS, 1e6)

    def mean(weight, actions):
        return losses(MASK, actions, weight).mean()

    ours, theirs = (jax.value_and_grad(mean)(WEIGHT, actions) for actions in (ACTIONS, other))
    chex.assert_trees_all_equal(ours, theirs)


def test_a_batch_is_the_mean_of_its_parts():
    """So that neither accumulation nor the split over devices changes what is learned."""
    halves = [losses(MASK, of=slice(part, None, 2)).mean() for part in range(2)]
    np.testing.assert_allclose(np.mean(halves), losses(MASK).mean(), rtol=1e-6)


def clean(x, sigma):
    """A denoiser whose prediction depends on the noise level, so that the order of steps shows."""
    return jnp.tanh(x / (1 + sigma[..., None, None, None])) - 0.1


SIGMAS = Sampling(video_steps=5).sigmas
VIDEO_NOISE = RNG.normal(size=(2, 3, 4, 4, 1)).astype(np.float32)


def test_the_loop_is_the_step_repeated():
    here = start(VIDEO_NOISE, SIGMAS)
    for sigma, coefficients in zip(*schedule(SIGMAS)):
        here = advance(here, clean(here.x, jnp.full((2, 1), sigma)), coefficients)
    ours = sample_video(clean, start(VIDEO_NOISE, SIGMAS), SIGMAS)
    chex.assert_trees_all_close(ours, here, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(ours.x, ours.previous)  # its end is the last clean prediction


@pytest.mark.parametrize("stop", [0, 1, 5, 6])
def test_a_video_that_stopped_goes_on_to_the_same_end(stop):
    here = sample_video(clean, start(VIDEO_NOISE, SIGMAS), SIGMAS, last=stop)
    end = sample_video(clean, here, SIGMAS, first=stop)
    whole = sample_video(clean, start(VIDEO_NOISE, SIGMAS), SIGMAS)
    chex.assert_trees_all_close(end, whole, rtol=1e-6, atol=1e-6)
    if stop == 0:
        np.testing.assert_allclose(here.x, 80 * VIDEO_NOISE, rtol=1e-6)


@pytest.mark.parametrize("steps", [dict(last=7), dict(first=3, last=2), dict(first=-1)])
def test_steps_that_a_schedule_does_not_have_are_refused(steps):
    with pytest.raises(ValueError, match="6 evaluations cannot be denoised"):
        sample_video(clean, start(VIDEO_NOISE, SIGMAS), SIGMAS, **steps)


@pytest.mark.parametrize(
    "fields", [dict(stop_step=36), dict(draws=0), dict(action_steps=0), dict(sigma_max=0.001)]
)
def test_impossible_sampling_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Sampling(**fields)


def test_shapes_that_would_broadcast_are_refused():
    """Each of these computes something without the checks, and trains or samples it in silence."""
    x, sigma, mask = jnp.ones((2, 3, 4, 4, 1)), jnp.ones((2, 1)), condition_mask(jnp.ones(2), 3)
    network_input(x, x, sigma, mask)
    for wrong in ((x[:, :1], x, sigma, mask), (x, x[:1], sigma, mask), (x, x, sigma[:1], mask)):
        with pytest.raises(AssertionError, match="shape"):
            network_input(*wrong)
    with pytest.raises(AssertionError, match="shape"):
        denoise(lambda i: i.latents, x, x, sigma, mask[:, :1])
    with pytest.raises(AssertionError, match="shape"):
        video_loss(x, x[:, :1], sigma)
    with pytest.raises(AssertionError, match="shape"):
        action_loss(lambda a, t: a[..., :1], ACTIONS, NOISE, TIME)
    with pytest.raises(AssertionError, match="shape"):
        losses(MASK[:, :1])
