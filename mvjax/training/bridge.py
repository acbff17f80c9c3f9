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
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data_pipelines.settings import differences
from mvjax.experiment import Experiment
from mvjax.models.lora import merge_lora
from mvjax.models.network import Network, Params, merge, split
from mvjax.models.presets import video_network
from mvjax.models.video_dit import VideoDiTConfig
from mvjax.parallel import Rules, sharding_tree
from mvjax.training.checkpoint import (
    CheckpointMismatch,
    check_match,
    checkpoint_folder,
    damage_reported,
    leaf_paths,
    read_arrays,
    stored_tree,
)

# Settings of how a network is computed, which its weights do not depend on.
COMPUTE_SETTINGS = ("precision", "attention", "remat")

# (experiment, mesh) -> configuration and parameters of the backbone that stage 2 is built with.
Backbone = Callable[[Experiment, Mesh], tuple[VideoDiTConfig, Params]]


# --- Any training directory ---


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
    with damage_reported(where):
        stored = stored_tree(where)
        check_match(leaf_paths(stored["params"]), leaf_paths(abstract), where)
        stored_averages = flatten_dict(stored.get("ema", {})) if use_ema else {}
        averaged, raw = split(abstract, lambda path: path in stored_averages)
        wanted = {name: tree for name, tree in (("params", raw), ("ema", averaged)) if tree}
        restored = read_arrays(where, wanted, partial=True)
    return merge(restored.get("params", {}), restored.get("ema", {}))


def abstract_params(directory: Path, *, step: int | None = None) -> Params:
    """Shapes and dtypes of the stored parameters, without shardings and without reading them."""
    where = step_folder(directory, step)
    with damage_reported(where):
        stored = stored_tree(where)["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored)


def latest_step(directory: Path) -> int:
    """The step of the newest checkpoint of a training directory."""
    return int(step_folder(directory, None).name)


def read_meta(directory: Path, *, step: int | None = None) -> dict[str, Any]:
    """The description stored with a checkpoint: configuration, versions, data, normalizer."""
    where = step_folder(directory, step)
    with damage_reported(where):
        # Not a Checkpointer: it asks for devices, and processes may not have met yet.
        return ocp.JsonCheckpointHandler().restore(where / "meta")


def step_folder(directory: Path, step: int | None) -> Path:
    """The folder of a checkpoint, the newest if `step` is None.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
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


# --- The networks of the two stages ---


def abstract_backbone(experiment: Experiment, mesh: Mesh) -> tuple[VideoDiTConfig, Params]:
    """As `load_backbone`, but shapes only: nothing is read or allocated."""
    model = _frozen(experiment.video, experiment)
    return model, _abstract(video_network(model), mesh, experiment.rules, model.dtype)


def load_backbone(experiment: Experiment, mesh: Mesh) -> tuple[VideoDiTConfig, Params]:
    """Restores a stage-1 backbone onto this mesh, every device reading only its part.

    Args:
        experiment: `config.backbone.checkpoint` is a stage-1 training directory, or "" for an
            untrained backbone drawn from `training.seed` (the baseline of sample-efficiency
            studies). The settings of the video model must agree with what was trained, except
            those of how it is computed.

    Returns:
        The backbone's configuration without LoRA, and its parameters: float32 where it
        computes in float32, bfloat16 otherwise.

    Raises:
        CheckpointMismatch: If the directory holds another stage or another model.
    """
    config, rules = experiment.config, experiment.rules
    if not config.backbone.checkpoint:
        model = _frozen(experiment.video, experiment)
        dtype, network = model.dtype, video_network(model)
        make = jax.jit(
            lambda key: _cast(network.init(key), dtype),
            out_shardings=sharding_tree(network.axes, mesh, rules, network.abstract),
        )
        return model, make(jax.random.key(config.training.seed))
    directory = Path(config.backbone.checkpoint)
    stored = _checked_config(directory, config, "video", ("clip", "video_model", "text"))
    trained = Experiment.from_config(stored).video
    model = _frozen(trained, experiment)
    dtype = model.dtype
    if trained.lora is None:
        return model, restore_params(directory, _abstract(video_network(model), mesh, rules, dtype))
    adapted = restore_params(directory, _abstract(video_network(trained), mesh, rules))
    # Merged in float32 and then cast: a small update would be lost in bfloat16.
    merged = jax.jit(
        lambda p: _cast(merge_lora(p, trained.lora), dtype),
        out_shardings=sharding_tree(video_network(model).axes, mesh, rules),
    )
    return model, merged(adapted)


def load_decoder(experiment: Experiment, directory: Path, mesh: Mesh) -> Params:
    """Restores the action decoder of a stage-2 run onto this mesh.

    Raises:
        CheckpointMismatch: If the directory holds another stage, or the experiment has other
            networks or inputs than the decoder was trained with.
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
    return restore_params(directory, _abstract(experiment.decoder_network, mesh, experiment.rules))


def _untrained_seed(config: Any) -> int | None:
    """The seed that decides an untrained backbone; None for a trained one."""
    return None if config.backbone.checkpoint else config.training.seed


def _checked_config(
    directory: Path, config: Any, stage: str, sections: Sequence[str]
) -> ConfigDict:
    """The stored configuration, if its sections agree with `config` in all that weights need."""
    meta = read_meta(directory)
    if meta["stage"] != stage:
        raise CheckpointMismatch(
            f"{directory} is a run of stage {meta['stage']!r}, but a run of stage {stage!r} is "
            "needed here."
        )
    stored = meta["config"]
    if "converted" in meta:  # converted weights decide some settings and leave others open
        config = _common_settings(config, stored)
        sections = [s for s in sections if s in stored]
    different = [
        d
        for s in sections
        for d in differences(_without_compute(stored[s]), _without_compute(config[s]), s)
    ]
    if different:
        raise CheckpointMismatch(
            f"{directory} was trained with other settings: {'; '.join(different)}. Use those, or "
            "another directory."
        )
    return ConfigDict(stored)


def _common_settings(config: Any, stored: Any) -> Any:
    """The part of a configuration that has a counterpart in `stored`."""
    if not isinstance(stored, Mapping):
        return config
    return {key: _common_settings(config[key], stored[key]) for key in stored if key in config}


def _without_compute(section: Any) -> Any:
    if not isinstance(section, Mapping | ConfigDict):
        return section
    return {name: value for name, value in section.items() if name not in COMPUTE_SETTINGS}


def _frozen(model: VideoDiTConfig, experiment: Experiment) -> VideoDiTConfig:
    """The network without LoRA, computed as this program says and not as its training did."""
    config = experiment.config
    here = {n: config.video_model[n] for n in ("attention", "remat") if n in config.video_model}
    return dataclasses.replace(model, lora=None, precision=config.backbone.precision, **here)


def _abstract(network: Network, mesh: Mesh, rules: Rules, dtype: str = "float32") -> Params:
    shardings = sharding_tree(network.axes, mesh, rules, network.abstract)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding),
        network.abstract,
        shardings,
    )


def _cast(params: Params, dtype: str) -> Params:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)
