"""The loss over the numbers of a chunk that are to be learned."""

import jax
import jax.numpy as jnp
import numpy as np

from mvjax.flow import action_loss

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

    for ours, theirs in zip(*(jax.value_and_grad(mean)(WEIGHT, a) for a in (ACTIONS, other))):
        np.testing.assert_array_equal(ours, theirs)


def test_a_batch_is_the_mean_of_its_parts():
    """So that neither accumulation nor the split over devices changes what is learned."""
    halves = [losses(MASK, of=slice(part, None, 2)).mean() for part in range(2)]
    np.testing.assert_allclose(np.mean(halves), losses(MASK).mean(), rtol=1e-6)
