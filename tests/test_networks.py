"""The networks, losses and samplers reproduce the published implementation's numbers."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published import to_params

from data_pipelines.clip import Clip
from mvjax import flow
from mvjax.flow import Sampling
from mvjax.models.action_decoder import ActionDecoder, ActionDecoderConfig, Embedder
from mvjax.models.layers import RMSNorm, gelu, layer_norm
from mvjax.models.network import Network
from mvjax.models.video_dit import VideoDiT, VideoDiTConfig
from mvjax.policy.policy import Scene, VideoActionModel
from mvjax.weights.names import action_decoder, video_dit

pytestmark = pytest.mark.usefixtures("quickly")
GOLDEN = Path(__file__).parent / "golden"


def relative_rms(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2)))


def last(x):
    """Channels first, as published, to channels last."""
    return jnp.asarray(np.moveaxis(np.asarray(x), 1, -1))


def load(name):
    arrays = dict(np.load(GOLDEN / f"{name}.npz"))
    config = json.loads(str(arrays.pop("meta")))["config"]
    tensors = {k.removeprefix("net."): v for k, v in arrays.items() if k.startswith("net.")}
    return arrays, config, tensors


@pytest.fixture(scope="module")
def dit():
    golden, c, tensors = load("video_dit")
    config = VideoDiTConfig(
        width=c["model_channels"],
        num_blocks=c["num_blocks"],
        num_heads=c["num_heads"],
        text_dim=c["text_dim"],
        adaln_rank=c["adaln_lora_dim"],
        rope_ratio_thw=tuple(c["rope"]),
    )
    network = Network(lambda key: VideoDiT(config, key))
    params = to_params(tensors, video_dit())
    chex.assert_trees_all_equal_shapes(params, network.abstract)
    return golden, c, network, params


def decoder_config(c):
    return ActionDecoderConfig(
        width=c["width"],
        num_blocks=c["blocks"],
        num_heads=c["heads"],
        context_dim=c["ctx"],
        adaln_rank=c["adaln"],
        time_rank=c["rank"],
        action_dim=c["adim"],
        action_horizon=c["horizon"],
        proprio_dim=c["adim"],
        proprio_horizon=c["obs"],
    )


def denoiser(network, params, text, clean, mask):
    """(noisy latents, σ) -> clean prediction, compiled."""

    @jax.jit
    def denoise(params, noisy, sigma):
        net = network.bind(params)
        return flow.denoise(lambda i: net(*i[:2], text, i[2]), noisy, clean, sigma, mask)

    return partial(denoise, params)


@pytest.fixture(scope="module")
def decoder():
    golden, c, tensors = load("action_decoder")
    config = decoder_config(c)
    network = Network(lambda key: ActionDecoder(config, key))
    params = to_params(tensors, action_decoder(1, 1))
    chex.assert_trees_all_equal_shapes(params, network.abstract)
    return golden, c, network, params


def test_video_dit_velocity_and_hidden_states(dit):
    golden, c, network, params = dit
    latents, text = last(golden["in.latents_bcthw"]), golden["in.text_bld"]
    mask, padding = golden["in.condition_mask_b1thw"][:, 0], golden["in.padding_mask_b1hw"][:, 0]

    @jax.jit
    def outputs(params):
        net = network.bind(params)
        inputs = latents, golden["in.timesteps_bt"], text, mask, padding
        hidden = [net.hidden(*inputs, layer=k) for k in range(c["num_blocks"] + 1)]
        return net(*inputs), net(latents, golden["in.timesteps_b1"], *inputs[2:]), hidden

    velocity, from_b1, hidden = outputs(params)
    assert relative_rms(velocity, last(golden["out.velocity_bcthw"])) < 1e-5
    assert relative_rms(from_b1, last(golden["out.velocity_from_b1"])) < 1e-5
    for k, ours in enumerate(hidden):
        theirs = golden[f"out.hidden_{k}_bthwd"]
        assert relative_rms(ours.reshape(theirs.shape), theirs) < 1e-5, k


def test_video_denoising_and_loss(dit):
    golden, c, network, params = dit
    x0, noise = last(golden["denoise.x0"]), last(golden["denoise.noise"])
    sigma, text = jnp.asarray(golden["denoise.sigma_b1"]), golden["in.text_bld"]
    mask = flow.condition_mask(jnp.full(c["B"], c["cond"]), c["T"])
    noisy = x0 + sigma[..., None, None, None] * noise
    prediction = denoiser(network, params, text, x0, mask)(noisy, sigma)
    assert relative_rms(prediction, last(golden["denoise.x0_pred"])) < 1e-5
    noise_prediction = (noisy - prediction) / sigma[..., None, None, None]
    assert relative_rms(noise_prediction, last(golden["denoise.eps_pred"])) < 1e-5
    assert relative_rms(flow.loss_weight(sigma), golden["denoise.loss_weight_b1"]) < 1e-5
    theirs = golden["denoise.weighted_sq_err_mean_per_sample"]
    assert relative_rms(flow.video_loss(x0, prediction, sigma), theirs) < 1e-5


def test_sigma_table_and_every_sampler_step(dit):
    golden, c, network, params = dit
    np.testing.assert_allclose(flow.karras_sigmas(35), golden["sampler.sigmas_35"], rtol=1e-12)
    sigmas = flow.karras_sigmas(c["steps"])
    np.testing.assert_allclose(sigmas, golden["sampler.sigmas"], rtol=1e-12)

    clean = last(golden["denoise.x0"])
    mask = flow.condition_mask(jnp.full(c["B"], c["cond"]), c["T"])
    denoise = denoiser(network, params, golden["in.text_bld"], clean, mask)

    @jax.jit
    def context(params, x, sigma):
        i = flow.network_input(x, clean, sigma, mask)
        net = network.bind(params)
        return net.hidden(*i[:2], golden["in.text_bld"], i[2], layer=c["layer"])

    here = flow.start(last(golden["sampler.noise"]), sigmas)
    expected = [*golden["sampler.samples_after_step"], golden["sampler.final_x0"]]
    for k, (sigma, coefficients) in enumerate(zip(*flow.schedule(sigmas))):
        sigma, theirs = jnp.full((c["B"], 1), sigma), golden["sampler.context_at_step"][k]
        ours = context(params, here.x, sigma)
        assert relative_rms(ours.reshape(theirs.shape), theirs) < 1e-5, k
        here = flow.advance(here, denoise(here.x, sigma), coefficients)
        assert relative_rms(here.x, last(expected[k])) < 1e-5, k


@pytest.mark.parametrize("k", [0, 1, 5])
def test_the_policy_reads_the_published_context(dit, decoder, k):
    """Without a step, after the first (which is Euler's), and after the last."""
    golden, c, network, params = dit
    clean = last(golden["denoise.x0"])
    _, t, h, w, _ = clean.shape
    clip = Clip(8 * h, 8 * w, observed_frames=1, future_frames=4 * (t - 1), fps=5.0)
    sampling = Sampling(video_steps=c["steps"], stop_step=k)
    model = VideoActionModel(clip, c["layer"], network, decoder[2], sampling)
    noise = last(golden["sampler.noise"])
    ours = jax.jit(model.context)(params, Scene(clean, {}), golden["in.text_bld"], noise)
    theirs = golden["sampler.context_at_step"][k]
    assert relative_rms(ours.reshape(theirs.shape), theirs) < 1e-5


def test_the_policy_samples_the_published_actions(dit, decoder):
    golden, _, network, params = decoder
    model = VideoActionModel(Clip(48, 64, 1, 8, 5.0), 2, dit[2], network, Sampling())
    context, sigmas, state = (
        golden[f"in.{k}"] for k in ("context_bnd", "video_sigma_b1", "state_bod")
    )
    noise, sample = golden["sample.noise"][:, None], jax.jit(model.actions)
    # A query has one noise level of the video; those of the golden samples differ.
    ours = [
        sample(params, context[i : i + 1], sigma, state[i : i + 1], noise[i : i + 1])[0, 0]
        for i, sigma in enumerate(sigmas[:, 0])
    ]
    assert relative_rms(np.stack(ours), golden["sample.actions_normalized"]) < 1e-5


def test_action_decoder_velocity_and_hidden_states(decoder):
    golden, c, network, params = decoder
    names = ("state_bod", "noisy_actions_bha", "timesteps_bt", "video_sigma_b1")
    inputs = [golden[f"in.{name}"] for name in names]

    @jax.jit
    def outputs(params, context):
        net = network.bind(params)
        kv = net.context_keys_values(context)
        hidden = [net.hidden(*inputs, kv, layer=k) for k in range(1, c["blocks"] + 1)]
        return net.tokens(*inputs, kv), net.tokens(*inputs, kv, jnp.ones(2)), hidden

    velocity, dropped, hidden = outputs(params, golden["in.context_bnd"])
    assert relative_rms(velocity, golden["out.velocity_bta"]) < 1e-5
    assert relative_rms(dropped, golden["out.velocity_state_dropped"]) < 1e-5
    for k, ours in enumerate(hidden, 1):
        assert relative_rms(ours, golden[f"out.hidden_{k}"]) < 1e-5, k


def test_action_loss_and_ten_euler_steps(decoder):
    golden, _, network, params = decoder
    actions, noise, t = (jnp.asarray(golden[f"loss.{k}"]) for k in ("actions", "noise", "t_b1"))
    noisy = flow.scale_noisy_actions((1 - t)[..., None] * actions + t[..., None] * noise, t)

    @jax.jit
    def outputs(params, context):
        net = network.bind(params)
        kv = net.context_keys_values(context)

        def velocity(noisy, time):
            return net(golden["in.state_bod"], noisy, time, golden["in.video_sigma_b1"], kv)

        loss = 10 * flow.action_loss(velocity, actions, noise, t).mean()
        sample = flow.sample_actions(velocity, jnp.asarray(golden["sample.noise"]), steps=10)
        return velocity(noisy, t), loss, sample

    velocity, loss, sample = outputs(params, golden["in.context_bnd"])
    assert relative_rms(velocity, golden["loss.velocity"]) < 1e-5
    assert relative_rms(loss, golden["loss.mse_times_10"]) < 1e-5
    assert relative_rms(sample, golden["sample.actions_normalized"]) < 1e-5


def test_draws_share_one_context(decoder):
    """r noise draws on one video pass give what r separate passes give."""
    golden, _, network, params = decoder
    one = [golden[f"in.{k}"] for k in ("state_bod", "noisy_actions_bha", "timesteps_bt")]
    two = [np.stack([x, x[:, ::-1] * 0.5], axis=1).reshape(-1, *x.shape[1:]) for x in one]
    sigma = golden["in.video_sigma_b1"]

    @jax.jit
    def outputs(params, context):
        net = network.bind(params)
        kv = net.context_keys_values(context)
        alone = [net.tokens(*[x[r::2] for x in two], sigma, kv) for r in range(2)]
        return net.tokens(*two, sigma.repeat(2, axis=0), kv), alone

    both, alone = outputs(params, golden["in.context_bnd"])
    for r in range(2):
        np.testing.assert_allclose(both[r::2], alone[r], rtol=1e-5, atol=1e-6)


def test_modulation_of_all_steps_at_once_is_that_of_each_step(decoder):
    """A level made beside others gives what the decoder gives at its action time."""
    golden, _, network, params = decoder
    proprio, noisy = golden["in.state_bod"], golden["in.noisy_actions_bha"]
    times, sigma = flow.euler_times(3), np.float32(2.5)

    @jax.jit
    def both(params, context):
        net = network.bind(params)
        kv, levels = net.context_keys_values(context), net.levels(times, sigma)
        column = lambda x: jnp.full((len(proprio), 1), x)  # noqa: E731
        return [
            (
                net.at_levels(jax.tree.map(lambda m, i=i: m[i], levels), proprio, noisy, kv),
                net(proprio, noisy, column(time), column(sigma), kv),
            )
            for i, time in enumerate(times)
        ]

    for ours, alone in both(params, golden["in.context_bnd"]):
        assert relative_rms(ours, alone) < 1e-6


def test_gradients_of_norms_are_those_of_their_formulas():
    """Norms have gradients of their own; autodiff of the formula is the reference."""

    def rms(x, scale):
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale

    def centred(x, scale):
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        return rms(x, jnp.ones_like(scale))

    def rms_norm(x, scale):
        norm = RMSNorm(x.shape[-1])
        norm.scale[...] = scale
        return norm(x)

    rng = np.random.default_rng(0)
    x, weight = (rng.normal(3, 2, (2, 5, 4, 8)).astype(np.float32) for _ in range(2))
    scale = rng.normal(1, 0.5, 8).astype(np.float32)
    pairs = (rms_norm, rms), (lambda x, scale: layer_norm(x), centred)
    for ours, formula in pairs:
        theirs, given = (
            jax.jit(jax.grad(lambda x, s, f=f: jnp.sum(weight * f(x, s)), argnums=(0, 1)))(x, scale)
            for f in (formula, ours)
        )
        for a, b in zip(given, theirs):
            assert np.linalg.norm(a - b) <= 2e-6 * np.linalg.norm(b) + 1e-12
        # In bfloat16 a gradient is rounded once.
        narrow = jax.grad(lambda x, f=ours: jnp.sum(weight * f(x, scale).astype(jnp.float32)))
        rounded = jnp.asarray(x, jnp.bfloat16)
        wide = jax.grad(lambda x, f=formula: jnp.sum(weight * f(x, scale)))
        assert relative_rms(narrow(rounded), wide(rounded.astype(jnp.float32))) < 4e-3


def is_jaxpr(value):
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def executions(jaxpr, name):
    """Equations of a primitive, with how often each is executed."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            yield equation, 1
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        assert equation.primitive.name != "while", "the number of iterations cannot be read"
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                inner = getattr(inner, "jaxpr", inner)
                yield from ((e, times * n) for e, n in executions(inner, name))


@pytest.mark.parametrize("steps", [1, 10])
def test_keys_and_values_of_the_context_are_computed_once_per_query(decoder, steps):
    """However many Euler steps: two products with the context per block, its keys and values."""
    golden, c, network, params = decoder

    def query(params, context, noise):
        net = network.bind(params)
        kv = net.context_keys_values(context)
        state, sigma = golden["in.state_bod"], golden["in.video_sigma_b1"]
        return flow.sample_actions(lambda x, t: net(state, x, t, sigma, kv), noise, steps)

    jaxpr = jax.make_jaxpr(query)(params, golden["in.context_bnd"], golden["sample.noise"]).jaxpr
    width, reading, attending = c["ctx"], 0, 0
    for equation, times in executions(jaxpr, "dot_general"):
        (contracted,), _ = equation.params["dimension_numbers"][0]
        reading += times * (equation.invars[0].aval.shape[contracted] == width)
        attending += times * (c["N"] in equation.outvars[0].aval.shape[2:])
    assert reading == 2 * c["blocks"]
    assert attending == steps * c["blocks"]


def test_modulation_is_never_copied_to_every_token(dit):
    """Broadcasting happens in the products, so the gradient keeps per-frame vectors, too."""
    golden, c, network, params = dit
    b, t, tokens = c["B"], c["T"], c["T"] * c["H"] * c["W"] // 4
    latents, text, mask = last(golden["in.latents_bcthw"]), golden["in.text_bld"], jnp.zeros((b, t))
    for times in (jnp.ones((b, t)), jnp.ones((b, 1))):
        jaxpr = jax.make_jaxpr(network.bind(params))(latents, times, text, mask).jaxpr
        sizes = [e.outvars[0].aval.size for e, _ in executions(jaxpr, "broadcast_in_dim")]
        assert sizes and max(sizes) < b * tokens * c["model_channels"]


def test_text_projection_and_time_scale_of_predict25(dit):
    golden, c, network, params = dit
    config = dataclasses.replace(network.config, text_projection_dim=40, timestep_scale=0.001)
    projecting = Network(lambda key: VideoDiT(config, key))
    draw = np.random.default_rng(0).normal
    projection = {
        name: 0.2 * draw(size=p.shape).astype(np.float32)
        for name, p in projecting.abstract["text_projection"].items()
    }
    text = draw(size=(c["B"], c["L"], 40)).astype(np.float32)
    latents, times = last(golden["in.latents_bcthw"]), golden["in.timesteps_bt"]
    mask = golden["in.condition_mask_b1thw"][:, 0]

    @jax.jit
    def outputs(params, projection):
        net = projecting.bind({**params, "text_projection": projection})
        projected = gelu(text @ projection["kernel"] + projection["bias"])
        other = network.bind(params).hidden(latents, times, projected, mask, layer=1)
        return net.hidden(latents, times * 1000, text, mask, layer=1), other

    ours, theirs = outputs(params, projection)
    assert relative_rms(ours, theirs) < 1e-5


def test_embedders_start_as_kaiming_uniform():
    embedder = Embedder(jax.random.key(0), 10, 1024)
    for layer, fan_in, squared_gain in (("layer0", 10, 2), ("layer1", 47, 2), ("layer2", 220, 1)):
        kernel, variance = getattr(embedder, layer).kernel[...], squared_gain / fan_in
        assert kernel.shape[0] == fan_in and jnp.abs(kernel).max() <= np.sqrt(3 * variance)
        np.testing.assert_allclose(kernel.var(), variance, rtol=0.15)


def test_published_noise_is_numpys():
    noise = flow.published_noise(0, (1, 2, 3, 4, 16))
    np.testing.assert_array_equal(
        noise[0, :, :, :, 0].ravel()[:3], np.float32([1.7640524, 0.4001572, 0.978738])
    )


def test_inputs_that_would_broadcast_are_refused(dit, decoder):
    """One time, mask or noise level for a whole batch would be computed with, in silence."""
    golden, _, network, params = dit
    net, one = network.bind(params), slice(0, 1)
    times, text = golden["in.timesteps_bt"], golden["in.text_bld"]
    latents, mask = last(golden["in.latents_bcthw"]), golden["in.condition_mask_b1thw"][:, 0]
    for wrong in ((times[one], text, mask), (times, text[one], mask), (times, text, mask[one])):
        with pytest.raises(AssertionError, match="shape"):
            jax.eval_shape(net, latents, *wrong)
    golden, _, network, params = decoder
    net = network.bind(params)
    names = ("state_bod", "noisy_actions_bha", "video_sigma_b1", "context_bnd")
    state, noisy, sigma, context = (golden[f"in.{name}"] for name in names)
    time = jnp.ones((len(state), 1))
    for wrong in (
        (state, noisy[..., :1], time, sigma),
        (state, noisy, time[one], sigma),
        (state, noisy, time, sigma[one]),
    ):
        with pytest.raises(AssertionError, match="shape"):
            jax.eval_shape(net, *wrong, context)
