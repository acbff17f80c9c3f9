"""Precisions: how far bfloat16 is from float32, and which roundings of the release it repeats."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_networks import GOLDEN, decoder, dit, last, relative_rms  # noqa: F401

from mvjax import flow
from mvjax.models.network import Network
from mvjax.models.presets import ACTION_DECODERS, VIDEO_DITS
from mvjax.models.rope import rope_table

pytestmark = pytest.mark.usefixtures("quickly")
NARROW = ("bfloat16", "published")
BOUND = 1.5e-2  # of the whole network, relative rms; bfloat16 rounds to 4e-3


def in_precision(network, precision, params):
    """The network computed in a precision, its parameters stored as a frozen backbone's are."""
    config = dataclasses.replace(network.config, precision=precision)
    module = type(network.bind(params))
    network = Network(lambda key: module(config, key))
    return network.bind(jax.tree.map(lambda p: jnp.asarray(p, config.dtype), params))


def dit_inputs(golden):
    mask, padding = golden["in.condition_mask_b1thw"][:, 0], golden["in.padding_mask_b1hw"][:, 0]
    times, text = jnp.asarray(golden["in.timesteps_bt"]), golden["in.text_bld"]
    return last(golden["in.latents_bcthw"]), times, text, mask, padding


def call(net, *inputs):
    return jax.jit(lambda net, *inputs: net(*inputs))(net, *inputs)


@pytest.mark.parametrize("config", [VIDEO_DITS["tiny"], ACTION_DECODERS["tiny"]])
def test_an_unknown_precision_is_explained(config):
    with pytest.raises(ValueError, match="one of float32, bfloat16, published; got 'float16'"):
        dataclasses.replace(config, precision="float16")


@pytest.mark.parametrize("precision", NARROW)
def test_video_dit_in_bfloat16_is_near_float32(dit, precision):  # noqa: F811
    golden, c, network, params = dit
    net, inputs = in_precision(network, precision, params), dit_inputs(golden)
    velocity = call(net, *inputs)
    assert velocity.dtype == "float32"
    assert relative_rms(velocity, last(golden["out.velocity_bcthw"])) < BOUND
    hidden = net.hidden(*inputs, layer=c["layer"])
    assert hidden.dtype == "bfloat16"
    theirs = golden[f"out.hidden_{c['layer']}_bthwd"]
    assert relative_rms(hidden.reshape(theirs.shape), theirs) < BOUND


def test_published_precision_is_the_release_in_bfloat16(dit):  # noqa: F811
    """Against NVIDIA's network in bfloat16: nearer than that is to itself in float32."""
    golden, c, network, params = dit
    theirs = np.load(GOLDEN / "video_dit_bfloat16.npz")
    net, inputs = in_precision(network, "published", params), dit_inputs(golden)
    velocity = last(theirs["out.velocity_bcthw"])
    rounding = relative_rms(velocity, last(golden["out.velocity_bcthw"]))
    assert relative_rms(call(net, *inputs), velocity) < 0.85 * rounding
    for k in range(1, c["num_blocks"] + 1):
        wide, narrow = (source[f"out.hidden_{k}_bthwd"] for source in (golden, theirs))
        hidden = net.hidden(*inputs, layer=k).reshape(narrow.shape)
        assert relative_rms(hidden, narrow) < 0.85 * relative_rms(narrow, wide), k


@pytest.mark.parametrize(("precision", "equal"), [("bfloat16", False), ("published", True)])
def test_only_published_times_are_rounded_before_their_sinusoid(dit, precision, equal):  # noqa: F811
    golden, _, network, params = dit
    latents, _, text, *masks = (x[:1].repeat(2, axis=0) for x in dit_inputs(golden))
    times = jnp.asarray([[0.9865], [0.9882]])  # in bfloat16 both are 0.98828125
    net = in_precision(network, precision, params)
    one, other = net.hidden(latents, times, text, *masks, layer=1)
    assert np.array_equal(one, other) == equal


@pytest.mark.parametrize(
    ("grid", "error_thw"),
    [((16, 30, 40), (0.042, 0.093, 0.093)), ((24, 44, 80), (0.065, 0.093, 0.187))],
)
def test_published_rotary_angles_are_off_by_as_much_as_the_release(grid, error_thw):
    """Largest angle errors of the release's buffers, measured on its own code, in radians."""
    (cos, sin), (other_cos, other_sin) = (
        rope_table(grid, 128, (1.0, 3.0, 3.0), dtype) for dtype in ("bfloat16", "float32")
    )
    errors = np.abs(
        np.arctan2(sin * other_cos - cos * other_sin, cos * other_cos + sin * other_sin)
    )
    by_axis = [part.max() for part in np.split(errors, [22, 43], axis=-1)]
    np.testing.assert_allclose(by_axis, error_thw, atol=6e-4)


def test_published_rotary_angles_are_torchs():
    torch = pytest.importorskip("torch", reason="compares with torch's bfloat16 arithmetic")
    exponent = (torch.arange(0, 44, 2).float() / 44).bfloat16()
    angle = torch.outer(torch.arange(16).bfloat16(), 1.0 / 10000.0**exponent).float()
    cos, sin = rope_table((16, 1, 1), 128, (1.0, 3.0, 3.0), "bfloat16")
    np.testing.assert_allclose(cos[:, :22], angle.cos(), atol=1e-6)
    np.testing.assert_allclose(sin[:, :22], angle.sin(), atol=1e-6)


def test_video_samples_stay_float32_and_near_in_published_precision(dit):  # noqa: F811
    golden, c, network, params = dit
    net = in_precision(network, "published", params)
    x0, noise = last(golden["denoise.x0"]), last(golden["sampler.noise"])
    mask = flow.condition_mask(jnp.full(c["B"], c["cond"]), c["T"])
    text, sigmas = golden["in.text_bld"], flow.karras_sigmas(c["steps"])

    def denoise(x, sigma):
        return flow.denoise(lambda i: net(*i[:2], text, i[2]), x, x0, sigma, mask)

    sample = flow.sample_video(denoise, flow.start(noise, sigmas), sigmas, last=c["steps"]).x
    assert sample.dtype == "float32"
    assert relative_rms(sample, last(golden["sampler.samples_after_step"][-1])) < BOUND


@pytest.mark.parametrize(("precision", "bound"), [("bfloat16", 1.2e-2), ("published", 2e-2)])
def test_action_decoder_in_bfloat16_is_near_float32(decoder, precision, bound):  # noqa: F811
    """The time embedding's roundings are a third of the release's error, and not in ours."""
    golden, _, network, params = decoder
    net = in_precision(network, precision, params)
    names = ("state_bod", "noisy_actions_bha", "timesteps_bt", "video_sigma_b1")
    state, noisy, times, sigma = (golden[f"in.{k}"] for k in names)
    kv = net.context_keys_values(jnp.asarray(golden["in.context_bnd"]))
    assert all(x.dtype == "bfloat16" for x in kv)
    velocity = net.tokens(state, noisy, times, sigma, kv)
    assert relative_rms(velocity, golden["out.velocity_bta"]) < bound

    # The release keeps the sample in bfloat16 between the Euler steps; ours has its noise's dtype.
    noise = jnp.asarray(golden["sample.noise"], "bfloat16" if precision == "published" else None)
    chunk = flow.sample_actions(lambda x, t: net(state, x, t, sigma, kv), noise, steps=10)
    assert chunk.dtype == noise.dtype
    assert relative_rms(chunk, golden["sample.actions_normalized"]) < BOUND
