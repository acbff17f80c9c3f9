"""The quickstart's configurations, with every argument they document, describe networks that fit.

The published ones are in test_published_configs.py.
"""

import importlib
import json
from pathlib import Path

import jax
import pytest
from absl import flags
from ml_collections import config_flags
from tiny_stages import build_stage, tiny_config

from configs import camera_study, quickstart
from data_pipelines.clip import Clip
from data_pipelines.records import entry
from launch.benchmarks import cameras
from mvjax.experiment import Experiment
from mvjax.flow import Sampling
from mvjax.parallel import make_mesh
from mvjax.policy.observation import control_stride
from mvjax.training.objectives import make_stage
from mvjax.training.run import run
from mvjax.training.step import make_schedule

pytestmark = pytest.mark.usefixtures("quickly")
CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("quickstart*.py"))
SIZES = ("", "full", "smoke", "smoke,tiled", "smoke,observed")


def get(name, size=""):
    return importlib.import_module(f"configs.{name}").get_config(size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_lengths_and_widths_agree(name, size):
    config = get(name, size)
    clip, video = Clip(**config.clip), Experiment.from_config(config).video
    decoder = Experiment.from_config(config).decoder
    assert decoder.context_dim == video.width and 1 <= config.context_layer <= video.num_blocks
    assert video.text_dim == config.text.dim and video.latent_channels == clip.latent_shape[-1]
    assert decoder.action_horizon == config.policy_io.action.horizon
    make_schedule(config.optimizer)
    make_mesh(config.mesh)
    settings, protocol = config.training, config.evaluation
    assert 1 <= settings.checkpoint_every <= settings.steps and settings.log_every >= 1
    assert config.optimizer.decay_steps == settings.steps
    # The policy plans at least as far as is executed, and every stream is on the control grid.
    assert protocol.execute <= config.policy_io.action.horizon
    control_hz = config.policy_io.action.fps
    for fps in (clip.fps, config.policy_io.proprio.fps):
        control_stride(control_hz, fps)
    assert 0 <= protocol.oracle_step <= Sampling(**config.sampler).video_steps
    assert {d.name for d in config.datasets.values()} == set(config.recording)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "quickstart"])
def test_stages_take_the_batches_that_the_lengths_say(name, size):
    config = get(name, size)
    if config.stage == "action":
        config.backbone.checkpoint = ""
    stage = build_stage(config)[0]
    samples, io = config.training.batch_size, config.policy_io
    shapes = {
        "latents": Clip(**config.clip).latent_shape,
        "text": (config.text.length, config.text.dim),
        "actions": (io.action.horizon, io.action.dim),
        "action_mask": (io.action.horizon, io.action.dim),
        "proprio": (io.proprio.horizon, io.proprio.dim),
    }
    shapes |= {entry(view): shape for view, shape in Clip(**config.clip).view_shapes.items()}
    batch = {
        name: jax.ShapeDtypeStruct((samples, *shapes[name]), "float32") for name in stage.batch_axes
    }
    params = jax.eval_shape(stage.init, jax.random.key(0))
    loss, metrics = jax.eval_shape(stage.loss, params, stage.frozen, batch, jax.random.key(0))
    assert loss.shape == () and loss.dtype == "float32"
    if config.stage != "joint":
        assert set(metrics) == {"velocity_mse", "by_level"}
        return
    assert set(metrics["by_level"]) == {"video", "action"}
    named = {"video/velocity_mse", "action/velocity_mse", "action/share", "by_level"}
    assert set(metrics) == named


def test_the_run_folder_moves_every_path():
    config = get("quickstart_action")
    config.run_dir = "elsewhere"
    paths = [config.tokenizer, config.backbone.checkpoint]
    for dataset in config.datasets.values():
        paths += [dataset.path, dataset.records]
    assert all(path.startswith("elsewhere/") for path in paths), paths


def test_settings_on_the_command_line(monkeypatch):
    arguments = [
        "train",
        f"--config={CONFIGS / 'quickstart_video.py'}:smoke",
        "--config.clip.height=128",
        "--config.lora.rank=8",
        "--config.training.episodes_per_task=3",
        "--config.mesh.fsdp=4",
    ]
    monkeypatch.setattr("sys.argv", arguments)
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values)
    values(arguments)
    config = holder.value
    assert config.size == "smoke" and Clip(**config.clip).latent_shape == (4, 16, 8, 16)
    assert Experiment.from_config(config).video.lora.rank == 8
    assert (config.training.episodes_per_task, config.mesh.fsdp) == (3, 4)


