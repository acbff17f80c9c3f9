"""The Wan VAE: the release's numbers, diffusers' numbers, causality, chunks and their memory."""

import json
from dataclasses import replace
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published import to_arrays, to_params

from mvjax.models.network import Network
from mvjax.models.presets import WAN_VAES
from mvjax.models.wan_vae import LATENT_MEAN, LATENT_STD, ChannelNorm, WanVAE, WanVAEConfig
from mvjax.weights.names import wan_vae, wan_vae_diffusers

TINY = WAN_VAES["tiny"]
pytestmark = pytest.mark.usefixtures("quickly")


def network(config):
    return Network(lambda key: WanVAE(config, key))


def rms_error(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2)))


def random_params(config):
    """Weights of unit gain; norms and biases away from their initial values."""
    rng = np.random.default_rng(0)

    def draw(path, p):
        if path[-1].key == "scale":
            return rng.uniform(0.5, 1.5, p.shape).astype(np.float32)
        fan_in = np.prod(p.shape[:-1]) if path[-1].key == "kernel" else 100
        return (rng.normal(size=p.shape) / np.sqrt(fan_in)).astype(np.float32)

    return jax.tree.map_with_path(draw, network(config).abstract)


def video(frames, b=1, h=16, w=24, seed=0):
    shape = b, frames, h, w, 3
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


@pytest.fixture(scope="module")
def golden():
    """Arrays, configuration and parameters of the published implementation's tiny VAE."""
    arrays = dict(np.load(Path(__file__).parent / "golden" / "wan_vae.npz"))
    sizes = json.loads(str(arrays["meta"]))["config"]["cfg"]
    config = WanVAEConfig(
        dim=sizes["dim"],
        channel_multipliers=tuple(sizes["dim_mult"]),
        num_res_blocks=sizes["num_res_blocks"],
        latent_channels=sizes["z_dim"],
        temporal_downsample=tuple(sizes["temperal_downsample"]),
        latent_mean=tuple(map(float, arrays["in.latent_mean"])),
        latent_std=tuple(map(float, 1 / arrays["in.latent_inv_std"].astype(np.float64))),
    )
    tensors = {k.removeprefix("vae."): v for k, v in arrays.items() if k.startswith("vae.")}
    params = to_params(tensors, wan_vae(config))
    chex.assert_trees_all_equal_shapes(params, network(config).abstract)
    last = {k: np.moveaxis(v, 1, -1) for k, v in arrays.items() if v.ndim == 5}
    return last, config, params


@pytest.mark.parametrize(
    "frames, name", [(9, "latents"), (5, "latents_5_frames"), (1, "latents_1_frame")]
)
def test_encodes_like_the_release(golden, frames, name):
    arrays, config, params = golden
    latents = network(config).bind(params).encode(arrays["in.video_bcthw"][:, :frames])
    assert latents.dtype == jnp.float32
    assert rms_error(latents, arrays[f"out.{name}"]) < 1e-5


def test_decodes_like_the_release(golden):
    arrays, config, params = golden
    reconstruction = network(config).bind(params).decode(arrays["out.latents"])
    assert reconstruction.dtype == jnp.float32
    assert rms_error(reconstruction, arrays["out.reconstruction"]) < 1e-5


# What bfloat16 costs this net of 4 to 16 channels in PyTorch: 0.5 % of the latents and 4.2 % of the
# video (2.3 % from rounding the weights alone). With more channels more of it averages out.
@pytest.mark.parametrize("precision", ["bfloat16", "published"])
def test_bfloat16_is_as_close_to_float32_as_in_pytorch(golden, precision):
    arrays, config, params = golden
    vae = network(replace(config, precision=precision)).bind(params)
    latents, decoded = vae.encode(arrays["in.video_bcthw"]), vae.decode(arrays["out.latents"])
    assert latents.dtype == decoded.dtype == jnp.float32
    assert 1e-4 < rms_error(latents, arrays["out.latents"]) < 1e-2
    assert 1e-4 < rms_error(decoded, arrays["out.reconstruction"]) < 5e-2


