"""Where a run begins: at its newest checkpoint, at other parameters, or at random ones.

A checkpoint stores the state, the loader's position (`first_state` moves the loader back there) and
a description of the run (`describe`), which is compared when the run continues.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict

from data_pipelines.settings import differences
from mvjax.experiment import Experiment
from mvjax.models.network import Params, split
from mvjax.training.bridge import COMPUTE_SETTINGS
from mvjax.training.checkpoint import (
    Arrays,
    Store,
    check_match,
    leaf_paths,
    library_versions,
    read_json,
)
from mvjax.training.damage import CheckpointMismatch
from mvjax.training.directory import (
    BACKBONE,
    DECODER,
    abstract_params,
    find_checkpoint,
    read_meta,
    restore_params,
)
from mvjax.training.objectives import Stage
from mvjax.training.step import TrainState, create_state

log = logging.getLogger(__name__)

# The settings that make a finished run what it is: its networks and what they see, ...
_NETWORKS = (
    "clip",
    "video_model",
    "lora",
    "text",
    "context_layer",
    "context_frames",
    "decoder",
    "policy_io",
)
# ... and how they were trained.
_RECIPE = ("flow", "optimizer", "init_from", "decoder_init_from", "backbone")
_TRAINING = ("batch_size", "seed", "ema_decay", "episodes_per_task")
# What decides which samples a batch holds.
_ORDER = ("batch_size", "seed", "episodes_per_task")


def first_state(
    experiment: Experiment,
    stage: Stage,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    store: Store,
    loader: Any,
    meta: Mapping[str, Any],
) -> TrainState:
    """Makes the state a run begins with, from the first of these that exists.

    1. This training directory: the newest readable checkpoint, with optimizer state, averages and
       loader position.
    2. `config.init_from`, a training directory or converted weights: its parameters (averaged
       where it has averages), at step 0, with a new optimizer and the loader's beginning. Where
       this run has LoRA adapters that `init_from` lacks, new ones are added that change nothing
       yet; where it has views that `init_from` lacks, their embeddings start at zero. A joint run
       takes its backbone from there and its decoder from `config.decoder_init_from`, or both from
       another joint run; either may be left out.
    3. Parameters drawn from `training.seed`.

    Args:
        experiment, stage, optimizer: The run.
        abstract: Of `abstract_state`; decides every shape and sharding.
        store: The checkpoints of this training directory.
        loader: Grain iterator, moved to the stored position when continuing.
        meta: Of `describe`, compared with what is stored.
    """
    carried: list[str] = []
    restored = store.restore(abstract, partial(_carry_over, meta["config"], carried))
    if restored is not None:
        _check_same_data(restored.meta, meta)
        _check_same_networks(restored.meta, meta, f"the run in {store.folder.parent}")
        changes = differences(restored.meta.get("config", {}), meta["config"])
        log_once(f"continuing {store.folder.parent} at step {int(restored.state.step)}.")
        if changes:
            log_once(f"settings changed since that checkpoint: {'; '.join(changes)}.")
        _check_position(restored.position, restored.meta.get("config", {}), meta["config"])
        for line in dict.fromkeys(carried):
            log_once(line)
        loader.set_state(restored.position)
        return restored.state
    params = _given_params(experiment.config, stage, abstract.params)
    return create_state(stage, optimizer, abstract, int(experiment.config.training.seed), params)


def _carry_over(
    config: Mapping[str, Any], said: list[str], where: Path, stored: Arrays, abstract: Arrays
) -> tuple[Arrays, Callable[[Arrays], Arrays]]:
    """How a checkpoint becomes the state of a run whose settings may be others.

    The parameters and those that learn must be the same. A moving average that is new begins with
    the parameters; one that is not wanted any more is left out.

    Args:
        config: Of this run.
        said: Receives a sentence about what is begun or left out.
        where, stored, abstract: See `checkpoint.Adapt`.
    """

    def part(item: str) -> Arrays:
        return {name: leaf for name, leaf in stored.items() if name.partition("/")[0] == item}

    try:
        check_match(part("params"), leaf_paths({"params": abstract["params"]}), where)
    except CheckpointMismatch as error:
        raise CheckpointMismatch(f"{error}{_others(where, config, _NETWORKS)}") from None
    wanted, optimizer = dict(abstract), abstract["opt_state"]
    # Earlier versions had no state of the clipping where optimizer.clip_norm was 0.
    if unclipped := "opt_state/inner/0/count" in stored:
        wanted["opt_state"] = optimizer._replace(inner=optimizer.inner[1:])
    if part("opt_state").keys() != leaf_paths({"opt_state": wanted["opt_state"]}).keys():
        raise CheckpointMismatch(
            f"the optimizer of {where} differs from this configuration's, or trains other "
            f"parameters{_others(where, config, ('optimizer', 'lora'))}; use its own settings, or "
            "start in a new directory with config.init_from."
        )
    averaged = bool(part("ema"))
    if averaged != bool(abstract["ema"]):
        wanted.pop("ema")
        if not averaged:  # on the disk, too, it is an empty item
            wanted["ema"] = {}
        said.append(
            "training.ema_decay is 0: the moving average of before is left out."
            if averaged
            else "training.ema_decay was 0: a moving average begins with these parameters."
        )

    def complete(arrays: Arrays) -> Arrays:
        made = {"ema": {}, **arrays}
        if unclipped:
            state = arrays["opt_state"]
            made["opt_state"] = state._replace(inner=(optimizer.inner[0], *state.inner))
        if abstract["ema"] and not averaged:
            learning = flatten_dict(abstract["ema"])
            params, _ = split(arrays["params"], lambda path: path in learning)
            made["ema"] = jax.tree.map(jnp.copy, params)  # both are donated to the step
        return made

    return wanted, complete


def _others(where: Path, config: Mapping[str, Any], sections: Sequence[str]) -> str:
    """The settings of these sections that differ from those of a checkpoint, for a message."""
    before = read_json(where / "meta").get("config", {})
    found = [
        sentence
        for name in sections
        for sentence in differences(before.get(name), config.get(name), name)
    ]
    return f" ({'; '.join(found)})" if found else ""


def check_finished(
    workdir: Path, step: int, stored: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """Reports that a run has already made its last step, or that it was another run.

    Args:
        workdir: The training directory.
        step: The last step it made.
        stored, now: Of `describe`: in its newest checkpoint, and for the run that was asked for.

    Raises:
        CheckpointMismatch: If data, stage or networks are not those of the finished run.
    """
    _check_same_data(stored, now)
    _check_same_networks(stored, now, f"{workdir} is trained to step {step}, but it")
    before, after = _identifying_settings(stored), _identifying_settings(now)
    recipe = differences(before["recipe"], after["recipe"])
    other = f", with other settings ({'; '.join(recipe)}): not trained again" if recipe else ""
    log_once(f"{workdir} is already trained to step {step}{other}.")


def describe(experiment: Experiment, stage: Stage, extra: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint stores about its run: stage, configuration, versions, and `extra`."""
    return {
        "stage": stage.name,
        "config": json.loads(experiment.config.to_json_best_effort()),
        "versions": library_versions(),
        **extra,
    }


