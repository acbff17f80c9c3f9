"""LoRA: what it starts as, what learns with it, what is left after merging."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import lora_config
from tiny_stages import build_stage, tiny_batch, tiny_config, train_tiny

from mvjax.experiment import Experiment
from mvjax.models.layers import Linear, linears
from mvjax.models.lora import LoRA, joined_inputs, joined_outputs, learns_with_lora, merge_lora
from mvjax.models.network import merge, split
from mvjax.models.presets import video_network
from mvjax.training.damage import CheckpointMismatch
from mvjax.training.directory import abstract_params, restore_params

pytestmark = pytest.mark.usefixtures("quickly")


def stored(workdir, use_ema=False):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract_params(workdir)
    )
    return jax.tree.map(np.asarray, restore_params(workdir, wanted, use_ema=use_ema))


def is_adapter(path):
    return path[-1] in ("lora_a", "lora_b")


@pytest.fixture(scope="module")
def networks(quickly):
    """A plain network, its adapted version, and their LoRA; with their jitted velocities."""
    adapted = Experiment.from_config(lora_config("")).video
    pair = Experiment.from_config(tiny_config("video")).video_network, video_network(adapted)
    return *((network, jitted_velocity(network)) for network in pair), adapted.lora


def jitted_velocity(network):
    batch = tiny_batch(tiny_config("video"))
    x, text, frames = batch["latents"], batch["text"], batch["latents"].shape[1]
    times = np.full((len(x), frames), 0.7, np.float32)
    mask = (np.arange(frames) < 2) * np.ones_like(times)
    return jax.jit(lambda params: network.bind(params)(x, times, text, mask))


def random_like(params, scale=0.2):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: p + scale * rng.normal(size=p.shape).astype(np.float32), params)


def paths(tree):
    return ["/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def test_adapters_start_as_the_identity(networks):
    (plain, plain_velocity), (adapted, adapted_velocity), lora = networks
    params = jax.jit(adapted.init)(jax.random.key(1))
    adapters, base = split(params, is_adapter)
    chex.assert_trees_all_equal_shapes_and_dtypes(base, plain.abstract)
    base = random_like(base)  # a trained network: no modulation is zero
    params = merge(base, adapters)
    np.testing.assert_array_equal(adapted_velocity(params), plain_velocity(base))
    chex.assert_trees_all_equal(merge_lora(params, lora), base)


def test_every_published_target_has_an_adapter(networks):
    """Rank-r adapters on ten matrices of each block, the patch embedding and the time embedding."""
    adapted = networks[1][0]
    adapters, _ = split(adapted.abstract, is_adapter)
    attention = [f"{a}/{p}_proj" for a in ("self_attn", "cross_attn") for p in ("q", "k", "v")]
    attention += ["self_attn/output_proj", "cross_attn/output_proj"]
    layers = [f"blocks/{name}" for name in (*attention, "mlp/layer1", "mlp/layer2")]
    layers += ["x_embedder", "t_embedder/linear_1", "t_embedder/linear_2"]
    assert sorted(paths(adapters)) == sorted(f"{x}/lora_{ab}" for x in layers for ab in "ab")


def test_merged_parameters_give_the_adapted_output(networks):
    (_, plain_velocity), (adapted, adapted_velocity), lora = networks
    params = random_like(jax.tree.map(lambda p: np.zeros(p.shape, np.float32), adapted.abstract))
    theirs, ours = adapted_velocity(params), plain_velocity(merge_lora(params, lora))
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)
    unmerged = plain_velocity(split(params, is_adapter)[1])
    assert np.linalg.norm(unmerged - theirs) > 1e-2 * np.linalg.norm(theirs)


def test_merging_adds_the_scaled_product_to_every_layer():
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 6, 5)), "bias": rng.normal(size=(3, 5))}
    adapters = {"lora_a": rng.normal(size=(3, 6, 2)), "lora_b": rng.normal(size=(3, 2, 5))}
    merged = merge_lora({"mlp": params | adapters}, LoRA(rank=2, alpha=3.0, targets=()))["mlp"]
    assert set(merged) == {"kernel", "bias"}
    for i in range(3):
        expected = params["kernel"][i] + 1.5 * adapters["lora_a"][i] @ adapters["lora_b"][i]
        np.testing.assert_allclose(merged["kernel"][i], expected)


def test_only_adapters_and_adaln_learn(video_run, lora_run):
    """Two real steps: everything else still holds the bits of the run it was started from."""
    before, after = stored(video_run, use_ema=True), stored(lora_run)
    learning, fixed = split(after, learns_with_lora)
    kept = split(before, learns_with_lora)[1]
    chex.assert_trees_all_equal(fixed, kept)
    adapters, adaln = split(learning, is_adapter)
    assert all("adaln" in path for path in paths(adaln))
    started = split(before, learns_with_lora)[0]
    for name, ours, theirs in zip(paths(adaln), *map(jax.tree.leaves, (adaln, started))):
        change = np.abs(ours - theirs).max()
        assert 0 < change < 2.5e-3, name  # two steps of Adam at 1e-3 from the stored average
    for name, adapter in zip(paths(adapters), jax.tree.leaves(adapters)):
        assert np.any(adapter), name  # B has left zero


def test_full_training_does_not_start_from_a_lora_run(lora_run, tmp_path):
    full = tiny_config("video", steps=1)
    full.init_from = str(lora_run)
    with pytest.raises(CheckpointMismatch, match=r"checkpoint holds, but .* lacks: .*lora_a"):
        train_tiny(full, tmp_path)


def test_the_optimizer_holds_nothing_for_fixed_parameters():
    stage, _, _ = build_stage(lora_config(""))
    params = jax.eval_shape(stage.init, jax.random.key(0))
    learning = split(params, stage.trainable)[0]
    assert all("lora" in path or "adaln" in path for path in paths(learning))


@pytest.mark.parametrize("joined", ["joined_inputs", "joined_outputs"])
def test_joined_products_equal_separate_ones(joined):
    """Values and all gradients, also of the kernel, for inputs with several leading dimensions."""
    rng = np.random.default_rng(0)
    shapes = dict(x=(2, 30, 16), kernel=(16, 24), a=(16, 4), b=(4, 24))
    arrays = [0.2 * rng.standard_normal(s).astype("float32") for s in shapes.values()]

    def separate(x, kernel, a, b):
        return jnp.sum(jnp.sin(x @ kernel + (x @ a) @ b))

    def together(x, kernel, a, b):
        if joined == "joined_inputs":
            return jnp.sum(jnp.sin(joined_inputs(x, x @ a, kernel, b)))
        y, low = joined_outputs(x, kernel, a)
        return jnp.sum(jnp.sin(y + low @ b))

    ours, theirs = (jax.grad(f, argnums=(0, 1, 2, 3))(*arrays) for f in (together, separate))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_layers_of_one_input_share_the_product_with_their_adapters():
    lora = LoRA(4, 8.0, ("q", "k"))
    layers = [
        Linear(jax.random.key(i), 16, 24, ("embed", "heads"), name=name, lora=lora)
        for i, name in enumerate("qk")
    ]
    for layer in layers:  # B starts at zero
        layer.lora_b[...] = jax.random.normal(jax.random.key(2), layer.lora_b[...].shape)
    x = jax.random.normal(jax.random.key(3), (2, 5, 16))
    for together, layer in zip(linears(x, *layers), layers, strict=True):
        np.testing.assert_allclose(together, layer(x), rtol=1e-5, atol=1e-5)
