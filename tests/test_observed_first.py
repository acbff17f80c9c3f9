"""Attention of the observed frames to each other alone, and policies that read nothing but them.

That eight devices compute the same is in test_sharded.py and test_splash.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_video_dit import evaluated, plainly, random_params
from tiny_policy import random_observation, tiny_policy
from tiny_stages import VIEWS, build_stage, save_untrained, tiny_batch, tiny_config

from data_pipelines.clip import tokens
from mvjax.experiment import Experiment
from mvjax.flow import (
    CONDITION_SIGMA,
    action_loss,
    condition_mask,
    denoise,
    network_input,
    observed_input,
    sample_actions,
    sample_video,
    start,
)
from mvjax.models.flops import step_flops, video_dit_flops
from mvjax.policy.policy import medoid
from mvjax.training.bridge import load_backbone, load_decoder
from mvjax.training.checkpoint import Store
from mvjax.training.damage import CheckpointMismatch
from mvjax.training.objectives import batch_views
from mvjax.training.resume import describe, first_state
from mvjax.training.step import assemble
from mvjax.weights.convert import prepare_export
from mvjax.weights.files import WeightsError

pytestmark = pytest.mark.usefixtures("quickly")
SIGMA = jnp.array([[3.0], [0.4]])


def observed_first(stage="video", views=None, **settings):
    config = tiny_config(stage)
    config.video_model.attention_to = "observed_first"
    config.training.batch_size = 2
    if views:
        config.clip.views = views
    config.update_from_flattened_dict(settings)
    return config


@pytest.fixture(scope="module", params=["video", "views"])
def seen(request, quickly):
    """A network, its parameters, and what it is called with: two frames observed of four."""
    config = observed_first(views=VIEWS if request.param == "views" else None)
    experiment = Experiment.from_config(config)
    batch, network = tiny_batch(config), experiment.video_network
    x0, views = batch["latents"], batch_views(experiment, batch)
    mask = condition_mask(jnp.full(2, 2), x0.shape[1])
    i = network_input(2.0 * x0, x0, SIGMA, mask, views)
    return network, random_params(network), i, batch["text"], x0, views


def who_reads_whom(i):
    """True where a token of a row is read: only the future reads the future."""
    frames, *size = i.latents.shape[1:]
    counts = [tokens((2, *size)), tokens((frames - 2, *size))]
    counts.append(sum(tokens(view.latents.shape[1:]) for view in i.views.values()))
    future = np.repeat([False, True, False], counts)
    return ~future[None] | future[:, None]


# --- What the network computes ---


def test_the_future_reads_everything_and_the_present_the_present(seen):
    network, params, i, text, *_ = seen
    reference = jax.jit(lambda p: plainly(network.config, p, i, text, who_reads_whom(i)))
    velocity, hidden = reference(params)
    ours = evaluated(network, params, i, text)
    np.testing.assert_allclose(ours, velocity, atol=1e-5 * np.abs(velocity).max())
    for layer, theirs in enumerate(hidden):
        ours = evaluated(network, params, i, text, layer)
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_the_present_is_the_same_with_and_without_a_future(seen):
    network, params, i, text, x0, views = seen
    alone = observed_input(x0[:, :2], views)
    present = tokens((2, *x0.shape[2:]))
    future = tokens(x0.shape[1:]) - present
    for layer in range(network.config.num_blocks + 1):
        whole = np.delete(
            evaluated(network, params, i, text, layer), np.s_[present : present + future], axis=1
        )
        ours = evaluated(network, params, alone, text, layer)
        np.testing.assert_allclose(ours, whole, atol=1e-5 * np.abs(whole).max())


def test_a_memory_of_the_present_changes_no_prediction(seen):
    network, params, i, text, x0, views = seen
    sigmas = np.array([80.0, 5.0, 0.5])
    mask = condition_mask(jnp.full(2, 2), x0.shape[1])

    def sampled(params, kept):
        net = network.bind(params)
        memory = net.remember(i, text) if kept else None

        def predict(x, sigma):
            velocity = lambda i: net.velocity(i, text, memory)  # noqa: E731
            return denoise(velocity, x, x0, sigma, mask, views)

        noise = jax.random.normal(jax.random.key(0), x0.shape)
        return sample_video(predict, start(noise, sigmas), sigmas).x

    one, other = (jax.jit(sampled, static_argnums=1)(params, kept) for kept in (False, True))
    assert np.std(one[:, 2:]) > 0.1
    np.testing.assert_allclose(other, one, atol=1e-5 * np.abs(one).max())


def test_a_network_that_attends_to_all_remembers_nothing():
    experiment = Experiment.from_config(tiny_config("video"))
    x0 = jnp.zeros((1, *experiment.clip.latent_shape))
    i = network_input(x0, x0, jnp.ones((1, 1)), condition_mask(jnp.full(1, 2), x0.shape[1]))
    net = experiment.video_network.bind(experiment.video_network.init(jax.random.key(0)))
    assert net.remember(i, jnp.zeros((1, 4, 16))) is None


def test_operations_are_those_of_the_two_attentions():
    first, whole = (
        Experiment.from_config(config) for config in (observed_first(), tiny_config("video"))
    )
    shape, text = first.clip.latent_shape, first.config.text.length
    one, other = (video_dit_flops(e.video, shape[:3], text) for e in (first, whole))
    present = tokens((2, *shape[1:]))
    future = tokens(shape) - present
    fewer = 4 * present * future * first.video.width * first.video.num_blocks
    assert other - one == fewer
    # Stage 2 of observed frames costs what a video of two latent frames does.
    read = Experiment.from_config(observed_first("action", context_frames="observed"))
    assert read.tokens == present
    at = dict(layers=read.config.context_layer)
    backbone = video_dit_flops(read.video, (2, *shape[1:3]), text, **at)
    more = Experiment.from_config(observed_first("action"))
    assert (
        0
        < step_flops(read) - backbone
        < step_flops(more) - video_dit_flops(more.video, shape[:3], text, **at)
    )


# --- Stage 2 and the policy ---


def test_the_decoder_learns_from_the_observed_frames_alone(video_run):
    config = tiny_config("action")
    config.context_frames, config.backbone.checkpoint = "observed", str(video_run)
    stage = build_stage(config)[0]
    batch, params, key = tiny_batch(config), stage.init(jax.random.key(0)), jax.random.key(1)
    random = stage.draw(batch, key)
    assert not {"sigma", "video_noise"} & set(random)  # nothing of the future is drawn
    loss, _ = jax.jit(stage.objective)(params, stage.frozen, batch, random)
    other = {**batch, "latents": batch["latents"].copy()}
    other["latents"][:, 2:] += 1
    assert loss == jax.jit(stage.objective)(params, stage.frozen, other, random)[0]

    experiment = Experiment.from_config(config)
    i = observed_input(batch["latents"][:, :2])
    context = jax.jit(partial_pass, static_argnums=(0, 3))(
        experiment.video_network, stage.frozen, (i, batch["text"]), config.context_layer
    )
    draws = config.flow.action_draws
    flat = {name: x.reshape(-1, *x.shape[2:]) for name, x in random.items()}
    actions, proprio = (np.repeat(batch[name], draws, axis=0) for name in ("actions", "proprio"))
    net = experiment.decoder_network.bind(params)
    sigma = jnp.full((len(actions), 1), CONDITION_SIGMA)
    velocity = lambda a, t: net(proprio, a, t, sigma, context, flat["drop"])  # noqa: E731
    by_hand = action_loss(velocity, actions, flat["noise"], flat["time"])
    np.testing.assert_allclose(loss, by_hand.mean() * config.flow.loss_scale, rtol=1e-5)


def partial_pass(network, params, inputs, layer):
    i, text = inputs
    net = network.bind(params)
    return net.hidden(i.latents, i.timesteps, text, i.condition_mask, views=i.views, layer=layer)


@pytest.fixture(scope="module")
def policy(quickly):
    """A policy whose context is of the observed frames, and the one of all frames."""
    whole, _ = tiny_policy(cameras="observed")
    return variant(whole, context_frames="observed"), whole


def variant(policy, **changes):
    return dataclasses.replace(policy, model=dataclasses.replace(policy.model, **changes))


def test_a_chunk_follows_from_what_is_observed(policy):
    policy, whole = policy
    query = random_observation(3, cameras=2)
    model, (tokenizer, backbone, decoder) = policy.model, policy.weights
    inputs = policy.inputs([query], with_future=False)
    assert inputs.video_noise.shape == (1, 0)  # neither drawn nor sent
    clean = model.encode(tokenizer, inputs.video, inputs.views)
    i = observed_input(clean.video[:, :2], clean.views)
    context = partial_pass(model.backbone, backbone, (i, inputs.text), model.layer)
    net, sigma = model.decoder.bind(decoder), jnp.full((1, 1), CONDITION_SIGMA)
    velocity = lambda a, t: net(inputs.proprio, a, t, sigma, context)  # noqa: E731
    noise = inputs.action_noise[:, 0]
    chunk = sample_actions(velocity, noise, model.sampling.action_steps)
    expected = policy.normalizer.unnormalize("actions", np.asarray(chunk))
    ours = policy.act([query])
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert not np.allclose(ours, whole.act([query]), rtol=1e-2)


def test_the_video_is_predicted_as_by_a_policy_of_all_frames(policy):
    policy, whole = policy
    query = random_observation(4, cameras=2)
    chunks, video = policy.act_with_video([query])
    np.testing.assert_array_equal(video, whole.predict_video([query]))
    np.testing.assert_allclose(chunks, policy.act([query]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [dict(stop_step=1), dict(oracle=True)])
def test_what_would_change_nothing_is_refused(changes):
    experiment = Experiment.from_config(observed_first("action", context_frames="observed"))
    with pytest.raises(ValueError, match="reads the observed frames alone"):
        experiment.sampling(**changes)


def test_the_whole_context_and_the_fast_one_agree_for_a_policy_trained_observed_first():
    """The exact part of the idea: what the fast query reads is what the full one would give it."""
    config = observed_first("action", VIEWS)
    experiment = Experiment.from_config(config)
    network, batch = experiment.video_network, tiny_batch(config)
    params, x0 = random_params(network), batch["latents"]
    decoder = experiment.decoder_network
    decoder_params = random_params(decoder)
    views = batch_views(experiment, batch)
    mask = condition_mask(jnp.full(2, 2), x0.shape[1])
    full = network_input(80.0 * jnp.ones_like(x0), x0, jnp.full((2, 1), 80.0), mask, views)
    present, whole = tokens((2, *x0.shape[2:])), tokens(x0.shape[1:])

    @jax.jit
    def chunk(i):
        context = partial_pass(network, params, (i, batch["text"]), config.context_layer)
        if i.latents.shape[1] > 2:
            context = jnp.concatenate([context[:, :present], context[:, whole:]], axis=1)
        net = decoder.bind(decoder_params)
        sigma = jnp.full((2, 1), CONDITION_SIGMA)
        velocity = lambda a, t: net(batch["proprio"], a, t, sigma, context)  # noqa: E731
        noise = jax.random.normal(jax.random.key(2), batch["actions"].shape)
        return medoid(sample_actions(velocity, noise, 4)[:, None])

    one, other = chunk(full), chunk(observed_input(x0[:, :2], views))
    np.testing.assert_allclose(other, one, atol=1e-5 * np.abs(one).max())


# --- Checkpoints ---


def started(config, workdir):
    """The parameters with which a run begins in `workdir`."""
    stage, mesh, _ = build_stage(config)
    experiment = Experiment.from_config(config)
    optimizer, abstract, _ = assemble(experiment, stage, mesh)
    with jax.set_mesh(mesh), Store(workdir, keep=1) as store:
        meta = describe(experiment, stage, {})
        return first_state(experiment, stage, optimizer, abstract, store, None, meta).params


@pytest.mark.parametrize("rank", [0, 4])
def test_training_begins_with_a_network_that_attends_to_all(rank, tmp_path):
    params = save_untrained(tiny_config("video"), tmp_path / "all")
    config = observed_first(init_from=str(tmp_path / "all"), **{"lora.rank": rank})
    begun = started(config, tmp_path / "first")
    jax.tree.map(np.testing.assert_array_equal, begun["final_layer"], params["final_layer"])
    # But a run does not change its attention halfway.
    with pytest.raises(CheckpointMismatch, match="attention_to is 'all' there, 'observed_first'"):
        started(observed_first(), tmp_path / "all")


def test_a_backbone_of_other_attention_is_refused(tmp_path):
    save_untrained(observed_first(), tmp_path / "first")
    config = tiny_config("action")
    config.backbone.checkpoint = str(tmp_path / "first")
    experiment = Experiment.from_config(config)
    with pytest.raises(CheckpointMismatch, match="attention_to is 'observed_first' there, 'all'"):
        load_backbone(experiment, experiment.mesh())
    experiment = experiment.changed({"video_model.attention_to": "observed_first"})
    assert load_backbone(experiment, experiment.mesh())[0].observed_latents == 2


def test_a_decoder_of_other_frames_is_refused(tmp_path):
    config = tiny_config("action")
    save_untrained(config, tmp_path)
    experiment = Experiment.from_config(config).changed({"context_frames": "observed"})
    with pytest.raises(CheckpointMismatch, match="context_frames is 'all' there, 'observed' here"):
        load_decoder(experiment, tmp_path, experiment.mesh())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (observed_first(), "attention_to='observed_first'"),
        (observed_first("action", context_frames="observed"), "context_frames='observed'"),
    ],
)
def test_what_other_programs_do_not_compute_is_not_written_for_them(config, words, tmp_path):
    config.video_model.attention_to = "all" if "action" in config.stage else "observed_first"
    save_untrained(config, tmp_path)
    with pytest.raises(WeightsError, match=words):
        prepare_export(tmp_path, "mimic-video")
