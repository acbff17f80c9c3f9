"""Converted weights are taken directly: by training, by the encoding, and by the policy."""

import copy
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from published import CONFIGS, random_tensors, write_published
from tiny_stages import build_stage, tiny_config

from data_pipelines.embodiments import widowx
from data_pipelines.normalize import Normalizers, load_normalizers, released_normalizer
from data_pipelines.statistics import compute_statistics
from mvjax.experiment import Experiment
from mvjax.flow import Sampling
from mvjax.models.lora import merge_lora
from mvjax.models.network import split
from mvjax.parallel import make_mesh
from mvjax.policy.load import (
    _check_given,
    load_policy,
    load_text_encoder,
    load_video_tokenizer,
)
from mvjax.policy.observation import Observation
from mvjax.training.bridge import load_backbone
from mvjax.training.checkpoint import Store
from mvjax.training.damage import CheckpointMismatch
from mvjax.training.directory import find_checkpoint, restore_params
from mvjax.training.resume import describe, first_state
from mvjax.training.step import abstract_state, make_optimizer
from mvjax.weights.convert import give_statistics, prepare, write
from mvjax.weights.files import WeightsError
from mvjax.weights.kinds import ACTION, TEXT, VAE, VIDEO, Hints
from mvjax.weights.source import open_source

pytestmark = pytest.mark.usefixtures("quickly")
HINTS = Hints(rope_ratio_thw=(1.0, 3.0, 3.0), precision="float32")
LAYOUTS = [(VIDEO, "nvidia"), (ACTION, "mimic-video"), (VAE, "nvidia"), (TEXT, "diffusers")]


@pytest.fixture(scope="module")
def released(tmp_path_factory, spiece):
    """Everything a release consists of, converted: a folder with video, action, vae and text."""
    folder = tmp_path_factory.mktemp("released")
    for kind, layout in LAYOUTS:
        config = copy.deepcopy(CONFIGS[kind.stage])
        if kind is ACTION:
            for stream in config["policy_io"].values():
                stream["dim"] = 10
        tensors = random_tensors(kind, layout, config)
        path = write_published(folder, kind, layout, tensors, config)
        if kind is TEXT:
            shutil.copyfile(spiece / "spiece.model", path / "spiece.model")
        write(prepare(open_source(path, HINTS)), folder / kind.stage)
    give_statistics(statistics_file(folder / "bridge.json"), folder / "action")
    return folder


def statistics_file(path, horizon=4, robot="eef"):
    """Writes statistics as the release does, and returns them as a normalizer."""
    rng = np.random.default_rng(0)
    statistics = {
        f"{prefix}{robot}_{stream}_lowdim": compute_statistics(rng.normal(size=(50, steps, dim)))
        for prefix, steps in (("action/", horizon), ("obs/", 1))
        for stream, dim in (("pos", 3), ("rot", 6), ("gripper", 1))
    }
    text = json.dumps({k: {n: v.tolist() for n, v in s.items()} for k, s in statistics.items()})
    path.write_text(text)
    return released_normalizer(path)


def config_of(released, stage):
    config = tiny_config(stage)
    config.tokenizer = str(released / "vae")
    config.text_encoder = str(released / "text")
    config.text.update(length=16, dim=64)
    config.policy_io.action.update(dim=10)
    config.policy_io.proprio.update(dim=10)
    if stage == "action":
        config.backbone.checkpoint = str(released / "video")
    return config


def test_the_policy_runs_on_a_converted_release(released):
    """Video and decoder, VAE, T5 and statistics together answer two instructions differently."""
    config = config_of(released, "action")
    sampling = Sampling(video_steps=3, stop_step=1, action_steps=4)
    policy = load_policy(
        Experiment.from_config(config), released / "action", sampling, batch_size=2
    )
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    observation = Observation(frames, np.zeros((1, 10), np.float32), "pick up the red mug")
    other = Observation(frames, np.zeros((1, 10), np.float32), "open the top drawer")
    actions = policy.act([observation, other])
    assert actions.shape == (2, 4, 10) and np.isfinite(actions).all()
    assert not np.allclose(actions[0], actions[1])
    assert policy.predict_video([observation]).shape == (1, 13, 32, 32, 3)


def test_statistics_of_another_robot_are_not_given_to_a_decoder(released, tmp_path):
    longer = statistics_file(tmp_path / "libero.json", horizon=60)
    with pytest.raises(WeightsError, match=r"another robot.* actions are \[60, 10\].*\[4, 10\]"):
        give_statistics(longer, released / "action")
    fitting = statistics_file(tmp_path / "bridge.json")
    with pytest.raises(FileExistsError, match="To give the decoder other statistics"):
        give_statistics(fitting, released / "action")
    for holds, words in (("video", "stage 'video'"), ("nothing", "holds none: convert it first")):
        with pytest.raises(WeightsError, match=words):
            give_statistics(fitting, released / holds)
    assert not (released / "video" / "normalizer.json").exists()


def test_an_exported_decoder_takes_the_normalizer_of_its_run(released, tmp_path):
    shutil.copytree(released / "action", tmp_path / "action")
    path = tmp_path / "action" / "normalizer.json"
    one = dataclasses.replace(load_normalizers(path).of(), streams={}, decoder="")
    path.unlink()
    Normalizers({"sawyer": one}, one.fingerprint).save(tmp_path / "run.json")
    give_statistics(released_normalizer(tmp_path / "run.json"), tmp_path / "action")
    given = load_normalizers(path).of()
    assert given.decoder == find_checkpoint(tmp_path / "action").identity["digest"]
    values = np.ones((4, 10), np.float32)
    np.testing.assert_array_equal(
        given.normalize("actions", values), one.normalize("actions", values)
    )
    Normalizers({"sawyer": one, "panda": one}, one.fingerprint).save(tmp_path / "two.json")
    with pytest.raises(ValueError, match=r"several robots \(panda, sawyer\)"):
        released_normalizer(tmp_path / "two.json")


