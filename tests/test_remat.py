"""Rematerialisation changes the memory of training, not its numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvjax.models.build import decoder_network, video_network
from mvjax.models.presets import ACTION_DECODERS, VIDEO_DITS
from mvjax.models.remat import POLICIES

pytestmark = pytest.mark.usefixtures("quickly")
SMALL = dict(width=48, num_blocks=3, num_heads=2, adaln_rank=4)


def video_loss(config):
    network = video_network(config)

    def loss(params, latents, text):
        velocity = network.bind(params)(latents, jnp.full((1, 1), 0.5), text, jnp.zeros((1, 2)))
        return jnp.mean((velocity - latents) ** 2)

    return network, loss


def decoder_loss(config):
    network = decoder_network(config)

    def loss(params, actions, context):
        proprio, time = jnp.ones((len(actions), 1, 4)), jnp.full((len(actions), 1), 0.5)
        net = network.bind(params)
        return jnp.mean(net(proprio, actions, time, time, context) ** 2)

    return network, loss


def filled(network):
    """Parameters none of which is zero, so that every gradient counts."""
    leaves, structure = jax.tree.flatten(network.abstract)
    rng = np.random.default_rng(0)
    values = [0.2 * rng.normal(size=p.shape).astype("float32") for p in leaves]
    return jax.tree.unflatten(structure, values)


def noise(*shape):
    return np.random.default_rng(1).normal(size=shape).astype("float32")


CASES = {
    "video": (
        video_loss,
        dataclasses.replace(VIDEO_DITS["tiny"], **SMALL),
        (noise(1, 2, 8, 8, 16), noise(1, 4, 64)),
    ),
    "decoder": (
        decoder_loss,
        dataclasses.replace(ACTION_DECODERS["tiny"], **SMALL, time_rank=16),
        (noise(4, 16, 4), noise(2, 24, 128)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_the_same_under_every_policy(case):
    make, config, inputs = CASES[case]
    results = {}
    for remat in POLICIES:
        network, loss = make(dataclasses.replace(config, remat=remat))
        results[remat] = jax.jit(jax.value_and_grad(loss))(filled(network), *inputs)
    for remat, result in results.items():
        pairs = zip(jax.tree.leaves(result), jax.tree.leaves(results["none"]), strict=True)
        for ours, theirs in pairs:
            difference = np.linalg.norm(np.asarray(ours - theirs))
            assert difference <= 1e-6 * np.linalg.norm(np.asarray(theirs)), remat


def temporary_bytes(make, config, *shapes):
    network, loss = make(config)
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(jax.grad(loss)).lower(network.abstract, *inputs).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_each_policy_needs_less_memory_than_the_one_before():
    config = dataclasses.replace(VIDEO_DITS["tiny"], num_blocks=8, num_heads=1)
    none, dots, attention, full = (
        temporary_bytes(
            video_loss,
            dataclasses.replace(config, remat=remat),
            *((1, 2, 32, 32, 16), (1, 16, 64)),
        )
        for remat in ("none", "dots", "attention", "full")
    )
    assert none > 2 * dots and dots > 1.3 * attention and attention > 1.03 * full


def test_training_the_decoder_does_not_keep_the_keys_and_values_of_every_block():
    config = dataclasses.replace(ACTION_DECODERS["tiny"], num_blocks=8, remat="attention")
    shapes = (2, 16, 4), (2, 1024, 128)
    one_block = 2 * 1024 * 2 * config.width * 4  # bytes of keys and values of both samples

    def precomputed(config):
        network, loss = decoder_loss(config)

        def with_keys_values(params, actions, context):
            return loss(params, actions, network.bind(params).context_keys_values(context))

        return network, with_keys_values

    before = temporary_bytes(precomputed, config, *shapes)
    now = temporary_bytes(decoder_loss, config, *shapes)
    assert before - now > 8 * one_block


def test_a_context_and_its_keys_and_values_give_the_same_actions():
    make, config, (actions, context) = CASES["decoder"]
    network, _ = make(config)
    net = network.bind(filled(network))
    proprio, time = jnp.ones((4, 1, 4)), jnp.full((4, 1), 0.5)
    call = jax.jit(lambda context: net(proprio, actions, time, time, context))
    ours, theirs = call(context), call(jax.jit(net.context_keys_values)(context))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_running_a_part_of_the_blocks_does_not_copy_their_parameters():
    config = dataclasses.replace(VIDEO_DITS["tiny"], width=256, num_blocks=6)
    network = video_network(config)
    latents, text = ((1, 1, 4, 4, 16), (1, 4, 64))

    def hidden(params, latents, text):
        noise_level, mask = jnp.full((1, 1), 0.5), jnp.zeros((1, 1))
        return network.bind(params).hidden(latents, noise_level, text, mask, layer=5)

    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (latents, text)]
    compiled = jax.jit(hidden).lower(network.abstract, *inputs).compile()
    block = sum(p.size * 4 for p in jax.tree.leaves(network.abstract["blocks"])) / 6
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * block


def test_an_unknown_policy_is_a_sentence():
    with pytest.raises(ValueError, match="remat must be one of none, dots, attention, offload"):
        dataclasses.replace(ACTION_DECODERS["tiny"], remat="everything")
