"""The action decoder in PyTorch computes the published numbers, and ours."""

import jax
import numpy as np
import pytest
from test_networks import decoder_config, load, relative_rms

from mvjax.flow import sample_actions, scale_noisy_actions
from mvjax.models.action_decoder import ActionDecoderConfig
from mvjax.models.presets import decoder_network
from mvjax.weights.kinds import decoder_rules
from mvjax.weights.names import action_decoder as decoder_names

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from launch.benchmarks.torch_networks import TorchActionDecoder, load_params  # noqa: E402


@pytest.fixture(scope="module")
def published():
    golden, c, tensors = load("action_decoder")
    config = decoder_config(c)
    decoder = TorchActionDecoder(config)
    decoder.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})
    return {name: torch.from_numpy(value) for name, value in golden.items()}, config, decoder


def velocity_of(decoder, golden):
    keys_values = decoder.context_keys_values(golden["in.context_bnd"])
    proprio, sigma = golden["in.state_bod"], golden["in.video_sigma_b1"]
    return lambda noisy, time: decoder(proprio, noisy, time, sigma, keys_values)


@torch.no_grad()
def test_it_loads_the_published_names_and_computes_the_published_velocity(published):
    golden, _, decoder = published
    velocity = velocity_of(decoder, golden)
    actions, noise, t = (golden[f"loss.{name}"] for name in ("actions", "noise", "t_b1"))
    x = (1 - t)[..., None] * actions + t[..., None] * noise
    noisy = x / ((1 - t) ** 2 + t**2).sqrt()[..., None]
    assert relative_rms(velocity(noisy, t), golden["loss.velocity"]) < 1e-5
    error = 10 * torch.nn.functional.mse_loss(velocity(noisy, t), noise - actions)
    assert relative_rms(error, golden["loss.mse_times_10"]) < 1e-5


@torch.no_grad()
def test_every_token_may_have_a_time_of_its_own(published):
    golden, _, decoder = published
    inputs = ("state_bod", "noisy_actions_bha", "timesteps_bt", "video_sigma_b1")
    inputs = [golden[f"in.{name}"] for name in inputs]
    kv = decoder.context_keys_values(golden["in.context_bnd"])
    assert relative_rms(decoder.tokens(*inputs, kv), golden["out.velocity_bta"]) < 1e-5
    dropped = decoder.tokens(*inputs, kv, torch.ones(2))
    assert relative_rms(dropped, golden["out.velocity_state_dropped"]) < 1e-5


@torch.no_grad()
def test_ten_euler_steps_give_the_published_actions(published):
    golden, _, decoder = published
    velocity, sample = velocity_of(decoder, golden), golden["sample.noise"]
    for t in np.cumsum([1.0] + [-0.1] * 9, dtype=np.float32):
        time = torch.full((len(sample), 1), t)
        scale = ((1 - time) ** 2 + time**2).sqrt()[..., None]
        sample = sample - velocity(sample / scale, time) / 10
    assert relative_rms(sample, golden["sample.actions_normalized"]) < 1e-5


@pytest.mark.parametrize("draws", [1, 3])
def test_it_computes_what_ours_does_with_our_weights(draws):
    config = ActionDecoderConfig(
        width=64,
        num_blocks=2,
        num_heads=4,
        context_dim=48,
        adaln_rank=8,
        time_rank=24,
        action_dim=5,
        action_horizon=6,
        proprio_dim=7,
        proprio_horizon=2,
    )
    network, rng = decoder_network(config), np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    params = jax.tree.map(
        lambda p: 0.3 * draw(*p.shape) + float(len(p.shape) == 1), network.abstract
    )
    context, noise = draw(2, 20, 48), draw(2 * draws, 6, 5)
    proprio, sigma = draw(2 * draws, 2, 7), np.exp(draw(2, 1)).repeat(draws, 0)
    net = network.bind(params)
    kv = net.context_keys_values(context)
    ours = sample_actions(lambda x, t: net(proprio, x, t, sigma, kv), noise, 3)

    theirs = TorchActionDecoder(config)
    load_params(theirs, params, decoder_rules(config))
    with torch.no_grad():
        their_kv = theirs.context_keys_values(torch.from_numpy(context))

    def velocity(noisy, time):
        args = (torch.tensor(np.asarray(a)) for a in (proprio, noisy, time, sigma))
        with torch.no_grad():
            return theirs(*args, their_kv).numpy()

    sample = noise
    for time in np.cumsum([1.0] + [-1 / 3] * 2, dtype=np.float32):
        time = np.full((len(sample), 1), time)
        sample = sample - velocity(scale_noisy_actions(sample, time), time) / 3
    assert relative_rms(sample, ours) < 1e-5


def test_every_published_name_is_known(published):
    _, config, decoder = published
    depth = 1  # linear layers of the embedders of this size
    rules = decoder_names(depth, depth)
    names = {rule.torch.replace("{i}", str(i)) for rule in rules for i in range(config.num_blocks)}
    assert set(decoder.state_dict()) == names