def test_the_released_statistics_are_rounded_where_the_release_rounds_them():
    def of_zeros(config):
        net = network(config)
        return net.bind(net.abstract).normalise(jnp.zeros(16))

    np.testing.assert_allclose(of_zeros(TINY), -np.array(LATENT_MEAN) / LATENT_STD, rtol=1e-6)
    mean = jnp.bfloat16(0.7571)
    first = of_zeros(replace(TINY, precision="published"))[0]
    assert first == jnp.float32(jnp.bfloat16(jnp.float32(mean) * 0.35546875))


def test_sizes_are_the_released_ones():
    net = network(WAN_VAES["wan21"])
    sizes = {
        part: sum(leaf.size for leaf in jax.tree.leaves(net.abstract[part]))
        for part in ("encoder", "decoder")
    }
    assert net.num_parameters == 126_892_531
    assert sizes == {"encoder": 53_595_872, "decoder": 73_295_331}
    assert len(jax.tree.leaves(net.abstract)) == 194
    for table in (wan_vae, wan_vae_diffusers):
        rules = table(WAN_VAES["wan21"])
        assert len({rule.torch for rule in rules}) == len({rule.ours for rule in rules}) == 194


@pytest.fixture(scope="module")
def tiny():
    """The parameters of a tiny VAE, a clip of 29 frames, and its latents and their video."""
    params = random_params(TINY)
    vae = network(TINY).bind(params)
    clip = video(29, b=2)
    latents = vae.encode(clip)
    decoded = vae.decode(latents)
    assert latents.shape == (2, 8, 2, 3, 16) and decoded.shape == clip.shape
    return params, clip, latents, decoded


def test_the_past_does_not_depend_on_the_future(tiny):
    params, clip, latents, decoded = tiny
    vae = network(TINY).bind(params)
    changed = clip.copy()
    changed[:, 5:] = video(24, b=2, seed=1)
    changed_latents = vae.encode(changed)
    assert rms_error(changed_latents[:, :2], latents[:, :2]) < 2e-6
    assert rms_error(changed_latents[:, 2], latents[:, 2]) > 1e-2
    assert rms_error(vae.encode(clip[:, :5]), latents[:, :2]) < 2e-6
    assert rms_error(vae.decode(latents[:, :2]), decoded[:, :5]) < 2e-6


@pytest.mark.parametrize("chunk, frames", [(1, 9), (3, 29)])
def test_chunks_give_the_same_numbers(tiny, chunk, frames):
    params, clip, latents, decoded = tiny
    vae = network(replace(TINY, chunk=chunk)).bind(params)
    n = 1 + frames // 4
    assert rms_error(vae.encode(clip[:, :frames]), latents[:, :n]) < 2e-6
    assert rms_error(vae.decode(latents[:, :n]), decoded[:, :frames]) < 2e-6


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_the_memory_of_chunks_does_not_grow_with_the_clip(direction):
    net = network(replace(TINY, chunk=2))

    def temporary_bytes(latent_frames):
        shape = {
            "encode": (2, 4 * latent_frames - 3, 16, 16, 3),
            "decode": (2, latent_frames, 2, 2, 16),
        }[direction]
        run = jax.jit(lambda params, x: getattr(net.bind(params), direction)(x))
        lowered = run.lower(net.abstract, jax.ShapeDtypeStruct(shape, jnp.float32))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    features_of_the_clip = 2 * 129 * 16 * 16 * TINY.dim * 4  # of one layer, were it run at once
    assert temporary_bytes(33) == temporary_bytes(9) < features_of_the_clip


def test_published_norms_round_like_pytorch():
    torch = pytest.importorskip("torch", reason="compares with PyTorch's bfloat16 arithmetic")
    rng = np.random.default_rng(0)
    x, scale = rng.normal(size=(64, 96)), rng.normal(size=96)
    x_torch, scale_torch = torch.tensor(x).bfloat16(), torch.tensor(scale).bfloat16()
    theirs = torch.nn.functional.normalize(x_torch, dim=1) * 96**0.5 * scale_torch
    norm = ChannelNorm(96, "published")
    norm.scale[...] = jnp.asarray(scale, jnp.float32)
    ours = jax.jit(lambda norm, x: norm(x))(norm, jnp.asarray(x, jnp.bfloat16))
    different = np.asarray(ours, np.float32) != theirs.float().numpy()
    # The sum of squares may be added up in another order and round to the other neighbour.
    assert different.mean() < 0.02


