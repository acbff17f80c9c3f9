"""The bridge: what stage 2 and the policy get from a training directory, and what they refuse."""

import json
import shutil
import warnings

import jax
import numpy as np
import pytest
from conftest import lora_config
from test_lora import stored
from tiny_stages import five_steps, save_untrained, tiny_config

from mvjax.experiment import Experiment
from mvjax.models.lora import merge_lora
from mvjax.models.presets import (
    video_network,
)
from mvjax.parallel import make_mesh
from mvjax.training.bridge import load_backbone, load_decoder
from mvjax.training.damage import CheckpointMismatch

pytestmark = pytest.mark.usefixtures("quickly")


def load(checkpoint="", precision="float32", **settings):
    config = tiny_config("action")
    config.backbone.update(checkpoint=str(checkpoint), precision=precision)
    config.update_from_flattened_dict(settings)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), warnings.catch_warnings():
        warnings.simplefilter("error")  # such as donated buffers that could not be used
        return load_backbone(Experiment.from_config(config), mesh)


def assert_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def assert_is_cast(narrow, wide):
    assert all(leaf.dtype == "bfloat16" for leaf in jax.tree.leaves(narrow))
    assert_equal(narrow, jax.tree.map(lambda leaf: np.asarray(leaf).astype("bfloat16"), wide))


def test_full_training_gives_the_moving_average(video_run):
    model, params = load(video_run)
    assert model == Experiment.from_config(tiny_config("action")).video
    average = stored(video_run, use_ema=True)
    assert_equal(params, average)
    learned = stored(video_run)["blocks"]["mlp"]["layer1"]["kernel"]
    assert not np.array_equal(learned, average["blocks"]["mlp"]["layer1"]["kernel"])
    narrow_model, narrow = load(video_run, "bfloat16")
    assert narrow_model.precision == narrow_model.dtype == "bfloat16"
    assert_is_cast(narrow, average)


def test_weights_fit_every_precision_whatever_they_were_trained_in(video_run):
    """`video_model.precision` is how stage 1 computes; the frozen backbone has its own."""
    wide = load(video_run)[1]
    model, narrow = load(video_run, "published", **{"video_model.precision": "bfloat16"})
    assert model.precision == "published" and model.dtype == "bfloat16"
    assert_is_cast(narrow, wide)
    with pytest.raises(
        ValueError, match=r"one of 'float32', 'bfloat16', 'published', 'int8', got 'half'"
    ):
        load(video_run, "half")


def test_lora_is_merged_with_its_own_rank_and_scale(lora_run):
    """The configuration of stage 2 knows nothing of the adapters: they are in the checkpoint."""
    model, params = load(lora_run)
    assert model.lora is None
    merged = merge_lora(
        stored(lora_run, use_ema=True), Experiment.from_config(lora_config("")).video.lora
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), params, merged
    )
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, video_network(model).abstract)
    assert_is_cast(load(lora_run, "bfloat16")[1], params)


def test_settings_of_then_that_are_out_of_range_today_do_not_matter(video_run, tmp_path):
    run = shutil.copytree(video_run, tmp_path / "run")
    for meta in run.glob("checkpoints/*/meta/metadata"):
        stored_meta = json.loads(meta.read_text())
        stored_meta["config"]["optimizer"]["eps"] = 0.0
        meta.write_text(json.dumps(stored_meta))
    assert_equal(load(run)[1], load(video_run)[1])


def test_a_run_without_moving_average_gives_its_parameters(tmp_path):
    config = tiny_config("video", ema_decay=0.0)
    params = save_untrained(config, tmp_path)
    assert_equal(load(tmp_path)[1], params)


def test_an_untrained_backbone_is_a_function_of_the_seed():
    model, params = load()
    assert model == Experiment.from_config(tiny_config("action")).video
    other = load(**{"training.seed": 1})[1]
    assert not np.array_equal(params["x_embedder"]["kernel"], other["x_embedder"]["kernel"])
    assert_is_cast(load(precision="bfloat16")[1], params)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("video_model.num_blocks", 3, "video_model.num_blocks is 2 there, 3 here"),
        ("clip.height", 64, "clip.height is 32 there, 64 here"),
        ("clip.fps", 5.0, "clip.fps is 20.0 there, 5.0 here"),
        ("text.dim", 32, "text.dim is 16 there, 32 here"),
    ],
)
def test_another_model_or_clip_is_refused_with_both_sides(video_run, setting, value, message):
    with pytest.raises(CheckpointMismatch, match=f"video.* was trained with .*{message}"):
        load(video_run, **{setting: value})


def test_a_folder_that_holds_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a training directory"):
        load(tmp_path)


def test_decoders_are_restored_only_with_their_own_settings(video_run, tmp_path):
    config = five_steps("action", video_run)
    params = save_untrained(config, tmp_path)
    mesh = make_mesh(config.mesh)

    def decoder(directory, **settings):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(settings)
        with jax.set_mesh(mesh):
            return load_decoder(Experiment.from_config(changed), directory, mesh)

    assert_equal(decoder(tmp_path), params)
    assert_equal(decoder(tmp_path, **{"decoder.precision": "published"}), params)
    with pytest.raises(CheckpointMismatch, match="an untrained backbone is the same only with"):
        decoder(tmp_path, **{"backbone.checkpoint": ""})
    with pytest.raises(CheckpointMismatch, match=r"stage 'video', but a run of stage 'action' is"):
        decoder(video_run)
    with pytest.raises(CheckpointMismatch, match=r"stage 'action', but a run of stage 'video' is"):
        load(tmp_path)
    for setting, value, message in (
        ("context_layer", 2, "context_layer is 1 there, 2 here"),
        ("policy_io.action.horizon", 8, "policy_io.action.horizon is 4 there, 8 here"),
        ("policy_io.action.fps", 10.0, "policy_io.action.fps is 80.0 there, 10.0 here"),
        ("decoder.width", 16, "decoder.width is 32 there, 16 here"),
    ):
        with pytest.raises(CheckpointMismatch, match=message):
            decoder(tmp_path, **{setting: value})
