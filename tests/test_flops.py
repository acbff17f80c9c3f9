"""Counted operations equal the published measurements, and the products that jax traces."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_stages import tiny_batch, tiny_config

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


@pytest.mark.parametrize("rank", [0, 4])
def test_forward_passes_equal_the_traced_products(rank):
    config = tiny_config("action")
    config.lora.rank = rank
    clip, batch = Clip(**config.clip), tiny_batch(config)
    latents, text = batch["latents"][:1], batch["text"][:1]
    times, mask = jnp.ones((1, clip.latent_frames)), jnp.ones((1, clip.latent_frames))
    model = Experiment.from_config(config).video
    network, shape = video_network(model), clip.latent_shape[:3]

    def hidden(params, layer):
        return network.bind(params).hidden(latents, times, text, mask, layer=layer)

    def whole(params):
        return network.bind(params)(latents, times, text, mask)

    for layer in (0, 1, 2):
        counted = video_dit_flops(model, shape, config.text.length, layers=layer)
        assert counted == traced(lambda p, layer=layer: hidden(p, layer), network.abstract)
    assert video_dit_flops(model, shape, config.text.length) == traced(whole, network.abstract)


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


@pytest.mark.parametrize(("stage", "rank"), [("video", 0), ("video", 4), ("action", 0)])
def test_a_training_step_is_what_its_gradient_computes(stage, rank):
    """Up to gradients by what enters the network, which nobody asks for."""
    config = tiny_config(stage)
    config.lora.rank = rank
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
