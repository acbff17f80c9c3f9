"""From a configuration to its stage."""

from typing import Any

from jax.sharding import Mesh

from mvjax.checkpoints.backbone import Backbone, load_backbone
from mvjax.parallel.rules import Rules
from mvjax.training.action_stage import action_stage
from mvjax.training.stage import Stage
from mvjax.training.video_stage import video_stage


def build(config: Any, mesh: Mesh, rules: Rules, backbone_of: Backbone = load_backbone) -> Stage:
    """The stage that `config.stage` names: "video" or "action".

    Args:
        config: see `video_stage` and `action_stage`.
        mesh, rules: where and how stage 2 places its frozen backbone.
        backbone_of: see `action_stage`.
    """
    if config.stage == "video":
        return video_stage(config)
    if config.stage == "action":
        return action_stage(config, mesh, rules, backbone_of)
    raise ValueError(f"config.stage must be 'video' or 'action', got {config.stage!r}.")
