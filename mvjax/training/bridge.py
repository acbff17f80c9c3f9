"""Reading the parameters of a training directory into another program: the stage bridge.

Stage 2, the policy and the evaluation start from a stage-1 directory. Only the parameters are
read, straight onto the reader's own mesh and dtype: each device reads its part, and optimizer
state is never touched.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data_pipelines.settings import differences
from mvjax.experiment import Experiment
from mvjax.models.layers import merge_lora
from mvjax.models.network import Network, Params, merge
from mvjax.models.presets import video_network
from mvjax.models.video_dit import VideoDiTConfig
from mvjax.parallel import Rules, sharding_tree
from mvjax.training.checkpoint import (
    CheckpointMismatch,
    check_match,
    check_restored,
    checkpoint_folder,
    explained,
    leaf_paths,
    stored_tree,
)


def restore_params(
    directory: Path, abstract: Params, *, use_ema: bool = True, step: int | None = None
) -> Params:
    """Reads the parameters of a finished or running training directory.

    Args:
        directory: The training directory (the one that holds `checkpoints/`).
        abstract: Nested dict of `jax.ShapeDtypeStruct` with the target shape, dtype and sharding;
            it must have exactly the stored parameters.
        use_ema: Take the moving average of a parameter where one is stored.
        step: Which checkpoint; the newest when None.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        CheckpointMismatch: If parameters are absent, extra or of another shape, naming both sides.
        OSError: If it is damaged.
    """
    where = step_folder(directory, step)
    with explained(where):
        stored = stored_tree(where)
        check_match(leaf_paths(stored["params"]), leaf_paths(abstract), where)
        averaged = _common(abstract, stored.get("ema", {})) if use_ema else {}
        wanted = {"params": _without(abstract, averaged), "ema": averaged}
        wanted = {name: tree for name, tree in wanted.items() if tree}  # orbax rejects empty ones
        args = ocp.args.PyTreeRestore(
            item=wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            restored = reader.restore(where / "state", args=args)
        check_restored(restored, where)
    return merge(restored.get("params", {}), restored.get("ema", {}))


def abstract_params(directory: Path, *, step: int | None = None) -> Params:
    """Shapes and dtypes of the stored parameters, without shardings and without reading them."""
    where = step_folder(directory, step)
    with explained(where):
        stored = stored_tree(where)["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored)


def latest_step(directory: Path) -> int:
    """The newest checkpoint of a training directory."""
    return int(step_folder(directory, None).name)


def read_meta(directory: Path, *, step: int | None = None) -> dict[str, Any]:
    """The description stored with a checkpoint: configuration, versions, data, normalizer."""
    where = step_folder(directory, step)
    with explained(where):  # no Checkpointer: it asks for devices, before processes have met
        return ocp.JsonCheckpointHandler().restore(where / "meta")


def step_folder(directory: Path, step: int | None) -> Path:
    """The folder of a checkpoint, the newest if `step` is None.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
    """
    folder = checkpoint_folder(directory)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{directory} is not a training directory: it has no folder 'checkpoints'; weights for "
            "PyTorch are converted first (python -m launch.convert)."
        )
    steps = sorted(ocp.utils.checkpoint_steps(folder))
    if not steps or (step is not None and step not in steps):
        wanted = "complete checkpoint" if step is None else f"checkpoint {step}"
        raise FileNotFoundError(f"{directory} has no {wanted}; it has the steps {steps}.")
    return folder / str(steps[-1] if step is None else step)


def _common(abstract: Params, stored: Params) -> Params:
    common = {}
    for key in abstract.keys() & stored.keys():
        branch = isinstance(abstract[key], dict)
        common[key] = _common(abstract[key], stored[key]) if branch else abstract[key]
    return common


def _without(tree: Params, removed: Params) -> Params:
    rest = {}
    for key, value in tree.items():
        if key not in removed:
            rest[key] = value
        elif isinstance(value, dict) and (branch := _without(value, removed[key])):
            rest[key] = branch
    return rest


# The stage bridge: the video DiT of a stage-1 run, LoRA merged, for stage 2 and the policy.


COMPUTE_SETTINGS = ("precision", "attention", "remat")  # of a network: not of its weights

# What stage 2 is built with: (experiment, mesh) -> the backbone's configuration and parameters.
Backbone = Callable[[Experiment, Mesh], tuple[VideoDiTConfig, Params]]


def abstract_backbone(experiment: Experiment, mesh: Mesh) -> tuple[VideoDiTConfig, Params]:
    """As `load_backbone`, but shapes only: nothing is read or allocated."""
    model = _without_lora(experiment.video, experiment)
    return model, _placed(video_network(model), mesh, experiment.rules, model.dtype)


def load_backbone(experiment: Experiment, mesh: Mesh) -> tuple[VideoDiTConfig, Params]:
    """Restores a stage-1 backbone onto this mesh, every device reading only its part.

    Args:
        experiment: `config.backbone.checkpoint` is a stage-1 training directory ("" for an
            untrained backbone, the baseline of sample-efficiency studies, drawn from
            `training.seed`). What describes the video model must agree with what was trained,
            but for `backbone.precision`.
        mesh: the devices it is sharded over.

    Returns:
        The backbone's configuration without LoRA, and its parameters: float32 where it
        computes in float32, bfloat16 otherwise.

    Raises:
        CheckpointMismatch: if the directory holds another stage or another model.
    """
    config, rules = experiment.config, experiment.rules
    if not config.backbone.checkpoint:
        model = _without_lora(experiment.video, experiment)
        dtype, network = model.dtype, video_network(model)
        make = jax.jit(
            lambda key: _cast(network.init(key), dtype),
            out_shardings=sharding_tree(network.axes, mesh, rules, network.abstract),
        )
        return model, make(jax.random.key(config.training.seed))
    directory = Path(config.backbone.checkpoint)
    stored = _checked_config(directory, config, "video", ("clip", "video_model", "text"))
    trained = Experiment.from_config(stored).video
    model = _without_lora(trained, experiment)
    dtype = model.dtype
    if trained.lora is None:
        return model, restore_params(directory, _placed(video_network(model), mesh, rules, dtype))
    adapted = restore_params(directory, _placed(video_network(trained), mesh, rules))
    merge = jax.jit(
        lambda p: _cast(merge_lora(p, trained.lora), dtype),
        out_shardings=sharding_tree(video_network(model).axes, mesh, rules),
    )
    return model, merge(adapted)


def load_decoder(experiment: Experiment, directory: Path, mesh: Mesh) -> Params:
    """Restores the action decoder of a stage-2 run onto this mesh.

    Args:
        experiment: of this program; what it says about the networks and their inputs must be what
            the decoder was trained with.
        directory: the stage-2 training directory.
        mesh: the devices it is sharded over.

    Raises:
        CheckpointMismatch: if the directory holds another stage or another model.
    """
    config = experiment.config
    sections = ("clip", "video_model", "text", "context_layer", "policy_io", "decoder")
    stored = _checked_config(directory, config, "action", sections)
    if "backbone" in stored and _untrained_seed(stored) != _untrained_seed(config):
        raise CheckpointMismatch(
            f"{directory} was trained with backbone.checkpoint={stored.backbone.checkpoint!r} and "
            f"training.seed={stored.training.seed}, this configuration has "
            f"{config.backbone.checkpoint!r} and {config.training.seed}; an untrained backbone is "
            "the same only with the same seed."
        )
    network = experiment.decoder_network
    return restore_params(directory, _placed(network, mesh, experiment.rules))


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


def _without_lora(model: VideoDiTConfig, experiment: Experiment) -> VideoDiTConfig:
    """The frozen network, computed as this program says and not as its training did."""
    config = experiment.config
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