def test_a_converted_decoder_takes_its_own_statistics_alone(released, tmp_path, caplog):
    config = config_of(released, "action")
    config.datasets.robot.format = "mimic_episodes"
    for setting in ("action", "proprio"):
        config.datasets.robot[setting] = getattr(widowx, setting.upper())
    shutil.copytree(released / "action", tmp_path / "action")
    path = tmp_path / "action" / "normalizer.json"
    normalizer = load_normalizers(path).of()

    def load():
        given = load_normalizers(path).of()
        _check_given(given, path, find_checkpoint(tmp_path / "action"), config)

    load()
    for change, words in (
        ({"decoder": "0123456789abcdef"}, "belongs to another decoder"),
        ({"streams": {"actions": ["action/xarm_pos_lowdim"]}}, "xarm_pos_lowdim.*another robot"),
        ({"streams": {"actions": ["action/eef_pos_ref_delta_lowdim"]}}, "ref_delta.*another robot"),
        ({"streams": {"proprio": ["obs/left_eef_rot_lowdim"]}}, "left_eef.*another robot"),
    ):
        dataclasses.replace(normalizer, **change).save(path)
        with pytest.raises(CheckpointMismatch, match=words):
            load()
    assert not [r for r in caplog.records if "does not name its decoder" in r.message]
    dataclasses.replace(normalizer, streams={}, decoder="").save(path)  # as of earlier versions
    load()
    assert [r for r in caplog.records if "does not name its decoder" in r.message]


def start(config, workdir):
    """A stage and the state that its training begins with; no step is compiled."""
    stage, mesh, rules = build_stage(config)
    optimizer = make_optimizer(config.optimizer)
    with jax.set_mesh(mesh), Store(workdir, keep=1) as store:
        abstract = abstract_state(stage, optimizer, False, mesh, rules)
        meta = describe(Experiment.from_config(config), stage, {})
        return stage, first_state(
            Experiment.from_config(config), stage, optimizer, abstract, store, None, meta
        )


def stored(directory, like):
    """The parameters of a checkpoint that are in `like`, in its dtypes."""
    if not like:
        return {}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return restore_params(
        directory,
        jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=here), like),
    )


@pytest.mark.parametrize("name", ["video", "action"])
def test_training_starts_from_converted_weights(released, tmp_path, name):
    config = config_of(released, name)
    config.init_from = str(released / name)
    stage, state = start(config, tmp_path)
    expected = stored(released / name, state.params)
    jax.tree.map(np.testing.assert_array_equal, state.params, expected)
    backbone = stored(released / "video", stage.frozen)  # of stage 2; stage 1 has none
    jax.tree.map(np.testing.assert_array_equal, stage.frozen, backbone)


def test_new_adapters_change_nothing_yet(released, tmp_path):
    config = config_of(released, "video")
    config.init_from = str(released / "video")
    config.lora.update(rank=2, alpha=4.0)
    stage, state = start(config, tmp_path)
    adapters, others = split(state.params, lambda path: path[-1] in ("lora_a", "lora_b"))
    assert adapters == split(adapters, stage.trainable)[0] != {}
    jax.tree.map(np.testing.assert_array_equal, others, stored(released / "video", others))
    merged = merge_lora(state.params, Experiment.from_config(config).video.lora)
    jax.tree.map(np.testing.assert_array_equal, merged, others)


def test_a_converted_backbone_of_another_size_is_refused(released):
    config = config_of(released, "action")
    config.video_model.update(num_blocks=3, rope_ratio_thw=(1.0, 2.0, 2.0))
    mesh = make_mesh(config.mesh)
    with pytest.raises(CheckpointMismatch, match="num_blocks is 2 there, 3 here") as error:
        load_backbone(Experiment.from_config(config), mesh)
    assert "rope_ratio_thw" in str(error.value)
    config.backbone.checkpoint = str(released / "vae")
    with pytest.raises(CheckpointMismatch, match="stage 'vae', but a run of stage 'video'"):
        load_backbone(Experiment.from_config(config), mesh)


def test_encoders_know_themselves_apart(released, tmp_path):
    """A tokenizer or text encoder of other weights has another identity."""
    config = config_of(released, "video")
    tokenizer, identity = load_video_tokenizer(config.tokenizer)
    video = jax.ShapeDtypeStruct((1, 5, 32, 32, 3), np.float32)
    assert jax.eval_shape(tokenizer.encode, video).shape == (1, 2, 4, 4, 16)
    tensors = random_tensors(VAE, "nvidia", seed=1)
    other = write_published(tmp_path, VAE, "nvidia", tensors)
    write(prepare(open_source(other, HINTS)), tmp_path / "other")
    assert load_video_tokenizer(tmp_path / "other")[1] != identity
    # The short fingerprint of earlier versions covers small leaves; the last word is of all.
    assert identity.split()[-1] == find_checkpoint(config.tokenizer).meta["digest"]
    encoder, text_identity = load_text_encoder(config)
    assert encoder.encode(["open the drawer"]).shape == (1, 16, 64)
    config.text.dim = 32
    with pytest.raises(CheckpointMismatch, match=r"64 dimensions, but text\.dim is 32"):
        load_text_encoder(config)
    config.text_encoder = str(released / "vae")
    with pytest.raises(CheckpointMismatch, match="expected a converted T5 encoder"):
        load_text_encoder(config)
    assert text_identity.startswith("t5 16x64 ")