def test_the_policies_of_the_camera_study_differ_in_their_cameras_alone():
    """And read the same demonstrations, which are recorded once with both cameras."""
    said = [phase.command for phase in cameras.phases("out")]
    assert len(said) == 1 + 6 * 3 and said[0][-1] == "--cameras=corner,gripper"
    shown = {}
    for stage in ("video", "action"):
        configs = [camera_study.get_config(f"{stage},{word}") for word in quickstart.CAMERAS]
        shown[stage] = [Experiment.from_config(config).tokens for config in configs]
        for config in configs:
            config.run_dir = "out"
        single, *others = (json.loads(config.to_json()) for config in configs)
        for other in others:
            assert [*other["datasets"]] == ["robot"]
            for section in (other["clip"], other["datasets"]["robot"]):
                section.pop("views", None)
            other["clip"]["width"] = single["clip"]["width"]
            other["datasets"]["robot"]["video"] = single["datasets"]["robot"]["video"]
            assert other["recording"]["robot"].pop("cameras") == ["corner", "gripper"]
            assert other == single
    assert shown["video"] == shown["action"] == [64, 128, 96]
    with pytest.raises(ValueError, match="stage must be video or action, got 'policy'"):
        camera_study.get_config("policy,tiled")


def test_an_unknown_size_is_explained():
    for name in NAMES:
        with pytest.raises(ValueError, match="size must be full or smoke, got 'huge'"):
            get(name, "huge")
        with pytest.raises(ValueError, match="single, tiled, observed, got 'stacked'"):
            get(name, "smoke,stacked")


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("clip.observed_frames", 6, r"observed_frames must be 1 \+ 4k .* got 6"),
        ("clip.future_frames", 6, r"future_frames must be a positive multiple of 4, got 6"),
        ("clip.height", 40, r"clip.height must be a multiple of 16 pixels, got 40"),
        ("policy_io.action.horizon", 0, r"policy_io.action.horizon must be .* at least 1, got 0"),
        ("policy_io.proprio.horizon", 0, r"policy_io.proprio.horizon must be .* at least 1, got 0"),
        ("context_layer", 5, r"context_layer is 5, but the video model has blocks 1 to 2"),
        ("context_layer", -1, r"context_layer must be .* at least 0, got -1"),
        ("lora.rank", -1, r"lora.rank must be .* at least 0, got -1"),
        ("video_model.num_heads", 5, r"width 48 is not a multiple of num_heads 5"),
        ("video_model.num_heads", 6, r"head_dim of 12 or more"),
        ("video_model.num_heads", 16, r"head_dim"),
        ("video_model.precision", "half", r"precision must be one of .* got 'half'"),
        ("video_model.text_dim", 24, r"takes text of width 24 .* but text.dim is 16"),
        ("video_model.timestep_scale", 0.001, r"timestep_scale is 0.001, but .* use 1.0"),
        ("decoder.num_heads", 5, r"width 32 is not a multiple of num_heads 5"),
    ],
)
def test_impossible_settings_are_said_before_any_data_is_read(setting, value, message, tmp_path):
    """The records do not exist here, so anything later would be another error."""
    config = tiny_config("action", steps=1)
    config.update_from_flattened_dict({setting: value})
    with pytest.raises(ValueError, match=message) as error:
        run(Experiment.from_config(config), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_impossible_stage_settings_are_explained():
    for stage, setting, value, message in (
        ("video", "flow.min_condition_latents", 3, r"is 3; with 5 observed .* between 1 and 2"),
        ("action", "flow.action_draws", 0, r"flow.action_draws must be .* at least 1, got 0"),
    ):
        config = tiny_config(stage)
        config.update_from_flattened_dict({setting: value})
        with pytest.raises(ValueError, match=message):
            build_stage(config)
    config = tiny_config("video")
    config.stage = "both"
    with pytest.raises(ValueError, match="must be 'video', 'action' or 'joint', got 'both'"):
        make_stage(Experiment.from_config(config), None)


def test_missing_records_are_named(tmp_path):
    config = tiny_config("video", steps=1)
    config.run_dir = str(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"records/robot holds no records: run "):
        run(Experiment.from_config(config), tmp_path / "video")