def log_once(line: str) -> None:
    """Logs a line once per job and not once per process."""
    if jax.process_index() == 0:
        log.info(line)


def _given_params(config: Any, stage: Stage, abstract: Params) -> Params | None:
    """The parameters that a configuration names for the start of a run; None where it names none.

    A joint run may be given those of one of its networks alone.
    """
    start = config.init_from
    if not stage.parts:
        return _initial_params(start, abstract, stage.name) if start else None
    of_decoder = config.get("decoder_init_from")
    if not of_decoder and start and read_meta(Path(start))["stage"] == stage.name:
        of_decoder = start
    parts = (BACKBONE, start, "video"), (DECODER, of_decoder, "action")
    return {
        name: _initial_params(directory, abstract[name], trains, f" the {name}")
        for name, directory, trains in parts
        if directory
    }


def _initial_params(directory: str, abstract: Params, stage: str, which: str = "") -> Params:
    """The parameters of the network that a stage trains, for those that are asked for."""

    def is_adapter(path: tuple[str, ...]) -> bool:
        return path[-1] in ("lora_a", "lora_b")

    log_once(f"starting{which} from the parameters of {directory}.")
    found = find_checkpoint(Path(directory)).network(stage)
    of = dict(step=found.step, part=found.part)
    stored = abstract_params(found.directory, **of)
    there, here = (set(params.get("view_embedding", ())) for params in (stored, abstract))
    if dropped := sorted(there - here):
        raise CheckpointMismatch(
            f"{directory} was trained with the views {', '.join(sorted(there))}, of which this "
            f"configuration lacks {', '.join(dropped)}: add them to clip.views, or start from "
            "another run."
        )
    if new := here - there:
        log_once(f"{directory} has no view {', '.join(sorted(new))}; its embedding starts at zero.")
    adapted = bool(split(stored, is_adapter)[0])
    adapters, base = split(abstract, lambda path: is_adapter(path) and not adapted)
    if adapters:
        log_once(f"{directory} has no LoRA adapters; new ones are added.")
    is_new = lambda path: path[0] == "view_embedding" and path[-1] in new  # noqa: E731
    return restore_params(found.directory, split(base, is_new)[1], **of)


