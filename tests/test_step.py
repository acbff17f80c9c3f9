"""The training step: micro-batches, learning-rate schedules, optimizer."""

import json
from functools import partial

import forked
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from run_records import without_times
from test_objectives import random_params
from test_train import params_of
from tiny_stages import build_stage, tiny_batch, tiny_config
from toy_training import toy_config, toy_loader, train_toy

from mvjax.models.network import merge, split
from mvjax.parallel import make_rules, use_rules
from mvjax.training.checkpoint import leaf_paths
from mvjax.training.metrics import read_records
from mvjax.training.step import make_optimizer, make_schedule, mean_gradient

pytestmark = pytest.mark.usefixtures("quickly")


def test_loss_metrics_and_gradient_of_a_real_stage_are_equal():
    config = tiny_config("video")
    config.lora.update(rank=4, alpha=8.0)
    stage, rules = build_stage(config)[0], make_rules(config.rules)
    batch, params = tiny_batch(config), random_params(stage)
    batch = {name: batch[name] for name in stage.batch_axes}
    trainable, fixed = split(params, stage.trainable)
    axes, _ = split(stage.axes, stage.trainable)
    draws = jax.jit(stage.draw)(batch, jax.random.key(2))

    @partial(jax.jit, static_argnums=0)
    def of(count, trainable, fixed, frozen, batch, draws):
        def gradient(trainable, batch, draws):
            def loss(trainable):
                return stage.objective(merge(fixed, trainable), frozen, batch, draws)

            return jax.value_and_grad(loss, has_aux=True)(trainable)

        with use_rules(rules):
            return mean_gradient(gradient, trainable, axes, batch, draws, stage.batch_axes, count)

    arguments = trainable, fixed, stage.frozen, batch, draws
    ((loss, metrics), grads), ((loss4, metrics4), grads4) = of(1, *arguments), of(4, *arguments)
    np.testing.assert_allclose(loss4, loss, rtol=1e-5)
    assert metrics4.keys() == metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(metrics4[name], value, rtol=1e-5, err_msg=name)
    assert metrics["by_level"][1].sum() == len(batch["text"])
    grads, grads4 = leaf_paths(grads), leaf_paths(grads4)
    assert len(grads) > 10
    whole = np.sqrt(sum(np.sum(np.square(g)) for g in grads.values()))
    for name, g in grads.items():
        difference = np.linalg.norm(grads4[name] - g)
        assert difference <= 1e-5 * np.linalg.norm(g) + 1e-7 * whole, name


def test_whole_runs_are_equal_also_on_eight_devices(tmp_path):
    with forked.Program("accumulation_meshes", tmp_path / "eight", devices=8) as eight:
        for count in (1, 4):
            config = toy_config(steps=3, batch_size=16, accumulate=count)
            train_toy(tmp_path / str(count), config, loader=toy_loader(16))
        assert eight.wait() == 0, eight.err
    expected = without_times(read_records(tmp_path / "1"))
    for name in ("4", "eight"):
        records = without_times(read_records(tmp_path / name))
        assert [r["step"] for r in records] == [1, 2, 3]
        for ours, theirs in zip(records, expected):
            for key in ("loss", "grad_norm", "update_norm", "param_norm", "learning_rate"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (name, key)


class SpoiledOnce:
    """The toy loader with one sample of the second batch turned into NaN."""

    def __init__(self):
        self._loader, self._given = toy_loader(), 0

    def __iter__(self):
        return self

    def __next__(self):
        batch, self._given = next(self._loader), self._given + 1
        if self._given == 2:
            batch["tokens"] = batch["tokens"].copy()
            batch["tokens"][5] = np.nan
        return batch

    def get_state(self):
        return self._loader.get_state()


def test_one_bad_sample_skips_the_step_of_all_micro_batches(tmp_path):
    config = toy_config(steps=3, accumulate=4, checkpoint_every=1, keep=3)
    train_toy(tmp_path, config, loader=SpoiledOnce())
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["skipped"] for r in records] == [0, 1, 1]
    assert records[1]["loss"] is None and records[1]["update_norm"] == 0
    assert records[1]["param_norm"] == records[0]["param_norm"] != records[2]["param_norm"]
    for use_ema in (False, True):
        first, second, third = (params_of(tmp_path, use_ema, step) for step in (1, 2, 3))
        jax.tree.map(np.testing.assert_array_equal, second, first)
        assert not np.array_equal(third["up"]["kernel"], second["up"]["kernel"])


@pytest.mark.parametrize(
    ("accumulate", "message"),
    [
        (3, "batch_size is 8; it must be a multiple of 3, training.accumulate = 3"),
        (0, "training.accumulate must be a whole number of at least 1"),
    ],
)
def test_a_batch_that_cannot_be_split_is_explained(tmp_path, accumulate, message):
    with pytest.raises(ValueError, match=message):
        train_toy(tmp_path, toy_config(accumulate=accumulate))


def test_gradients_of_bfloat16_parameters_are_summed_in_float32():
    params = {"w": jnp.ones((4,), jnp.bfloat16)}
    batch = {"x": jnp.asarray([[1.0] * 4] + [[1e-3] * 4] * 63, jnp.float32)}

    def gradient(params, batch, draws):
        def loss(params):
            return jnp.mean(batch["x"] * params["w"].astype(jnp.float32)), {}

        return jax.value_and_grad(loss, has_aux=True)(params)

    axes = {"w": (None,)}
    _, grads = mean_gradient(gradient, params, axes, batch, {}, {"x": ("batch", None)}, 64)
    assert grads["w"].dtype == jnp.float32
    np.testing.assert_allclose(grads["w"], (1 + 63e-3) / 64 / 4, rtol=2e-3)


def optimizer_config(**changes):
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
    schedule = make_schedule(optimizer_config(learning_rate=1e-4, **settings))
    expected = {0: 1e-10, 500: 0.5e-4, 14_000: 0.9776e-4, 50_000: 0.92e-4, 500_000: 0.2e-4}
    for step, value in {**expected, 900_000: 0.2e-4}.items():
        assert float(schedule(step)) == pytest.approx(value, rel=1e-5)


def test_cosine_and_constant_schedules():
    cosine = make_schedule(
        optimizer_config(schedule="cosine", warmup_steps=100, decay_steps=300, final_fraction=0.02)
    )
    values = [float(cosine(step)) for step in (50, 100, 200, 300, 400)]
    np.testing.assert_allclose(values, [0.5, 1.0, 0.51, 0.02, 0.02], rtol=1e-5)
    constant = make_schedule(optimizer_config(warmup_steps=10))
    np.testing.assert_allclose([float(constant(5)), float(constant(99))], [0.5, 1.0], rtol=1e-5)


def test_a_schedule_that_ends_in_its_warm_up_is_explained():
    with pytest.raises(ValueError, match="decay_steps is 0"):
        make_schedule(optimizer_config(schedule="cosine"))


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
    optimizer = make_optimizer(optimizer_config(learning_rate=0.03, clip_norm=2.0))
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
    optimizer = make_optimizer(optimizer_config())
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
        optimizer = make_optimizer(
            optimizer_config(learning_rate=0.1, weight_decay=0.0, mu_dtype=dtype)
        )
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
