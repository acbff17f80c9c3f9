"""Int8 products, and a backbone that computes with them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_video_dit import random_params
from tiny_stages import save_untrained, tiny_batch, tiny_config

from mvjax.experiment import Experiment
from mvjax.flow import observed_input
from mvjax.models.int8 import product, quantize, quantize_params
from mvjax.models.presets import video_network
from mvjax.training.bridge import abstract_backbone, load_backbone

pytestmark = pytest.mark.usefixtures("quickly")


def test_a_number_is_at_most_half_a_step_off():
    x = np.random.default_rng(0).normal(size=(5, 64, 7)).astype(np.float32)
    x[0] = 0
    for axis in (-1, -2):
        q, scale = jax.jit(quantize, static_argnums=1)(x, axis)
        assert q.dtype == jnp.int8 and scale.shape == np.max(x, axis).shape
        wide = np.broadcast_to(np.expand_dims(scale, axis), x.shape)
        np.testing.assert_array_less(np.abs(q * wide - x), 0.5001 * wide)
        assert np.abs(q[1:]).max(axis).min() == 127  # every vector reaches the end of the range


def test_a_product_is_that_of_the_quantized_numbers():
    rng = np.random.default_rng(1)
    x, w = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 6, 512), (512, 32)))
    kernel, scale = quantize(w, -2)
    tokens, by_token = quantize(x, -1)
    exact = np.asarray(tokens, np.int64) @ np.asarray(kernel, np.int64)
    ours = jax.jit(product)(x, kernel, scale)
    np.testing.assert_allclose(ours, exact * np.asarray(by_token)[..., None] * scale, rtol=1e-6)
    assert np.linalg.norm(ours - x @ w) < 0.015 * np.linalg.norm(x @ w)


def test_hidden_states_of_an_int8_backbone_are_near_those_of_bfloat16():
    experiment = Experiment.from_config(tiny_config("action"))
    batch, hidden = tiny_batch(experiment.config), {}
    networks = {
        precision: video_network(dataclasses.replace(experiment.video, precision=precision))
        for precision in ("float32", "bfloat16", "int8")
    }
    params = random_params(networks["float32"])
    for precision, network in networks.items():
        own = quantize_params(params, network.abstract) if precision == "int8" else params
        i = observed_input(batch["latents"][:, :2])
        run = jax.jit(
            lambda own, i, network=network: network.bind(own).hidden(
                i.latents, i.timesteps, batch["text"], i.condition_mask, layer=2
            )
        )
        hidden[precision] = np.asarray(run(own, i), np.float32)
    exact = hidden.pop("float32")
    errors = {
        name: np.linalg.norm(one - exact) / np.linalg.norm(exact) for name, one in hidden.items()
    }
    assert errors["bfloat16"] < errors["int8"] < 0.02, errors


@pytest.mark.parametrize("rank", [0, 4])
def test_a_trained_backbone_is_quantized_as_it_is_loaded(rank, tmp_path):
    config = tiny_config("video")
    config.lora.rank = rank
    save_untrained(config, tmp_path)
    config = tiny_config("action")
    config.backbone.update(checkpoint=str(tmp_path), precision="bfloat16")
    experiment = Experiment.from_config(config)
    mesh = experiment.mesh()
    _, whole = load_backbone(experiment, mesh)
    experiment = experiment.changed({"backbone.precision": "int8"})
    model, params = load_backbone(experiment, mesh)
    assert model.dtype == "bfloat16"
    shapes = jax.tree.map(
        lambda x: (x.shape, x.dtype), (params, abstract_backbone(experiment, mesh)[1])
    )
    assert shapes[0] == shapes[1]
    mlp, theirs = params["blocks"]["mlp"]["layer1"], whole["blocks"]["mlp"]["layer1"]["kernel"]
    assert mlp["kernel"].dtype == jnp.int8 and mlp["kernel_scale"].dtype == jnp.float32
    error = mlp["kernel"] * mlp["kernel_scale"][:, None] - theirs.astype(np.float32)
    bound = 0.51 * mlp["kernel_scale"][:, None] + 2**-8 * np.abs(theirs.astype(np.float32))
    assert np.all(np.abs(error) < bound)
    assert params["blocks"]["adaln_mlp"]["up"]["kernel"].dtype == jnp.bfloat16  # few rows


@pytest.mark.parametrize("name", ["video_model.precision", "decoder.precision"])
def test_a_network_that_learns_is_not_int8(name):
    with pytest.raises(ValueError, match=f"{name} must be one of"):
        Experiment.from_config(tiny_config("action")).changed({name: "int8"})
