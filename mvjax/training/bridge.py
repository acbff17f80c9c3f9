"""The bridge between the stages: the networks of a training directory in another program.

Stage 2 and the policy start from a run of stage 1, the policy from one of stage 2 as well. Their
networks are read onto the reader's own mesh and dtype, if what they were trained for is what the
reader asks for. The directory of a joint run holds both, and serves as that of either.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data_pipelines.augment import Augment
from data_pipelines.settings import differences, plain
from mvjax.experiment import Experiment
from mvjax.identity import different
from mvjax.models.int8 import quantize_params
from mvjax.models.lora import merge_lora
from mvjax.models.network import Network, Params
from mvjax.models.presets import video_network
from mvjax.models.video_dit import VideoDiTConfig
from mvjax.parallel import Rules, sharding_tree
from mvjax.training.damage import CheckpointMismatch, is_damage
from mvjax.training.directory import (
    Checkpoint,
    checkpoint_steps,
    find_checkpoint,
    read_meta,
    restore_params,
)

log = logging.getLogger(__name__)

# Settings of how a network is computed, which its weights do not depend on.
COMPUTE_SETTINGS = ("precision", "attention", "remat")

# (experiment, mesh) -> configuration and parameters of the backbone that stage 2 is built with.
Backbone = Callable[[Experiment, Mesh], tuple[VideoDiTConfig, Params]]


def backbone_checkpoint(
    experiment: Experiment, trained: Mapping[str, Any] | None = None, by: str = ""
) -> Checkpoint | None:
    """Chooses the stage-1 checkpoint that stage 2 reads; None for an untrained backbone.

    Args:
        experiment: `config.backbone.checkpoint` is a training directory of stage 1 or of a joint
            run, or "".
        trained: The `backbone_identity` that a decoder was trained on: that step is taken, or
            another one with the same weights. None for a new training, which takes the newest
            step. {} if an earlier version did not store it: the newest step is taken with a
            warning.
        by: The decoder, for messages.

    Raises:
        CheckpointMismatch: If the directory no longer holds the weights the decoder was trained on.
    """
    config = experiment.config
    directory, seed = config.backbone.checkpoint, (trained or {}).get("untrained")
    if trained and (seed is not None or not directory) and seed != _untrained_seed(config):
        raise CheckpointMismatch(
            f"{by} was trained on {_described(trained)}, but this configuration has "
            f"backbone.checkpoint={directory!r} and training.seed={config.training.seed}: use "
            "those of training, or train stage 2 again in a new --workdir."
        )
    if not directory:
        return None
    newest = find_checkpoint(directory).network("video")
    if not trained:
        if trained is not None:
            log.warning(
                "%s does not store the step of its backbone, as in earlier versions: step %d of %s "
                "is used.",
                by,
                newest.step,
                directory,
            )
        return newest
    steps = checkpoint_steps(directory)
    wanted = {key: value for key, value in trained.items() if key in ("digest", "lora")}
    held = f"{directory} now holds the steps {steps}"
    for step in sorted(steps, key=lambda step: (step != trained["step"], -step)):
        found = find_checkpoint(directory, step).network("video")
        same_step = step == trained["step"]
        if not same_step and "digest" not in found.meta:
            continue  # computing the digests of all steps would take too long
        unlike = different(wanted, {k: v for k, v in found.identity.items() if k != "step"})
        if not unlike:
            return found
        if same_step:
            held = f"that step now holds other weights ({unlike})"
    raise CheckpointMismatch(
        f"{by} was trained on {_described(trained)}, but {held}: restore that step, name a copy of "
        "it as backbone.checkpoint, or train stage 2 again in a new --workdir."
    )


def backbone_identity(experiment: Experiment, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """What stage 2 stores of the backbone it reads, of `backbone_checkpoint`."""
    if checkpoint is None:
        return {"untrained": experiment.config.training.seed}
    return {"directory": str(checkpoint.directory), **checkpoint.identity}


def trained_backbone(workdir: Path) -> dict[str, Any] | None:
    """What a stage-2 run has stored of its backbone; None for a new run, {} for an old one."""
    for step in reversed(checkpoint_steps(workdir)):
        try:
            return read_meta(workdir, step=step).get("backbone", {})
        except OSError as error:
            if not is_damage(error):  # a run that is not read is not a new one
                raise
    return None  # what is damaged is reported when the run resumes


def _described(trained: Mapping[str, Any]) -> str:
    if "untrained" in trained:
        return f"an untrained backbone of seed {trained['untrained']}"
    return f"step {trained['step']} of {trained['directory']} (digest {trained['digest']})"


def abstract_backbone(experiment: Experiment, mesh: Mesh) -> tuple[VideoDiTConfig, Params]:
    """As `load_backbone`, but shapes only: nothing is read or allocated."""
    model = _frozen(experiment.video, experiment)
    return model, _abstract(video_network(model), mesh, experiment.rules, model.dtype)


def load_backbone(
    experiment: Experiment,
    mesh: Mesh,
    *,
    step: int | None = None,
    directory: str | Path | None = None,
) -> tuple[VideoDiTConfig, Params]:
    """Restores a trained backbone onto this mesh, every device reading only its part.

    Args:
        experiment: The settings of the video model must agree with what was trained, except those
            of how it is computed.
        step: Which checkpoint, of `backbone_checkpoint`; the newest when None.
        directory: The training directory, of stage 1 or of a joint run; None for
            `config.backbone.checkpoint`, which may be "" for an untrained backbone drawn from
            `training.seed` (the baseline of sample-efficiency studies).

    Returns:
        The backbone's configuration without LoRA, and its parameters: float32 where it
        computes in float32, bfloat16 otherwise.

    Raises:
        CheckpointMismatch: If the directory holds another stage or another model.
    """
    config, rules = experiment.config, experiment.rules
    if directory is None:
        directory = config.backbone.checkpoint
    if not directory:
        model = _frozen(experiment.video, experiment)
        dtype, network = model.dtype, video_network(model)
        make = jax.jit(
            lambda key: _cast(network.init(key), dtype),
            out_shardings=sharding_tree(network.axes, mesh, rules, network.abstract),
        )
        return model, make(jax.random.key(config.training.seed))
    directory = Path(directory)
    found = find_checkpoint(directory, step).network("video")
    stored = _checked_config(found, config, ("clip", "video_model", "text"))
    _warn_of_other_cameras(stored, config, directory)
    # Only this, so that settings of then which are out of range today do not matter.
    sections = ("clip", "video_model", "lora", "text")
    trained = Experiment.from_config({k: stored[k] for k in sections if k in stored}).video
    model = _frozen(trained, experiment)
    network, dtype = video_network(model), model.dtype
    shardings = sharding_tree(network.axes, mesh, rules, network.abstract)

    def finished(params: Params) -> Params:
        params = _cast(merge_lora(params, trained.lora) if trained.lora else params, dtype)
        return quantize_params(params, network.abstract) if model.precision == "int8" else params

    # Adapters are merged in float32 and then cast: a small update would be lost in bfloat16.
    read = "float32" if trained.lora else dtype
    abstract = _abstract(video_network(trained), mesh, rules, read)
    stored = restore_params(directory, abstract, step=found.step, part=found.part)
    if trained.lora is None and model.precision != "int8":
        return model, stored
    return model, jax.jit(finished, out_shardings=shardings)(stored)


def load_decoder(
    experiment: Experiment, directory: Path, mesh: Mesh, *, step: int | None = None
) -> Params:
    """Restores the decoder of a stage-2 or joint run onto this mesh; the newest for `step` None.

    Raises:
        CheckpointMismatch: If the directory holds another stage, or the experiment has other
            networks or inputs than the decoder was trained with.
    """
    config = experiment.config
    sections = ("clip", "video_model", "text", "policy_io", "decoder")
    sections += ("context_layer", "context_frames")
    found = find_checkpoint(directory, step).network("action")
    stored = _checked_config(found, config, sections)
    own = not found.part  # of a joint run the backbone is in the same checkpoint
    if own and "backbone" in stored and _untrained_seed(stored) != _untrained_seed(config):
        raise CheckpointMismatch(
            f"{directory} was trained with backbone.checkpoint={stored.backbone.checkpoint!r} and "
            f"training.seed={stored.training.seed}, this configuration has "
            f"{config.backbone.checkpoint!r} and {config.training.seed}; an untrained backbone is "
            "the same only with the same seed."
        )
    abstract = _abstract(experiment.decoder_network, mesh, experiment.rules)
    return restore_params(directory, abstract, step=found.step, part=found.part)


def _untrained_seed(config: Any) -> int | None:
    """The seed that decides an untrained backbone; None for a trained one."""
    return None if config.backbone.checkpoint else config.training.seed


def _checked_config(checkpoint: Checkpoint, config: Any, sections: Sequence[str]) -> ConfigDict:
    """The stored configuration, if its sections agree with `config` in all that weights need."""
    meta, directory = checkpoint.meta, checkpoint.directory
    stored = meta["config"]
    _check_views(*(_views(one) for one in (stored, config)), directory)
    here = {s: config[s] for s in sections if s in config}
    there = {s: stored[s] for s in sections if s in stored}
    if "converted" in meta:  # converted weights decide some settings and leave others open
        here = _common_settings(here, there)
    different = differences(_without_compute(there), _without_compute(here))
    if different:
        raise CheckpointMismatch(
            f"{directory} was trained with other settings: {'; '.join(different)}. Use those, or "
            "another directory."
        )
    return ConfigDict(stored)


def _views(config: Any) -> list[str]:
    return sorted(config.get("clip", {}).get("views") or ())


def _check_views(there: list[str], here: list[str], directory: Path) -> None:
    """A network without a view has never seen it; converted weights and older runs have none."""
    if there == here:
        return
    trained, given = (
        f"the views {', '.join(names)}" if names else "none" for names in (there, here)
    )
    raise CheckpointMismatch(
        f"{directory} was trained with {trained} beside the video, but this configuration has "
        f"{given}: use the clip.views of its training, or train stage 1 with these views from it "
        f"(config.init_from={str(directory)!r})."
    )


def _warn_of_other_cameras(stored: Any, config: Any, directory: Path) -> None:
    """What the same dataset shows the two stages: equal shapes need not be the same pictures."""
    datasets = config.get("datasets", {})
    for name, then in stored.get("datasets", {}).items():
        if name not in datasets:
            continue
        cameras = [
            plain({key: dataset[key] for key in ("video", "views") if dataset.get(key)})
            | {"augment.crop": Augment.of(dataset).crop}
            for dataset in (then, datasets[name])
        ]
        if different := differences(*cameras, f"datasets.{name}"):
            log.warning(
                "The backbone %s was trained on other cameras, or on the same ones arranged or "
                "cropped otherwise, than the decoder sees (%s).",
                directory,
                "; ".join(different),
            )


def _common_settings(config: Any, stored: Any) -> Any:
    """The part of a configuration that has a counterpart in `stored`."""
    if not isinstance(stored, Mapping):
        return config
    return {key: _common_settings(config[key], stored[key]) for key in stored if key in config}


def _without_compute(section: Any) -> Any:
    if not isinstance(section, Mapping | ConfigDict):
        return section
    return {
        name: _without_compute(value)
        for name, value in section.items()
        if name not in COMPUTE_SETTINGS
    }


def _frozen(model: VideoDiTConfig, experiment: Experiment) -> VideoDiTConfig:
    """The network without LoRA, computed as this program says and not as its training did."""
    config = experiment.config
    here = {n: config.video_model[n] for n in COMPUTE_SETTINGS if n in config.video_model}
    if "backbone" in config:  # else as it is trained
        here["precision"] = config.backbone.precision
    return dataclasses.replace(model, lora=None, **here)


def _abstract(network: Network, mesh: Mesh, rules: Rules, dtype: str = "float32") -> Params:
    shardings = sharding_tree(network.axes, mesh, rules, network.abstract)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(lambda: _cast(jax.tree.map(jnp.zeros_like, network.abstract), dtype)),
        shardings,
    )


def _cast(params: Params, dtype: str) -> Params:
    """Parameters in a dtype, but for int8 kernels and their scales, which stay as they are."""
    kept = {path[:-1] for path, leaf in flatten_dict(params).items() if leaf.dtype == jnp.int8}
    return unflatten_dict(
        {
            path: leaf if path[:-1] in kept else leaf.astype(dtype)
            for path, leaf in flatten_dict(params).items()
        }
    )
