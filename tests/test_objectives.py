"""Both training stages: the published objectives, and that their networks learn them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_stages import VIEWS, build_stage, tiny_batch, tiny_config

from mvjax.experiment import Experiment
from mvjax.flow import (
    action_loss,
    condition_mask,
    network_input,
    sample_action_time,
    sample_video_sigma,
)
from mvjax.training.directory import abstract_params
from mvjax.training.metrics import read_records
from mvjax.training.train import train

pytestmark = pytest.mark.usefixtures("quickly")
KEY = jax.random.key(5)


class OneBatch:
    """A loader that gives the same batch again and again."""

    def __init__(self, config):
        self._batch = tiny_batch(config)

    def __iter__(self):
        return self

    def __next__(self):
        return self._batch

    def get_state(self):
        return None


def with_flow(stage, backbone="", **flow):
    config = tiny_config(stage)
    config.flow.update(flow)
    if stage == "action":
        config.backbone.checkpoint = str(backbone)
    return config


def random_params(stage):
    """Parameters of a network that has left its start, where modulations are zero."""
    rng, params = np.random.default_rng(0), jax.jit(stage.init)(jax.random.key(1))
    return jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32), params)


@pytest.mark.parametrize(("name", "share"), [("video", 0.9), ("action", 0.85)])
def test_the_loss_falls_on_one_batch(name, share, video_run, tmp_path):
    config = with_flow(name, video_run)
    config.training.steps = 90  # many, so that the program is that of the other tests
    stage = build_stage(config)[0]
    frozen = jax.tree.map(np.array, stage.frozen)
    train(Experiment.from_config(config), stage, OneBatch(config), tmp_path)
    losses = [record["loss"] for record in read_records(tmp_path)]
    assert np.mean(losses[-5:]) < share * np.mean(losses[:5]), losses
    jax.tree.map(np.testing.assert_array_equal, frozen, stage.frozen)
    if name == "action":  # the checkpoint holds the decoder and nothing of the backbone
        decoder = Experiment.from_config(config).decoder_network
        shapes = jax.tree.map(jnp.shape, decoder.abstract)
        assert jax.tree.map(jnp.shape, abstract_params(tmp_path)) == shapes


@pytest.mark.parametrize("views", [{}, VIEWS], ids=["video", "views"])
def test_video_loss_is_the_velocity_error_of_the_frames_to_predict(views):
    """mean |v - (ε - x0)|² with zeros for conditioning frames, which enter clean, as views do."""
    config = with_flow("video", loss_scale=10.0)
    config.clip.views = views
    stage = build_stage(config)[0]
    batch, params = tiny_batch(config), random_params(stage)
    loss, metrics = jax.jit(stage.loss)(params, {}, batch, KEY)

    sigma_key, noise_key, condition_key = jax.random.split(KEY, 3)
    x0 = batch["latents"]
    samples, frames = x0.shape[:2]
    sigma = sample_video_sigma(sigma_key, samples, scale=4.0, tail=0.05)
    noise = jax.random.normal(noise_key, x0.shape)
    observed = np.asarray(jax.random.randint(condition_key, (samples,), 1, 3))
    assert set(observed) == {1, 2}
    net = Experiment.from_config(config).video_network.bind(params)
    tau = sigma / (1 + sigma)
    clean = np.arange(frames) < observed[:, None]
    wide = clean[..., None, None, None]
    t = tau[..., None, None, None]
    latents = np.where(wide, x0, (1 - t) * x0 + t * noise)
    observed = np.float32(1e-4 / (1 + 1e-4))
    seen = {name: (batch[f"views/{name}"], np.full((samples, 1), observed)) for name in views}
    times = np.where(clean, observed, tau)
    v = jax.jit(net)(latents, times, batch["text"], clean, views=seen)
    error = np.where(wide, 0, v - (noise - x0))
    np.testing.assert_allclose(metrics["velocity_mse"], np.mean(error**2), rtol=1e-4)
    np.testing.assert_allclose(loss, 10 * metrics["velocity_mse"], rtol=1e-6)


def test_action_loss_is_the_mean_over_the_draws(video_run):
    """One backbone pass serves all draws; each has its own noise, time and dropout."""
    draws = 3
    config = with_flow("action", video_run, action_draws=draws, proprio_dropout=0.5, loss_scale=2.0)
    stage = build_stage(config)[0]
    batch, params = tiny_batch(config), random_params(stage)
    samples, frames = batch["latents"].shape[:2]
    loss, metrics = jax.jit(stage.loss)(params, stage.frozen, batch, KEY)

    video_key, time_key, noise_key, drop_key = jax.random.split(KEY, 4)
    sigma_key, share_key, video_noise_key = jax.random.split(video_key, 3)
    sigma = sample_video_sigma(sigma_key, samples, scale=4.0, tail=0.05)
    at_sampling = jax.random.bernoulli(share_key, 0.5, (samples, 1))
    assert 0 < at_sampling.sum() < samples
    sigma = jnp.where(at_sampling, 80.0, sigma)
    x0 = batch["latents"]
    noisy = x0 + sigma[..., None, None, None] * jax.random.normal(video_noise_key, x0.shape)
    i = network_input(noisy, x0, sigma, condition_mask(jnp.full(samples, 2), frames))
    backbone = Experiment.from_config(config).video_network.bind(stage.frozen)
    decoder = Experiment.from_config(config).decoder_network.bind(params)
    noise = jax.random.normal(noise_key, (draws * samples, *batch["actions"].shape[1:]))
    time = sample_action_time(time_key, draws * samples, alpha=1.0, beta=1.0)
    drop = jax.random.bernoulli(drop_key, 0.5, (draws * samples,))

    @jax.jit
    def one_draw(noise, time, drop):
        context = backbone.hidden(*i[:2], batch["text"], i[2], layer=config.context_layer)
        kv = decoder.context_keys_values(context)
        velocity = lambda a, t: decoder(batch["proprio"], a, t, sigma, kv, drop)  # noqa: E731
        return action_loss(velocity, batch["actions"], noise, time).mean()

    each = [one_draw(*(x[r::draws] for x in (noise, time, drop))) for r in range(draws)]
    assert np.std(each) > 1e-3
    np.testing.assert_allclose(metrics["velocity_mse"], np.mean(each), rtol=1e-5)
    np.testing.assert_allclose(loss, 2 * metrics["velocity_mse"], rtol=1e-6)


def test_proprioception_dropout_hides_the_proprioception(video_run):
    config = with_flow("action", video_run, proprio_dropout=1.0)
    stage = build_stage(config)[0]
    params, batch, loss = random_params(stage), tiny_batch(config), jax.jit(stage.loss)
    before = loss(params, stage.frozen, batch, KEY)[0]
    assert loss(params, stage.frozen, {**batch, "proprio": batch["proprio"] + 1}, KEY)[0] == before
    params["proprio_mask_token"] = -params["proprio_mask_token"]  # what is seen in its place
    assert loss(params, stage.frozen, batch, KEY)[0] != before


def test_given_actions_are_drawn_beside_what_is_drawn_without_them():
    """A share has 1 to `flow.prefix` of them, each number as often, and the others have none."""
    plain = with_flow("action", action_draws=500)
    given = with_flow("action", action_draws=500, prefix=3, prefix_share=0.25)
    drawn = [build_stage(config)[0].draw(tiny_batch(config), KEY) for config in (plain, given)]
    count = np.asarray(drawn[1].pop("prefix"))
    jax.tree.map(np.testing.assert_array_equal, *drawn)
    assert count.shape == (8, 500)
    shares = np.bincount(count.ravel(), minlength=5) / count.size
    np.testing.assert_allclose(shares, [0.75, *[0.25 / 3] * 3, 0], atol=0.03)
