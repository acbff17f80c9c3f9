import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from mvjax.training.step import make_optimizer, make_schedule


def config(**changes):
    base = dict(
        learning_rate=1.0,
        schedule="constant",
        warmup_steps=0,
        decay_steps=0,
        final_fraction=0.0,
        b1=0.9,
        b2=0.99,
        eps=1e-8,
        weight_decay=0.1,
        clip_norm=10.0,
        mu_dtype="",
    )
    return ml_collections.ConfigDict({**base, **changes})


def test_linear_schedule_has_the_release_values():
    """LambdaLinear of the action stage: warm-up 1000, floor 0.2 at 500,000, lr 1e-4."""
    settings = dict(schedule="linear", warmup_steps=1000, decay_steps=500_000, final_fraction=0.2)
    schedule = make_schedule(config(learning_rate=1e-4, **settings))
    expected = {0: 1e-10, 500: 0.5e-4, 14_000: 0.9776e-4, 50_000: 0.92e-4, 500_000: 0.2e-4}
    for step, value in {**expected, 900_000: 0.2e-4}.items():
        assert float(schedule(step)) == pytest.approx(value, rel=1e-5)


def test_cosine_and_constant_schedules():
    cosine = make_schedule(
        config(schedule="cosine", warmup_steps=100, decay_steps=300, final_fraction=0.02)
    )
    values = [float(cosine(step)) for step in (50, 100, 200, 300, 400)]
    np.testing.assert_allclose(values, [0.5, 1.0, 0.51, 0.02, 0.02], rtol=1e-5)
    constant = make_schedule(config(warmup_steps=10))
    np.testing.assert_allclose([float(constant(5)), float(constant(99))], [0.5, 1.0], rtol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [({"schedule": "lineer"}, "'lineer'"), ({"schedule": "cosine"}, "decay_steps is 0")],
)
def test_wrong_schedules_are_explained(changes, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(config(**changes))


def numpy_adamw(params, grads_per_step, lr, b1, b2, eps, decay, clip):
    """AdamW as in Loshchilov & Hutter with the release's global-norm clipping."""
    m = {k: np.zeros_like(v) for k, v in params.items()}
    v = {k: np.zeros_like(p) for k, p in params.items()}
    for t, grads in enumerate(grads_per_step, start=1):
        norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        for k in params:
            g = grads[k] * min(1.0, clip / norm)
            m[k] = b1 * m[k] + (1 - b1) * g
            v[k] = b2 * v[k] + (1 - b2) * g**2
            step = (m[k] / (1 - b1**t)) / (np.sqrt(v[k] / (1 - b2**t)) + eps)
            params[k] = params[k] - lr * (step + decay * params[k])
    return params


def test_updates_equal_the_textbook_with_decay_on_every_parameter():
    rng = np.random.default_rng(0)
    start = {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)}
    grads = [{k: 5 * s * rng.normal(size=p.shape) for k, p in start.items()} for s in (1, 0.1, 3)]
    optimizer = make_optimizer(config(learning_rate=0.03, clip_norm=2.0))
    params = jax.tree.map(jnp.asarray, start)
    state = optimizer.init(params)
    for g in grads:
        updates, state = optimizer.update(jax.tree.map(jnp.asarray, g), state, params)
        params = optax.apply_updates(params, updates)
    expected = numpy_adamw(dict(start), grads, 0.03, 0.9, 0.99, 1e-8, 0.1, 2.0)
    for name in start:
        np.testing.assert_allclose(params[name], expected[name], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])  # the norm of the last one overflows
def test_a_step_with_a_nonfinite_norm_changes_nothing_and_is_counted(bad):
    optimizer = make_optimizer(config())
    params, good = {"w": jnp.ones(2)}, {"w": jnp.array([1.0, -1.0])}
    _, state = optimizer.update(good, optimizer.init(params), params)
    updates, skipped = optimizer.update({"w": jnp.array([1.0, bad])}, state, params)
    assert not np.any(updates["w"])
    jax.tree.map(np.testing.assert_array_equal, skipped.inner, state.inner)
    assert (int(skipped.skipped), int(skipped.skipped_in_a_row)) == (1, 1)
    _, after = optimizer.update(good, skipped, params)
    assert (int(after.skipped), int(after.skipped_in_a_row)) == (1, 0)


def test_the_first_moment_in_bfloat16_takes_half_the_memory_and_changes_little():
    rng = np.random.default_rng(1)
    params = {"kernel": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)}
    grads = [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params) for _ in "123"]
    ends = []
    for dtype in ("", "bfloat16"):
        optimizer = make_optimizer(config(learning_rate=0.1, weight_decay=0.0, mu_dtype=dtype))
        now, state = params, optimizer.init(params)
        for g in grads:
            updates, state = optimizer.update(g, state, now)
            now = optax.apply_updates(now, updates)
        moments = state.inner[1]
        assert moments.mu["kernel"].dtype == (dtype or "float32")
        assert moments.nu["kernel"].dtype == now["kernel"].dtype == "float32"
        ends.append(now["kernel"])
    moved = np.linalg.norm(ends[0] - params["kernel"])
    assert 0 < np.linalg.norm(ends[1] - ends[0]) < 0.01 * moved
    with pytest.raises(ValueError, match="mu_dtype is 'float16'"):
        make_optimizer(config(mu_dtype="float16"))
