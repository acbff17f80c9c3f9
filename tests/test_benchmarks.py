"""The benchmarks measure what they say, and PyTorch computes the same where it is installed."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from test_networks import relative_rms
from tiny_policy import random_observation, tiny_policy
from tiny_stages import tiny_config

from configs import bridge_action
from data_pipelines.clip import Clip
from data_pipelines.normalize import Normalizer
from data_pipelines.statistics import column_statistics, compute_statistics
from launch.benchmarks import policy_speed
from launch.benchmarks.data import (
    NumberShards,
    clip_bytes,
    decoding_speed,
    make_records,
    make_videos,
    memory_over_time,
    records_speed,
    statistics_seconds,
)
from launch.benchmarks.policy_speed import NoiseTextEncoder, random_observations, untrained_policy
from launch.benchmarks.training_speed import OurStep, compare
from mvjax.experiment import Experiment
from mvjax.flow import Sampling
from mvjax.models.network import Network
from mvjax.models.presets import (
    WAN_VAES,
)
from mvjax.models.wan_vae import WanVAE
from mvjax.policy.policy import Policy, VideoActionModel

pytestmark = pytest.mark.usefixtures("quickly")


@pytest.mark.parametrize("stage", ["video", "action"])
def test_our_step_is_measured(stage):
    config = tiny_config(stage)
    (speed,) = compare([OurStep(Experiment.from_config(config))], steps=1, rounds=2)
    assert speed.name == "mvjax" and len(speed.seconds_per_step) == 2
    assert 0 < min(speed.seconds_per_step) < speed.prepare_seconds
    assert speed.mfu is None  # of a CPU nothing is known
    json.dumps(asdict(speed))


@pytest.mark.parametrize("stage", ["video", "action"])
def test_pytorch_is_measured_in_turns(stage):
    pytest.importorskip("torch", reason="torch is not installed (requirements-torch.txt)")
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from launch.benchmarks.torch_peer import TorchStep

    config = tiny_config(stage)
    ours = OurStep(Experiment.from_config(config))
    speeds = compare(
        [ours, TorchStep(Experiment.from_config(config), ours.flops, compiled=False)],
        steps=1,
        rounds=2,
    )
    assert [speed.name for speed in speeds] == ["mvjax", "PyTorch"]
    assert all(min(speed.seconds_per_step) > 0 for speed in speeds)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "records"
    return make_records(path, Clip(32, 48, 5, 8, 5.0), (6, 4), count=60)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return make_videos(tmp_path_factory.mktemp("benchmark") / "videos", 2, 12)


def test_records_have_the_size_of_the_clip(records):
    assert len(records) == 60
    assert records[0]["latents"].shape == (4, 4, 6, 16)
    assert records.text(0).shape == (6, 4) and np.all(records.text(0)[-1] != 0)
    assert len(records.instructions) == 20
    assert clip_bytes(records) == 2 * (4 * 4 * 6 * 16 + 6 * 4)
    different = {records[i]["latents"].tobytes() for i in range(0, 60, 3)}
    assert len(different) > 1


def test_both_sides_are_measured(records, videos):
    for pair in (records_speed(records, 2, 2), decoding_speed(videos, 2, 2)):
        assert len(pair.ours) == len(pair.alone) == 2
        assert all(turn.speed > 0 and turn.cpu_ms >= 0 for turn in pair.ours + pair.alone)
        assert pair.speed_ratio > 0


def test_statistics_are_those_of_the_rows(tmp_path):
    numbers = NumberShards(tmp_path / "numbers", 60_000, (2, 3))
    whole = np.concatenate([part["actions"] for part in numbers.shard_columns("actions")])
    assert whole.shape == (60_000, 2, 3)
    found = column_statistics([(numbers, np.arange(60_000))], "actions", tmp_path / "scratch")
    np.testing.assert_allclose(found["std"], compute_statistics(whole)["std"])
    assert statistics_seconds(tmp_path / "timed", 100, (2, 3)) > 0


def test_memory_is_watched(records, videos):
    points = memory_over_time(records, videos, 1.5, points=5)
    assert 2 <= len(points) <= 5
    assert points[-1][0] == pytest.approx(1.5) and min(mb for _, mb in points) > 10


PARTS = ["prepare", "encode", "video", "context", "actions", "fetch", "query"]


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    monkeypatch.setattr(policy_speed, "TURN_SECONDS", 0.0)


def test_every_part_and_the_whole_are_measured():
    """And the query that is measured is the policy's answer."""
    config = tiny_config("action")
    (batch,) = policy_speed.measure_policy(
        Experiment.from_config(config), [2], stop_step=0, rounds=2, peer_of=None
    )
    (ours,) = batch.answers
    assert list(ours.parts) == PARTS
    assert all(0 < part.p50 <= part.p95 for part in ours.parts.values())
    assert ours.parts["query"].mfu is None  # of a CPU nothing is known
    by_part = [ours.parts[name].tflop for name in PARTS[1:5]]
    assert ours.parts["query"].tflop == pytest.approx(sum(by_part)) and min(by_part) > 0
    assert ours.queries_per_second == pytest.approx(2e3 / ours.parts["query"].p50)
    json.dumps(batch.as_dict())
    assert "queries/s" in policy_speed.policy_table(batch)
    policy = untrained_policy(
        Experiment.from_config(config), Sampling(**{**config.sampler, "fresh_noise": False}), 2
    )
    expected = policy.act(random_observations(policy, 2))
    np.testing.assert_allclose(ours.actions, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "sampling",
    [dict(), dict(stop_step=2, draws=3), dict(stop_step=3)],
    ids=["one pass", "denoised, of three draws", "denoised fully"],
)
def test_pytorch_computes_the_same_actions(sampling):
    pytest.importorskip("torch", reason="torch is not installed (requirements-torch.txt)")
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from launch.benchmarks.torch_peer import TorchPolicy

    policy, _ = tiny_policy(batch_size=2)
    policy = policy.sampled(Sampling(video_steps=3, action_steps=2, **sampling))
    observations = [random_observation(i) for i in range(2)]
    parts = policy_speed.their_parts(TorchPolicy(policy, compiled=False), observations)
    assert relative_rms(parts["query"].run(None), policy.act(observations)) < 1e-5
    answers = policy_speed.measure({"PyTorch": parts}, policy, 1)
    assert list(answers[0].parts) == PARTS