@pytest.fixture(scope="module")
def diffusers_vae():
    """diffusers' network with random weights, our configuration and our parameters."""
    torch = pytest.importorskip("torch", reason="compares with diffusers, which needs PyTorch")
    diffusers = pytest.importorskip("diffusers", reason="compares with diffusers")
    config = WanVAEConfig(dim=8, num_res_blocks=2)
    params = random_params(config)
    # diffusers clamps the video to [-1, 1]: keep it inside.
    params["decoder"]["conv_out"]["kernel"] *= 0.2
    arrays = to_arrays(params, wan_vae_diffusers(config))
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    model = diffusers.AutoencoderKLWan(base_dim=config.dim).eval()
    model.load_state_dict(tensors, strict=True)
    return torch, model, config, params


def run_diffusers(torch, model, config, clip, latents):
    """diffusers' normalised latents and video; it leaves the normalisation to its pipelines."""
    mean, std = (
        torch.tensor(s).view(1, -1, 1, 1, 1) for s in (config.latent_mean, config.latent_std)
    )
    first = lambda x: torch.tensor(np.moveaxis(np.asarray(x), -1, 1))  # noqa: E731
    with torch.no_grad():
        moments = model.encode(first(clip).to(model.dtype)).latent_dist
        encoded = (moments.mode().float() - mean) / std
        decoded = model.decode((first(latents) * std + mean).to(model.dtype)).sample.float()
    assert decoded.abs().max() < 1
    return (np.moveaxis(x.numpy(), 1, -1) for x in (encoded, decoded))


def test_agrees_with_diffusers(diffusers_vae):
    torch, model, config, params = diffusers_vae
    clip = video(9)
    latents = np.random.default_rng(1).normal(size=(1, 3, 2, 3, 16)).astype(np.float32)
    encoded, decoded = run_diffusers(torch, model.float(), config, clip, latents)
    vae = network(config).bind(params)
    assert rms_error(vae.encode(clip), encoded) < 1e-5
    assert rms_error(vae.decode(latents), decoded) < 1e-5

    # In bfloat16 both are as far from these numbers.
    vae = network(replace(config, precision="bfloat16")).bind(params)
    noisy_encoded, noisy_decoded = run_diffusers(torch, model.bfloat16(), config, clip, latents)
    for ours, theirs, exact in (
        (vae.encode(clip), noisy_encoded, encoded),
        (vae.decode(latents), noisy_decoded, decoded),
    ):
        assert rms_error(ours, exact) < 1.25 * rms_error(theirs, exact)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(dim=3), "dim must be even"),
        (dict(channel_multipliers=(1, 2, 4)), "four positive numbers"),
        (dict(temporal_downsample=(True, True, True)), "temporal_downsample must be two of three"),
        (dict(num_res_blocks=0), "num_res_blocks must be 1 or more"),
        (dict(latent_channels=4), "latent_mean must be 4 numbers"),
        (dict(latent_std=(0.0,) * 16), "latent_std must be positive"),
        (dict(precision="float16"), "precision must be one of float32, bfloat16, published"),
        (dict(chunk=-1), "chunk must be .* got -1"),
    ],
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        WanVAEConfig(**fields)


@pytest.mark.parametrize(
    "direction, shape, message",
    [
        ("encode", (1, 4, 16, 16, 3), "4 frames cannot be tokenized; use 1 . 4k"),
        ("encode", (1, 5, 20, 16, 3), "Frames of 20x16 with 3 channels"),
        ("encode", (1, 5, 16, 16, 4), "16x16 with 4 channels"),
        ("decode", (1, 0, 2, 2, 16), "one frame or more"),
        ("decode", (1, 1, 2, 2, 4), "16 channels last"),
    ],
)
def test_impossible_clips_are_refused(direction, shape, message):
    net = network(TINY)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda params, x: getattr(net.bind(params), direction)(x),
            net.abstract,
            jax.ShapeDtypeStruct(shape, jnp.float32),
        )
