"""Counted operations equal the published measurements, and the products that jax traces."""

import importlib
import math
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_stages import VIEWS, tiny_batch, tiny_config

from data_pipelines.clip import Clip
from mvjax.experiment import Experiment
from mvjax.flow import euler_times, sample_actions
from mvjax.models.flops import (
    action_decoder_flops,
    peak_flops,
    sampling_flops,
    step_flops,
    video_dit_flops,
)
from mvjax.models.network import merge, split
from mvjax.models.presets import (
    ACTION_DECODERS,
    VIDEO_DITS,
    decoder_network,
    video_network,
)
from mvjax.parallel import make_mesh
from mvjax.training.bridge import abstract_backbone
from mvjax.training.objectives import make_stage


@pytest.mark.parametrize(
    ("preset", "latents", "layers", "tera"),
    [
        ("cosmos2b", (16, 60, 80), None, 150.1),
        ("cosmos2b", (16, 60, 80), 20, 107.2),
        ("cosmos2b", (5, 60, 80), None, 28.8),
        ("cosmos2b", (4, 60, 80), None, 21.8),
        ("cosmos2b", (24, 54, 96), None, 328.0),
        ("cosmos2b", (16, 88, 160), None, 919.5),
        ("cosmos2b", (24, 88, 160), None, 1924.9),
        ("cosmos14b", (24, 54, 96), None, 1547.4),
        ("cosmos14b", (24, 88, 160), None, 7526.6),
    ],
)
def test_the_released_networks_cost_what_was_measured(preset, latents, layers, tera):
    """PyTorch's FlopCounterMode on the published implementation, rounded to 0.1 TFLOP."""
    flops = video_dit_flops(VIDEO_DITS[preset], latents, 512, layers=layers)
    assert flops / 1e12 == pytest.approx(tera, abs=0.05)


def test_keys_and_values_of_the_context_are_counted_once():
    one, two = (action_decoder_flops(ACTION_DECODERS["bridge"], 19_200, draws) for draws in (1, 2))
    assert 2 * one - two == 24 * 2 * 2 * 19_200 * 2048 * 1024  # 3.9 TFLOP, whatever the draws


@pytest.mark.parametrize(("rank", "views"), [(0, {}), (4, {}), (4, VIEWS)])
def test_forward_passes_equal_the_traced_products(rank, views):
    config = tiny_config("action")
    config.lora.rank, config.clip.views = rank, views
    clip, batch = Clip(**config.clip), tiny_batch(config)
    latents, text = batch["latents"][:1], batch["text"][:1]
    times, mask = jnp.ones((1, clip.latent_frames)), jnp.ones((1, clip.latent_frames))
    experiment = Experiment.from_config(config)
    model, sizes = experiment.video, clip.view_shapes.values()
    network, shape = video_network(model), clip.latent_shape[:3]
    seen = {name: (batch[f"views/{name}"][:1], jnp.ones((1, 1))) for name in views}

    def hidden(params, layer):
        return network.bind(params).hidden(latents, times, text, mask, views=seen, layer=layer)

    def whole(params):
        return network.bind(params)(latents, times, text, mask, views=seen)

    counted = partial(video_dit_flops, model, shape, config.text.length, views=sizes)
    for layer in (0, 1, 2):
        products = traced(lambda p, layer=layer: hidden(p, layer), network.abstract)
        assert counted(layers=layer) == products
    assert counted() == traced(whole, network.abstract)


@pytest.mark.parametrize(
    ("name", "rank", "share"),
    # Under LoRA attention is a larger part of a step, because the kernels get no gradients.
    [("bridge_video", 0, 0.0494), ("bridge_video", 256, 0.0505), ("bridge_action", 0, 0.0476)],
)
def test_a_wrist_view_adds_a_twentieth_to_a_step_of_the_published_network(name, rank, share):
    """600 tokens, of 240x320 pixels, beside 19,200."""
    config = importlib.import_module(f"configs.{name}").get_config()
    config.lora.rank = rank
    alone = Experiment.from_config(config)
    config.clip.views = dict(wrist=dict(height=240, width=320))
    both = Experiment.from_config(config)
    assert both.tokens - alone.tokens == 600
    assert step_flops(both) / step_flops(alone) - 1 == pytest.approx(share, abs=5e-5)


