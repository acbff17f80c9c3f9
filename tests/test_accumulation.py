"""Micro-batches in turn give the step of the whole batch."""

import json
from functools import partial

import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_records import without_times
from test_loop import params_of
from tiny_stages import build_stage, tiny_batch, tiny_config
from toy_training import toy_config, toy_loader, toy_stage

from mvjax.experiment import Experiment
from mvjax.models.network import merge, split
from mvjax.parallel import make_rules, use_rules
from mvjax.training.checkpoint import leaf_paths
from mvjax.training.metrics import read_records
from mvjax.training.step import mean_gradient
from mvjax.training.train import train

pytestmark = pytest.mark.usefixtures("quickly")


def random_params(stage):
    """Parameters of a network that has left its start, where adapters and modulations are zero."""
    rng, params = np.random.default_rng(0), jax.jit(stage.init)(jax.random.key(1))
    return jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), params)


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
            train(
                Experiment.from_config(config), toy_stage(), toy_loader(16), tmp_path / str(count)
            )
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
    train(Experiment.from_config(config), toy_stage(), SpoiledOnce(), tmp_path)
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
        (0, "training.accumulate must be at least 1"),
    ],
)
def test_a_batch_that_cannot_be_split_is_explained(tmp_path, accumulate, message):
    with pytest.raises(ValueError, match=message):
        train(
            Experiment.from_config(toy_config(accumulate=accumulate)),
            toy_stage(),
            toy_loader(),
            tmp_path,
        )


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
