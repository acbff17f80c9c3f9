"""The stage bridge: the video DiT of a stage-1 run, LoRA merged, for stage 2 and the policy."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mvjax.checkpoints.bridge import read_meta, restore_params
from mvjax.checkpoints.config_match import differences
from mvjax.checkpoints.tree_match import CheckpointMismatch
from mvjax.models.build import video_dit_config, video_network
from mvjax.models.lora import merge_lora
from mvjax.models.param_tree import Params
from mvjax.models.parameters import Network
from mvjax.models.video_dit import VideoDiTConfig
from mvjax.parallel.rules import Rules, sharding_tree

COMPUTE_SETTINGS = ("precision", "attention", "remat")  # of a network: not of its weights

# What stage 2 is built with: (config, mesh, rules) -> the backbone's configuration and parameters.
Backbone = Callable[[Any, Mesh, Rules], tuple[VideoDiTConfig, Params]]


def abstract_backbone(config: Any, mesh: Mesh, rules: Rules) -> tuple[VideoDiTConfig, Params]:
    """As `load_backbone` for this configuration, but shapes only: nothing is read or allocated."""
    model = _without_lora(video_dit_config(config), config)
    return model, _placed(video_network(model), mesh, rules, model.dtype)


def load_backbone(config: Any, mesh: Mesh, rules: Rules) -> tuple[VideoDiTConfig, Params]:
    """Restores a stage-1 backbone onto this mesh, every device reading only its part.

    Args:
        config: `backbone.checkpoint` (a stage-1 training directory; "" for an untrained backbone,
            the baseline of sample-efficiency studies, drawn from `training.seed`),
            `backbone.precision`, and the sections that describe the video model, which must agree
            with what was trained, but for its precision.
        mesh, rules: where and how it is sharded.

    Returns:
        The backbone's configuration without LoRA, and its parameters: float32 where it
        computes in float32, bfloat16 otherwise.

    Raises:
        CheckpointMismatch: if the directory holds another stage or another model.
    """
    if not config.backbone.checkpoint:
        model = _without_lora(video_dit_config(config), config)
        dtype, network = model.dtype, video_network(model)
        make = jax.jit(
            lambda key: _cast(network.init(key), dtype),
            out_shardings=sharding_tree(network.axes, mesh, rules, network.abstract),
        )
        return model, make(jax.random.key(config.training.seed))
    directory = Path(config.backbone.checkpoint)
    stored = _checked_config(directory, config, "video", ("clip", "video_model", "text"))
    trained = video_dit_config(stored)
    model = _without_lora(trained, config)
    dtype = model.dtype
    if trained.lora is None:
        return model, restore_params(directory, _placed(video_network(model), mesh, rules, dtype))
    adapted = restore_params(directory, _placed(video_network(trained), mesh, rules))
    merge = jax.jit(
        lambda p: _cast(merge_lora(p, trained.lora), dtype),
        out_shardings=sharding_tree(video_network(model).axes, mesh, rules),
    )
    return model, merge(adapted)


def load_decoder(
    config: Any, directory: Path, network: Network, mesh: Mesh, rules: Rules
) -> Params:
    """Restores the action decoder of a stage-2 run onto this mesh.

    Args:
        config: of this program; what it says about the networks and their inputs must be what the
            decoder was trained with.
        directory: the stage-2 training directory.
        network: the decoder.
        mesh, rules: where and how it is sharded.

    Raises:
        CheckpointMismatch: if the directory holds another stage or another model.
    """
    sections = ("clip", "video_model", "text", "context_layer", "policy_io", "decoder")
    stored = _checked_config(directory, config, "action", sections)
    if "backbone" in stored and _untrained_seed(stored) != _untrained_seed(config):
        raise CheckpointMismatch(
            f"{directory} was trained with backbone.checkpoint={stored.backbone.checkpoint!r} and "
            f"training.seed={stored.training.seed}, this configuration has "
            f"{config.backbone.checkpoint!r} and {config.training.seed}; an untrained backbone is "
            "the same only with the same seed."
        )
    return restore_params(directory, _placed(network, mesh, rules))


def _untrained_seed(config: Any) -> int | None:
    """The seed that decides an untrained backbone; None for a trained one."""
    return None if config.backbone.checkpoint else config.training.seed


def _checked_config(
    directory: Path, config: Any, stage: str, sections: Sequence[str]
) -> ConfigDict:
    meta = read_meta(directory)
    if meta["stage"] != stage:
        raise CheckpointMismatch(
            f"{directory} is a run of stage {meta['stage']!r}, but a run of stage {stage!r} is "
            "needed here."
        )
    stored = meta["config"]
    if "converted" in meta:  # weights tell no more than some settings
        config = _of_the_same_settings(config, stored)
        sections = [s for s in sections if s in stored]
    different = [
        d for s in sections for d in differences(_weights(stored[s]), _weights(config[s]), s)
    ]
    if different:
        raise CheckpointMismatch(
            f"{directory} was trained with other settings: {'; '.join(different)}. Use those, or "
            "another directory."
        )
    return ConfigDict(stored)


def _of_the_same_settings(config: Any, stored: Any) -> Any:
    """The part of a configuration that has a counterpart in `stored`."""
    if not isinstance(stored, Mapping):
        return config
    return {key: _of_the_same_settings(config[key], stored[key]) for key in stored if key in config}


def _weights(section: Any) -> Any:
    """What of a section concerns the weights: they fit a network however it is computed."""
    if not isinstance(section, Mapping | ConfigDict):
        return section
    return {name: value for name, value in section.items() if name not in COMPUTE_SETTINGS}


def _without_lora(model: VideoDiTConfig, config: Any) -> VideoDiTConfig:
    """The frozen network, computed as this program says and not as its training did."""
    here = {n: config.video_model[n] for n in ("attention", "remat") if n in config.video_model}
    return dataclasses.replace(model, lora=None, precision=config.backbone.precision, **here)


def _placed(network: Network, mesh: Mesh, rules: Rules, dtype: str = "float32") -> Params:
    shardings = sharding_tree(network.axes, mesh, rules, network.abstract)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding),
        network.abstract,
        shardings,
    )


def _cast(params: Params, dtype: str) -> Params:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)
