"""The published configurations, with every argument they document, say what was published."""

import importlib
import itertools
import math
import shlex
from functools import cache
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from configs import mimic_video
from data_pipelines.cameras import dataset_views
from data_pipelines.clip import Clip, tokens
from data_pipelines.embodiments import libero_panda, widowx
from data_pipelines.records import entry
from data_pipelines.representations import Mode
from data_pipelines.settings import differences
from data_pipelines.vectors import dims, modes, parse, streams
from mvjax.evaluation.record import feature_of
from mvjax.evaluation.suites import libero
from mvjax.experiment import Experiment
from mvjax.flow import Sampling
from mvjax.models.network import Network, split
from mvjax.models.presets import (
    ACTION_DECODERS,
    VIDEO_DITS,
    decoder_network,
    video_network,
)
from mvjax.parallel import make_mesh
from mvjax.policy.observation import control_stride
from mvjax.policy.robot import same_aspect
from mvjax.training.bridge import abstract_backbone
from mvjax.training.objectives import make_stage
from mvjax.training.step import make_schedule

CONFIGS = Path(mimic_video.__file__).parent
SUITES = mimic_video.LIBERO_SUITES
SUITE_AND_SHARE = [",".join(p) for p in itertools.product(SUITES, mimic_video.LIBERO_SHARES)]
ARGUMENTS = {
    "bridge_video": [""],
    "bridge_action": ["", "finetuned", "pretrained"],
    "libero_video": ["", *SUITES, *SUITE_AND_SHARE, "goal,full,tiled", "goal,full,observed"],
    "libero_action": ["", *SUITES, *SUITE_AND_SHARE, "goal,full,tiled", "goal,full,observed"],
    "libero_joint": ["", *SUITES, "goal,tenth", "goal,full,tiled", "goal,full,observed"],
    "droid_video": [""],
    "droid_action": [""],
    "aloha_video": [""],
    "aloha_action": [""],
    "cosmos14b_video": ["", "full", "lora"],
    "pretrain_video": ["", "cosmos", "scratch", "rehearsal"],
    "my_robot": ["", "video,small", "action,small", "video", "action"],
}
SMALL = ("rehearsal", "video,small", "action,small")
ALL = [(name, argument) for name, arguments in ARGUMENTS.items() for argument in arguments]
# Arguments of LIBERO choose data only; elsewhere every one is another network or start.
NETWORKS = [
    (name, a)
    for name, arguments in ARGUMENTS.items()
    for a in dict.fromkeys(arguments[:1] + arguments[-2:])
]
# Of actions and proprioception; those of the release have 10.
WIDTHS = {"droid": 8, "aloha": 14}
TWO_BILLION, ADAPTERS, ADALN = 1_956_413_440, 370_690_048, 177_733_632


def get(name: str, argument: str = "") -> ConfigDict:
    module = importlib.import_module(f"configs.{name}")
    return module.get_config(*[argument] if argument else [])


@cache
def network(config) -> Network:
    return video_network(config)


