"""What follows from a configuration, and every mistake that is said before anything runs."""

import jax
import pytest
from ml_collections import ConfigDict
from tiny_stages import tiny_batch, tiny_config

from mvjax.experiment import Experiment

STAGES = ("video", "action", "joint")


@pytest.mark.parametrize("stage", STAGES)
def test_derived_values_agree(stage):
    config = tiny_config(stage)
    experiment = Experiment.from_config(config)
    assert experiment.stage == stage
    assert experiment.clip.latent_shape == experiment.batch_shapes["latents"]
    assert experiment.video.text_input_dim == experiment.batch_shapes["text"][1]
    given = tiny_batch(config)
    assert {k: given[k].shape[1:] for k in experiment.batch_shapes} == experiment.batch_shapes
    assert ("actions" in experiment.batch_shapes) == (stage != "video")
    assert experiment.decoder.context_dim == experiment.video.width
    assert experiment.sampling(stop_step=1).stop_step == 1
    # Worked out once: the same network each time, so that its shapes are traced once.
    assert experiment.video_network is experiment.video_network


def test_a_later_change_of_the_configuration_changes_nothing():
    config = tiny_config("action")
    experiment = Experiment.from_config(config)
    before = experiment.clip
    config.clip.height = 64
    config.training.batch_size = 1
    assert experiment.clip is before and experiment.config.clip.height == 32
    assert experiment.config.training.batch_size == 8
    other = experiment.changed({"clip.height": 64, "training.batch_size": 16})
    assert (other.clip.height, other.config.training.batch_size) == (64, 16)
    assert experiment.clip.height == 32


def test_stage_2_learns_from_data_with_actions_and_the_others_from_all():
    names = {
        stage: {d.name for d in Experiment.from_config(tiny_config(stage)).datasets}
        for stage in STAGES
    }
    everything = set(tiny_config("video").datasets)
    assert names["video"] == names["joint"] == everything and names["action"] < everything


def test_a_partial_configuration_is_enough_for_what_follows_from_it():
    """Converted weights decide the network, and nothing about data or training."""
    whole = tiny_config("video")
    part = ConfigDict({name: whole[name] for name in ("video_model", "text", "lora")})
    assert Experiment.from_config(part).video == Experiment.from_config(whole).video
    with pytest.raises(AttributeError, match="clip"):
        _ = Experiment.from_config(part).clip


def test_sections_that_the_stage_does_not_use_are_not_checked():
    """The decoder of a stage-1 configuration may be impossible: nothing reads it."""
    Experiment.from_config(_with(tiny_config("video"), context_layer=99))


@pytest.mark.parametrize(
    ("stage", "settings", "words"),
    [
        ("video", {"stage": "both"}, "config.stage must be 'video', 'action' or 'joint'"),
        ("video", {"clip.height": 40}, "clip.height"),
        ("video", {"clip.future_frames": 6}, "clip.future_frames"),
        ("video", {"lora.rank": -1}, "lora.rank"),
        ("video", {"video_model.text_dim": 7}, "text.dim is 16"),
        ("video", {"video_model.timestep_scale": 0.001}, "timestep_scale"),
        ("video", {"rules.embed": ("nowhere",)}, "nowhere"),
        ("video", {"sampler.sigma_min": 90.0}, "Noise levels must go down"),
        ("video", {"lora.rank": 4, "lora.alpha": 0.0}, "lora.alpha is 0"),
        (
            "video",
            {"lora.rank": 4, "lora.targets": ("to_q", "to_v")},
            "lora.targets must be .*q_proj",
        ),
        # --config.lora.targets=q_proj,v_proj is one string in a tuple, and none of the layers.
        ("video", {"lora.rank": 4, "lora.targets": ("q_proj,v_proj",)}, "lora.targets must be"),
        ("video", {"lora.rank": 4, "lora.targets": ()}, "lora.targets must be"),
        ("video", {"policy_io.action.horizon": 0}, "policy_io.action.horizon"),
        ("video", {"flow.min_condition_latents": 3}, "min_condition_latents is 3"),
        ("action", {"context_layer": 3}, "context_layer is 3.* blocks 1 to 2"),
        ("joint", {"context_layer": 3}, "context_layer is 3.* blocks 1 to 2"),
        ("joint", {"flow.action_weight": 0.0}, "flow.action_weight must be .* above 0"),
        ("joint", {"flow.loss_scale": 2.0}, "loss_scale is 2.0, but .*action_weight scale the two"),
        ("joint", {"flow.min_condition_latents": 1}, "min_condition_latents is 1, but joint"),
        ("joint", {"backbone.checkpoint": "runs/v"}, "backbone.checkpoint is 'runs/v', but joint"),
        ("joint", {"datasets.robot.action": ()}, "None of config.datasets has actions"),
        ("joint", {"context_frames": "observed"}, "attention_to='observed_first'"),
        ("action", {"flow.video_weight": 1.0}, "video_weight is 1.0, but config.stage is 'action'"),
        ("video", {"optimizer.backbone_rate": 2.0}, "backbone_rate is 2.0, but .*only joint"),
        ("video", {"decoder_init_from": "runs/a"}, "decoder_init_from is 'runs/a', but .*only joi"),
    ],
)
def test_a_mistake_is_named_before_anything_runs(stage, settings, words):
    with pytest.raises(ValueError, match=words):
        Experiment.from_config(_with(tiny_config(stage), **settings))


def test_a_batch_that_the_mesh_cannot_split_is_refused_with_both_numbers():
    experiment = Experiment.from_config(_with(tiny_config("video"), **{"training.accumulate": 3}))
    with pytest.raises(ValueError, match="batch_size is 8; it must be a multiple of 3"):
        experiment.check_batch(experiment.mesh(jax.devices()[:1]))


def _with(config, **settings):
    config.update_from_flattened_dict(settings)
    return config
