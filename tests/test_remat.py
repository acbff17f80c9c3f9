"""Rematerialisation changes the memory of training, not its numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mvjax.models.attention import Attention
from mvjax.models.layers import POLICIES, run_blocks, stack
from mvjax.models.presets import ACTION_DECODERS, VIDEO_DITS, decoder_network, video_network
from mvjax.training.memory import LADDER, kept_widths

pytestmark = pytest.mark.usefixtures("quickly")
SMALL = dict(width=48, num_blocks=6, num_heads=2, adaln_rank=4)


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
        (noise(1, 2, 16, 16, 16), noise(1, 4, 64)),
    ),
    "decoder": (
        decoder_loss,
        dataclasses.replace(ACTION_DECODERS["tiny"], **SMALL, time_rank=16),
        (noise(4, 16, 4), noise(2, 24, 128)),
    ),
}


def assert_same(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.linalg.norm(np.asarray(a - b)) <= 1e-6 * np.linalg.norm(np.asarray(b))


@pytest.fixture(scope="module")
def attentions():
    """Three residual attention layers, scanned: (policy) -> loss and its gradients."""
    blocks = stack(lambda key: Attention(key, 16, 16, 2), jax.random.key(0), 3)
    x = noise(2, 12, 16)

    def step(x, block):
        return x + jnp.tanh(block(x, block.keys_values(x)))

    def result(remat):
        loss = lambda blocks, x: jnp.mean(run_blocks(step, x, blocks, 3, remat) ** 2)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(blocks, x)

    return result


@pytest.fixture(scope="module")
def kept_everything(attentions):
    return attentions("none")


@pytest.mark.parametrize("remat", [name for name in POLICIES if name != "none"])
def test_a_policy_changes_neither_loss_nor_gradients(attentions, kept_everything, remat):
    assert_same(attentions(remat), kept_everything)


@pytest.mark.parametrize("case", CASES)
def test_a_network_takes_less_memory_for_the_same_loss_and_gradients(case):
    make, config, inputs = CASES[case]
    results, temporary_bytes = [], []
    for remat in ("none", "attention"):
        network, loss = make(dataclasses.replace(config, remat=remat))
        arguments = (filled(network), *inputs)
        compiled = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
        results.append(compiled(*arguments))
        temporary_bytes.append(compiled.memory_analysis().temp_size_in_bytes)
    assert_same(*results)
    assert temporary_bytes[0] > 2 * temporary_bytes[1]


def kept_bytes(make, config, *shapes):
    """What the backward pass gets from the forward pass: residuals, parameters included."""
    network, loss = make(config)
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    pullback = jax.eval_shape(lambda *a: jax.vjp(loss, *a)[1], network.abstract, *inputs)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))


def test_each_policy_keeps_what_it_says():
    config = dataclasses.replace(VIDEO_DITS["tiny"], num_blocks=8, num_heads=1)
    kept = {
        remat: kept_bytes(
            video_loss, dataclasses.replace(config, remat=remat), (1, 2, 32, 32, 16), (1, 16, 64)
        )
        for remat in POLICIES
    }
    of_every_block = 8 * (2 * 16 * 16) * config.width * 4  # an activation of all tokens
    assert kept["offload"] == kept["attention"] == kept["full"] + of_every_block
    # Four linears of the self-attention, two of the other, 4 + 1 widths of the MLP; what depends
    # on latent frames and the text alone is small.
    assert (kept["dots"] - kept["attention"]) / of_every_block == pytest.approx(11, abs=0.2)
    assert (kept["hidden"] - kept["attention"]) / of_every_block == pytest.approx(7, abs=0.2)
    assert (kept["outputs"] - kept["attention"]) / of_every_block == pytest.approx(3, abs=0.2)
    # What "auto" reckons with.
    for remat in LADDER:
        widths = kept_widths(remat, config.mlp_ratio) - kept_widths("full", config.mlp_ratio)
        assert kept[remat] - kept["full"] == pytest.approx(widths * of_every_block, rel=0.02)
    assert kept["none"] > kept["dots"] + 4 * of_every_block


def test_training_the_decoder_does_not_keep_the_keys_and_values_of_every_block():
    config = dataclasses.replace(ACTION_DECODERS["tiny"], num_blocks=8, remat="attention")
    shapes = (2, 16, 4), (2, 1024, 128)
    one_block = 2 * 1024 * 2 * config.width * 4  # bytes of keys and values of both samples

    def precomputed(config):
        network, loss = decoder_loss(config)

        def with_keys_values(params, actions, context):
            return loss(params, actions, network.bind(params).context_keys_values(context))

        return network, with_keys_values

    before = kept_bytes(precomputed, config, *shapes)
    now = kept_bytes(decoder_loss, config, *shapes)
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
    with pytest.raises(ValueError, match="remat must be one of none, dots, hidden, outputs"):
        dataclasses.replace(ACTION_DECODERS["tiny"], remat="everything")