@pytest.mark.parametrize("layers", [None, 20])
def test_a_wrist_view_adds_less_than_a_twentieth_to_a_forward_pass(layers):
    count = partial(video_dit_flops, VIDEO_DITS["cosmos2b"], (16, 60, 80), 512, layers=layers)
    assert 0.04 < count(views=[(2, 30, 40)]) / count() - 1 < 0.05


@pytest.mark.parametrize("draws", [1, 3])
def test_the_decoder_equals_the_traced_products(draws):
    config = tiny_config("action")
    config.policy_io.proprio.horizon = 2
    decoder = Experiment.from_config(config).decoder
    network, context = decoder_network(decoder), jnp.ones((1, 24, decoder.context_dim))
    proprio, actions, sigma = jnp.ones((draws, 2, 4)), jnp.ones((draws, 4, 4)), jnp.ones((draws, 1))

    def decode(params):
        net = network.bind(params)
        return net(proprio, actions, sigma, sigma, net.context_keys_values(context))

    assert action_decoder_flops(decoder, 24, draws) == traced(decode, network.abstract)

    def sample(params):
        net = network.bind(params)
        levels, kv = net.levels(euler_times(5), 80.0), net.context_keys_values(context)
        velocity = lambda x, level: net.at_levels(level, proprio, x, kv)  # noqa: E731
        return sample_actions(velocity, actions, 5, levels)

    assert sum(sampling_flops(decoder, 24, draws, 5)) == traced(sample, network.abstract)


@pytest.mark.parametrize(
    ("stage", "rank", "views"),
    [
        ("video", 0, {}),
        ("video", 4, {}),
        ("action", 0, {}),
        ("video", 4, VIEWS),
        ("action", 0, VIEWS),
        ("joint", 4, VIEWS),
    ],
)
def test_a_training_step_is_what_its_gradient_computes(stage, rank, views):
    """Up to gradients by what enters the network, which nobody asks for."""
    config = tiny_config(stage)
    config.lora.rank, config.clip.views = rank, views
    config.clip.update(height=64, width=64)
    config.training.batch_size = 2
    mesh = make_mesh(config.mesh)
    built, batch = (
        make_stage(Experiment.from_config(config), mesh, abstract_backbone),
        tiny_batch(config),
    )
    learned, fixed = split(jax.eval_shape(built.init, jax.random.key(0)), built.trainable)

    def gradient(learned, fixed, frozen):
        def loss(p):
            return built.loss(merge(fixed, p), frozen, batch, jax.random.key(0))[0]

        return jax.grad(loss)(learned)

    computed = traced(gradient, learned, fixed, built.frozen) / 2
    assert (
        0.96 * step_flops(Experiment.from_config(config))
        < computed
        <= step_flops(Experiment.from_config(config))
    )


def test_lora_saves_the_gradients_of_the_kernels_that_stay():
    config = tiny_config("video")
    full = step_flops(Experiment.from_config(config))
    clip, model = Clip(**config.clip), Experiment.from_config(config).video
    assert full == 3 * video_dit_flops(model, clip.latent_shape[:3], config.text.length)
    config.lora.update(rank=1)
    assert 0.66 * full < step_flops(Experiment.from_config(config)) < full


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L40S", 362),
    ],
)
def test_peaks_by_the_name_jax_gives_a_device(kind, tera):
    assert peak_flops(SimpleNamespace(device_kind=kind)) == pytest.approx(tera * 1e12)


def test_a_cpu_has_no_stated_peak():
    assert peak_flops(jax.devices()[0]) is None


def traced(function, *arguments) -> float:
    """Operations of every matrix product in a traced function, loops counted."""
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = math.prod(shape[axis] for axis in contracted)
            total += 2.0 * inner * np.prod(equation.outvars[0].aval.shape)
        repeats = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += repeats * sum(map(_count, _inner(equation.params)))
    return total


def _inner(params):
    for leaf in jax.tree.leaves(params, is_leaf=lambda value: hasattr(value, "eqns")):
        if hasattr(leaf, "eqns"):
            yield leaf
        elif hasattr(leaf, "jaxpr"):
            yield leaf.jaxpr