def sizes(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_no_configuration_is_left_out():
    others = {"__init__", "base", "mimic_video", "trained", "droid", "aloha"}
    files = {p.stem for p in CONFIGS.glob("*.py")} - others
    small = ("quickstart", "libero_small", "camera_study")
    assert {name for name in files if not name.startswith(small)} == set(ARGUMENTS)


@pytest.mark.parametrize(("name", "argument"), [c for c in ALL if c[1] not in SMALL])
def test_lengths_and_widths_are_the_released_ones(name, argument):
    config = get(name, argument)
    clip, video = Clip(**config.clip), Experiment.from_config(config).video
    shape, count = (16, 60, 80, 16), 19_200
    if name.startswith("droid"):
        shape, count = (16, 54, 96, 16), 20_736
    assert clip.latent_shape == shape and clip.condition_latents == 2
    assert clip.tokens == count and (video.text_dim, config.text.length) == (1024, 512)
    preset = VIDEO_DITS["cosmos14b" if name.startswith("cosmos14b") else "cosmos2b"]
    assert all(
        getattr(video, field) == getattr(preset, field)
        for field in ("width", "num_blocks", "num_heads", "adaln_rank", "rope_ratio_thw")
    )
    assert video.dtype == "bfloat16" and 1 <= config.context_layer <= video.num_blocks
    assert Sampling(**config.sampler) == Sampling()  # its defaults are the published ones
    for fps in (clip.fps, config.policy_io.proprio.fps):
        control_stride(config.policy_io.action.fps, fps)
    settings = config.training
    assert 1 <= settings.log_every <= settings.checkpoint_every <= settings.steps
    assert config.stage in ("video", "action", "joint")
    assert name.endswith(config.stage) or argument in (config.stage, "")
    for key, dataset in config.datasets.items():
        assert dataset.name == key and dataset.records == f"{config.run_dir}/records/{key}"


@pytest.mark.parametrize(("name", "argument"), NETWORKS)
def test_stages_take_the_batches_that_the_lengths_say(name, argument):
    """Shapes only: neither weights nor activations exist."""
    config = get(name, argument)
    config.mesh = dict(fsdp=-1)
    mesh = make_mesh(config.mesh)
    stage = make_stage(Experiment.from_config(config), mesh, abstract_backbone)
    io, samples = config.policy_io, 2
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
    loss, _ = jax.eval_shape(stage.loss, params, stage.frozen, batch, jax.random.key(0))
    assert loss.shape == () and loss.dtype == "float32"
    if config.stage == "action":
        assert {leaf.dtype.name for leaf in jax.tree.leaves(stage.frozen)} == {"bfloat16"}
        embeddings = 2048 * len(config.clip.get("views", ()))
        assert sizes(stage.frozen) == TWO_BILLION + embeddings


@pytest.mark.parametrize(("name", "argument"), [c for c in ALL if c[0] != "my_robot"])
def test_datasets_describe_vectors_of_the_policys_width(name, argument):
    """Position 3 and gripper 1 by VARIANCE, the 6-D rotation as it is; joints; or nothing."""
    config = get(name, argument)
    width = WIDTHS.get(name.split("_")[0], 10)
    assert config.policy_io.action.dim == config.policy_io.proprio.dim == width
    published = (Mode.VARIANCE,) * 3 + (Mode.IDENTITY,) * 6 + (Mode.VARIANCE,)
    published = published if width == 10 else (Mode.VARIANCE,) * width
    for dataset in config.datasets.values():
        dataset_views(dataset, config.clip)
        for key in ("action", "proprio"):
            parts = parse(dataset[key], key)
            assert not parts or sum(dims(parts, width)) == width
            assert not parts or modes(parts, width) == published
        assert config.stage == "video" or dataset.action


def test_datasets_are_the_releases_own_episodes():
    bridge, libero = get("bridge_action").datasets.bridge, get("libero_action").datasets.libero_goal
    assert bridge.format == libero.format == "mimic_episodes"
    assert bridge.video == libero.video == "workspace_rgb"
    assert streams(parse(bridge.action)) == ("eef_pose_lowdim", "gripper_action_lowdim")
    assert streams(parse(bridge.proprio)) == ("eef_pose_lowdim", "gripper_state_lowdim")
    action = ("eef_pos_ref_delta_lowdim", "eef_rot_ref_delta_lowdim", "gripper_action_lowdim")
    assert streams(parse(libero.action)) == action
    proprio = ("eef_pos_lowdim", "eef_rot_lowdim", "gripper_lowdim")
    assert streams(parse(libero.proprio)) == proprio
    windows = {n: get(n).policy_io.action for n in ("bridge_action", "libero_action")}
    assert [(w.horizon, w.fps, w.shift) for w in windows.values()] == [(15, 5, 0.2), (60, 20, 0)]


def test_data_in_other_formats_take_the_place_of_the_releases():
    """As the docstring of configs/mimic_video.py says."""
    config = mimic_video.libero("goal", "full")
    config.datasets.libero_goal.update(
        format="robomimic_hdf5",
        options=dict(flip="rotate"),
        video="obs/agentview_rgb",
        action=libero_panda.HDF5_ACTION,
        proprio=libero_panda.HDF5_PROPRIO,
    )
    assert streams(parse(config.datasets.libero_goal.action)) == ("actions",)
    config = mimic_video.bridge()
    config.datasets.bridge.update(
        format="bridge_raw",
        video="images0",
        action=widowx.RAW_ACTION,
        proprio=widowx.RAW_PROPRIO,
    )
    for camera in ("images1", "images2"):
        config.datasets[camera] = dict(
            config.datasets.bridge,
            name=camera,
            video=camera,
            action="",
            proprio="",
            records=config.get_ref("run_dir") + f"/records/{camera}",
        )
    config.run_dir = "elsewhere"
    found = {name: (d.video, d.records) for name, d in config.datasets.items()}
    assert found["images2"] == ("images2", "elsewhere/records/images2")
    assert found["bridge"] == ("images0", "elsewhere/records/bridge")
    assert config.datasets.images1.path == "data/bridge" and config.datasets.bridge.action


def test_two_cameras_of_libero_are_those_of_regenerated_demonstrations():
    """The published configuration is untouched; both others have records and runs of their own."""
    published, *others = (
        get("libero_action", f"goal,full{cameras}") for cameras in ("", ",observed", ",tiled")
    )
    scene, wrist = map(feature_of, libero.CAMERAS)
    assert "views" not in published.clip and "views" not in published.datasets.libero_goal
    assert published.to_json() == get("libero_action", "goal,full,single").to_json()
    for config, name in zip(others, ("observed", "tiled")):
        dataset = config.datasets.libero_goal
        assert (dataset.format, dataset.path) == ("lerobot", "data/libero_goal_regenerated")
        assert dataset.records == f"runs/libero_goal_{name}/records/libero_goal"
        assert config.backbone.checkpoint == f"runs/libero_goal_{name}/video"
        assert streams(parse(dataset.proprio)) == ("observation.state",)
    observed, tiled = others
    assert observed.datasets.libero_goal.video == scene
    assert observed.datasets.libero_goal.views.to_dict() == {"wrist": wrist}
    assert observed.clip.views.to_dict() == {"wrist": {"height": 240, "width": 320}}
    assert tiled.datasets.libero_goal.video == (scene, wrist) and "views" not in tiled.clip
    with pytest.raises(ValueError, match=r"got 'goal', 'full' and 'front'"):
        get("libero_video", "goal,full,front")
    with pytest.raises(ValueError, match=r"got 'goal,full,observed,more'"):
        get("libero_video", "goal,full,observed,more")


def test_observed_views_add_few_tokens():
    """The size of the wrist camera of DROID, half the scene elsewhere."""
    share = {}
    for name in ("droid_video", "aloha_video"):
        clip = Clip(**get(name).clip)
        share[name] = sum(map(tokens, clip.view_shapes.values())) / clip.tokens
    assert share == {"droid_video": 440 / 20_736, "aloha_video": 1200 / 19_200}
    sides = get("droid_video").clip
    assert sides.width / sides.height == 320 / 180
    wrist = sides.views.wrist
    assert same_aspect((wrist.height, wrist.width), (180, 320))


def trainable(name: str, argument: str = "") -> tuple[int, int]:
    """Parameters altogether, and those that learn."""
    config = get(name, argument)
    stage = make_stage(Experiment.from_config(config), None)
    params = network(Experiment.from_config(config).video).abstract
    return sizes(params), sizes(split(params, stage.trainable)[0])


@pytest.mark.parametrize("name", ["bridge_video", "libero_video"])
def test_adapters_and_adaln_weights_learn_in_stage_1(name):
    assert trainable(name) == (TWO_BILLION + ADAPTERS, ADAPTERS + ADALN)
    config = get(name)
    assert (config.lora.rank, config.lora.alpha, config.init_from) == (256, 32, "weights/cosmos2b")


def test_joint_training_is_both_published_stages_in_one_run():
    """Not published itself: the same adapters, decoder, losses and rates."""
    video, action, joint = (get(f"libero_{stage}") for stage in ("video", "action", "joint"))
    stage = make_stage(Experiment.from_config(joint), make_mesh(dict(fsdp=-1)))
    params = jax.eval_shape(stage.init, jax.random.key(0))
    learning = sizes(split(params, stage.trainable)[0])
    decoder = decoder_network(ACTION_DECODERS["libero"]).num_parameters
    assert sizes(params) == TWO_BILLION + ADAPTERS + decoder
    assert learning == ADAPTERS + ADALN + decoder
    for section in ("clip", "video_model", "lora", "decoder", "policy_io", "sampler", "datasets"):
        told = video if section == "lora" else action
        assert not differences(joint[section], told[section]), section
    for name in ("sigma_scale", "sigma_tail", "action_draws", "proprio_dropout"):
        assert joint.flow[name] == action.flow[name]
    weights = joint.flow.video_weight, joint.flow.action_weight
    assert weights == (video.flow.loss_scale, action.flow.loss_scale)
    rates = [c.optimizer.learning_rate for c in (video, action, joint)]
    assert rates[2] == rates[1] and joint.optimizer.backbone_rate * rates[2] == rates[0]
    assert joint.init_from == video.init_from and joint.decoder_init_from == ""


def test_everything_learns_in_full_training():
    assert trainable("pretrain_video") == (TWO_BILLION, TWO_BILLION)
    all_14b = network(Experiment.from_config(get("cosmos14b_video")).video).num_parameters
    assert trainable("cosmos14b_video") == (all_14b, all_14b) and 14.1e9 < all_14b < 14.5e9
    with_adapters, learning = trainable("cosmos14b_video", "lora")
    # Rank 32 on q, k, v, output of two attentions and on both MLP layers of 36 blocks.
    text = 2 * 32 * (1024 + 5120)
    per_block = 6 * 32 * (5120 + 5120) + text + 2 * 32 * (5120 + 4 * 5120)
    assert with_adapters - all_14b == 36 * per_block
    assert learning > with_adapters - all_14b  # and the adaLN weights


@pytest.mark.parametrize(
    ("name", "preset"), [("bridge_action", "bridge"), ("libero_action", "libero")]
)
def test_the_decoder_is_the_released_one(name, preset):
    decoder = Experiment.from_config(get(name)).decoder
    assert decoder == ACTION_DECODERS[preset]
    count = {"bridge": 498_990_730, "libero": 499_036_810}[preset]
    assert decoder_network(decoder).num_parameters == count


def test_optimizers_are_the_published_ones():
    for name, arguments in ARGUMENTS.items():
        config = get(name, arguments[-1])
        o = config.optimizer
        assert (o.b1, o.b2, o.eps) == (0.9, 0.99, 1e-8)
        if name.startswith(("bridge", "libero")):
            assert (o.weight_decay, o.clip_norm, config.training.ema_decay) == (0.1, 10, 0)
    for name in ("bridge_video", "libero_video"):
        flow, rate = get(name).flow, make_schedule(get(name).optimizer)
        assert (flow.sigma_scale, flow.sigma_tail, flow.loss_scale) == (4, 0.05, 100)
        assert [float(rate(n)) for n in (0, 1000, 70_042)] == pytest.approx(
            [1.778e-4] * 3, rel=1e-3
        )
    for name in ("bridge_action", "libero_action"):
        config = get(name)
        flow, rate = config.flow, make_schedule(config.optimizer)
        assert (flow.sigma_scale, flow.sigma_tail, flow.loss_scale) == (4, 0.05, 10)
        assert (flow.action_time_alpha, flow.action_time_beta, flow.proprio_dropout) == (1, 1, 0.2)
        assert (flow.action_draws, flow.sampling_sigma_share, config.context_layer) == (1, 0, 20)
        expected = {0: 1e-10, 500: 5e-5, 14_112: 0.977e-4, 50_000: 0.92e-4, 500_000: 0.2e-4}
        values = {n: float(rate(n)) for n in expected}
        assert values == pytest.approx(expected, rel=1e-3)
    nvidia = make_schedule(get("cosmos14b_video").optimizer)
    assert float(nvidia(0)) == pytest.approx(0.25 * 4.316e-5, rel=1e-3) and nvidia(10_000) == 0


def test_batches_and_steps_are_those_of_the_released_file_names():
    def found(name, argument=""):
        training = get(name, argument).training
        return training.steps, training.batch_size

    assert found("bridge_video") == (70_043, 64) and found("bridge_action") == (14_112, 256)
    steps = {"goal": 7_020, "object": 8_260, "spatial": 7_540}
    assert {suite: found("libero_video", suite) for suite in SUITES} == {
        suite: (count, 32) for suite, count in steps.items()
    }
    assert found("libero_action", "object,half") == (30_090, 128)
    assert found("libero_action", "goal,full") == (50_000, 128)


def test_arguments_choose_data_and_backbone():
    config = get("libero_action", "spatial,tenth")
    assert config.training.episodes_per_task == 5
    assert config.datasets.libero_spatial.path == "data/libero_spatial"
    assert config.backbone.checkpoint == "runs/libero_spatial/video"
    assert get("bridge_action").backbone.checkpoint == "runs/bridge/video"
    assert get("bridge_action", "pretrained").backbone.checkpoint == "weights/cosmos2b"
    assert get("pretrain_video", "scratch").init_from == ""
    moved = get("bridge_action")
    moved.run_dir = "elsewhere"
    assert moved.backbone.checkpoint == "elsewhere/video"
    assert moved.datasets.bridge.records == "elsewhere/records/bridge"


@pytest.mark.parametrize("name", [n for n in ARGUMENTS if ARGUMENTS[n] != [""]])
def test_a_wrong_argument_is_explained(name):
    with pytest.raises(ValueError, match="got 'gaol'"):
        get(name, "gaol")


@pytest.mark.parametrize(
    ("first", "second"), [(f"{n}_video", f"{n}_action") for n in ("bridge", "libero", *WIDTHS)]
)
def test_stage_2_accepts_what_stage_1_leaves(first, second):
    """What the bridge compares, and what the records of both must share."""
    sections = ("clip", "video_model", "text", "policy_io", "datasets", "tokenizer", "text_encoder")
    for argument in ARGUMENTS[first]:
        one, two = get(first, argument), get(second, argument)
        assert [d for s in sections for d in differences(one[s], two[s], s)] == []


def test_the_docstrings_name_commands_with_existing_files_and_arguments():
    for name in ARGUMENTS:
        text = importlib.import_module(f"configs.{name}").__doc__.replace("\\\n", " ")
        commands = [shlex.split(line) for line in text.splitlines() if "python -m" in line]
        assert commands and "docs/pods.md" in text and "Data" in text
        for words in commands:
            flag = next(word for word in words if word.startswith("--config="))
            file, _, argument = flag.removeprefix("--config=").partition(":")
            get(Path(file).stem, argument)