def test_pytorch_encodes_by_the_wan_vae_too():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    import jax
    from published import CONFIGS

    from launch.benchmarks.torch_networks import TorchWanVAE, load_params
    from mvjax.weights.kinds import VAE
    from mvjax.weights.names import wan_vae_diffusers

    network = VAE.network(CONFIGS["vae"])
    params = network.init(jax.random.key(0))
    theirs = TorchWanVAE(network.config)
    load_params(theirs.net, params, wan_vae_diffusers(network.config))
    video = np.random.default_rng(0).uniform(-1, 1, (1, 5, 32, 48, 3)).astype(np.float32)
    with torch.no_grad():
        latents = theirs(torch.from_numpy(video))
    assert relative_rms(latents, network.bind(params).encode(video)) < 1e-5


def test_the_work_of_a_query_of_the_released_sizes():
    """From shapes alone: 107 TFLOP to block 20, 3.9 for keys and values, 6 for five frames."""
    config = bridge_action.get_config()
    vae = Network(lambda key: WanVAE(WAN_VAES["wan21"], key))
    backbone, decoder = (
        Experiment.from_config(config).video_network,
        Experiment.from_config(config).decoder_network,
    )
    model = VideoActionModel(Clip(**config.clip), 20, backbone, decoder, Sampling())
    weights = vae.bind(vae.abstract), backbone.abstract, decoder.abstract
    text = NoiseTextEncoder(config.text.length, config.text.dim)
    policy = Policy(model, weights, text, Normalizer({}, {}), 1)
    tflop = {part: flops / 1e12 for part, flops in policy_speed.part_flops(policy).items()}
    assert tflop["video"] == pytest.approx(107, abs=1)
    # 7.8 by the usual count (published: 8); the compiler leaves out what meets the causal zeros
    # before the first frame, 3 of the 15 temporal taps of five frames.
    assert tflop["encode"] == pytest.approx(7.8 * 12 / 15, abs=0.1)
    assert tflop["context"] == pytest.approx(3.87, abs=0.01)
    assert tflop["actions"] == pytest.approx(0.4, abs=0.1)
    assert tflop["query"] == pytest.approx(sum(tflop.values()) - tflop["query"])


def test_a_batch_that_does_not_fit_is_reported(monkeypatch):
    memory = type("Memory", (), {"available": 1000})
    monkeypatch.setattr(policy_speed.psutil, "virtual_memory", lambda: memory)
    config = tiny_config("action")
    (batch,) = policy_speed.measure_policy(
        Experiment.from_config(config), [1, 2], stop_step=0, rounds=1, peer_of=None
    )
    assert batch.size == 1 and not batch.answers
    assert "A batch of 1 does not fit: it needs" in policy_speed.policy_table(batch)


def test_only_stage_two_makes_a_policy():
    with pytest.raises(ValueError, match=r"trains a decoder .*'video'"):
        untrained_policy(Experiment.from_config(tiny_config("video")), Sampling())


def test_the_command_writes_its_figures(command, tmp_path):
    config = "configs/quickstart_action.py:smoke"
    said = command(
        "launch.benchmarks.speed",
        f"--config={config}",
        "--policy",
        "--batches=1",
        "--rounds=1",
        "--notorch",
        "--config.video_model.num_blocks=1",
        "--config.video_model.width=48",
        "--config.context_layer=1",
        "--config.decoder.num_blocks=1",
        "--config.decoder.width=32",
        "--config.sampler.action_steps=1",
        f"--out={tmp_path / 'figures.json'}",
    )
    assert said.code == 0, said.err
    (batch,) = json.loads((tmp_path / "figures.json").read_text())["batches"]
    assert list(batch["answers"][0]["parts"]) == PARTS
