"""The benchmark measures the real step, and PyTorch's beside it where it is installed."""

import json

import pytest
from tiny_stages import tiny_config

from launch.benchmarks.training_speed import OurStep, compare
from mvjax.experiment import Experiment

pytestmark = pytest.mark.usefixtures("quickly")


@pytest.mark.parametrize("stage", ["video", "action"])
def test_our_step_is_measured(stage):
    config = tiny_config(stage)
    (speed,) = compare([OurStep(Experiment.from_config(config))], steps=1, rounds=2)
    assert speed.name == "mvjax" and len(speed.seconds_per_step) == 2
    assert 0 < min(speed.seconds_per_step) < speed.prepare_seconds
    assert speed.mfu is None  # of a CPU nothing is known
    json.dumps(speed.as_dict())


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