def _check_same_data(stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    before, after = stored.get("data_fingerprint"), now.get("data_fingerprint")
    if before != after:
        raise CheckpointMismatch(
            f"the run was trained on data with the fingerprint {before}, but the data now has "
            f"{after}; restore the data, or start a new directory with config.init_from."
        )
    statistics = stored.get("normalizer_digest")  # absent in runs of earlier versions
    if statistics and statistics != now.get("normalizer_digest"):
        raise CheckpointMismatch(
            "normalizer.json has been changed since the run was trained with it: restore the file, "
            "or start a new directory."
        )


def _check_position(position: Any, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses a position of earlier versions, in batches, if these hold other samples now."""
    if not (isinstance(position, dict) and "next_index" in position):
        return
    before, after = (
        {
            "training": {k: v for k, v in config.get("training", {}).items() if k in _ORDER},
            "datasets": {
                k: {"weight": d.get("weight")} for k, d in config.get("datasets", {}).items()
            },
        }
        for config in (stored, now)
    )
    if different := differences(before, after):
        raise CheckpointMismatch(
            f"this checkpoint stores its position in batches, and these settings change what a "
            f"batch holds: {'; '.join(different)}. Restore them; after the next checkpoint, which "
            "counts samples, they may change."
        )


def _check_same_networks(stored: Mapping[str, Any], now: Mapping[str, Any], run: str) -> None:
    """Networks of equal widths may still be others: a layer, an offset in time, a LoRA scale."""
    before, after = (_identifying_settings(meta)["networks"] for meta in (stored, now))
    if networks := differences(before, after):
        raise CheckpointMismatch(
            f"{run} has other settings: {'; '.join(networks)}; use those, or a new directory "
            "(config.init_from starts from the parameters of another run)."
        )


def _identifying_settings(meta: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    config = meta["config"]
    networks = {"stage": meta["stage"], **{k: config[k] for k in _NETWORKS if k in config}}
    for name in ("video_model", "decoder"):
        if name in networks:  # the same weights may be computed in another way
            networks[name] = {k: v for k, v in networks[name].items() if k not in COMPUTE_SETTINGS}
    recipe = {k: config[k] for k in _RECIPE if k in config}
    training = {k: v for k, v in config["training"].items() if k in _TRAINING}
    return {"networks": networks, "recipe": recipe | {"training": training}}
