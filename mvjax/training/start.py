"""Where a run's first state comes from, and the description stored with its checkpoints."""

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, Mesh

from data_pipelines.settings import differences
from mvjax.experiment import Experiment
from mvjax.models.network import Params, split
from mvjax.parallel import sharding_tree
from mvjax.training.bridge import (
    COMPUTE_SETTINGS,
    Backbone,
    abstract_params,
    load_backbone,
    restore_params,
)
from mvjax.training.checkpoint import CheckpointMismatch, Store, library_versions
from mvjax.training.objectives import Batch, Stage, action_stage, video_stage
from mvjax.training.step import (
    Step,
    TrainState,
    abstract_state,
    compile_step,
    create_state,
    make_optimizer,
    make_schedule,
    make_step,
)

# What a finished run is: its networks and what they see. Compute settings are not part of it.
_NETWORKS = ("clip", "video_model", "lora", "text", "context_layer", "decoder", "policy_io")
# What decides how the networks were trained.
_RECIPE = ("flow", "optimizer", "init_from", "backbone")
_TRAINING = ("batch_size", "seed", "ema_decay", "episodes_per_task")


def start_state(
    experiment: Experiment,
    stage: Stage,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    store: Store,
    loader: Any,
    meta: Mapping[str, Any],
) -> TrainState:
    """Makes the state a run begins with: the first of these that there is.

    1. This training directory: everything goes on, optimizer, averages and loader position too.
       Its newest checkpoint that can be read counts.
    2. `config.init_from`, a training directory or converted weights: its parameters (averaged
       where it has averages), at step 0, with a new optimizer and the loader's beginning.
    3. The same where this run has LoRA adapters that `init_from` does not: its parameters, and
       new adapters that change nothing yet.
    4. Scratch: parameters drawn from `training.seed`.

    Args:
        experiment: `config.init_from` and `config.training.seed` are read.
        stage: Gives initial parameters.
        optimizer: Of `make_optimizer`.
        abstract: Of `abstract_state`; says every shape and sharding.
        store: The checkpoints of this training directory.
        loader: Grain iterator, moved to the stored position when continuing.
        meta: Of `describe`, compared with what is stored.
    """
    restored = store.restore(abstract)
    if restored is not None:
        _check_same_data(restored.meta, meta)
        changes = differences(restored.meta.get("config", {}), meta["config"])
        say(f"continuing {store.folder.parent} at step {int(restored.state.step)}.")
        if changes:
            say(f"settings changed since that checkpoint: {'; '.join(changes)}.")
        loader.set_state(restored.position)
        return restored.state
    config, seed = experiment.config, int(experiment.config.training.seed)
    if config.init_from:
        say(f"starting from the parameters of {config.init_from}.")
        params = _initial_params(Path(config.init_from), abstract.params)
        return create_state(stage, optimizer, abstract, seed, params)
    return create_state(stage, optimizer, abstract, seed)


def say_finished(workdir: Path, step: int, stored: Mapping[str, Any], now: Mapping[str, Any]):
    """Tells that a run is at its last step already; or that it is another run than was asked for.

    Args:
        workdir: The training directory.
        step: The step it has reached.
        stored: The description in its newest checkpoint.
        now: Of `describe`, for the run that was asked for.

    Raises:
        CheckpointMismatch: If data, stage or networks are not those of the finished run.
    """
    _check_same_data(stored, now)
    before, after = _chosen(stored), _chosen(now)
    networks = differences(before["networks"], after["networks"])
    if networks:
        raise CheckpointMismatch(
            f"{workdir} is trained to step {step}, but with other settings: "
            f"{'; '.join(networks)}; use those, or a new --workdir."
        )
    recipe = differences(before["recipe"], after["recipe"])
    other = f", with other settings ({'; '.join(recipe)}): not trained again" if recipe else ""
    say(f"{workdir} is already trained to step {step}{other}.")


def describe(experiment: Experiment, stage: Stage, extra: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says about itself: stage, configuration, versions, and `extra`."""
    return {
        "stage": stage.name,
        "config": json.loads(experiment.config.to_json_best_effort()),
        "versions": library_versions(),
        **extra,
    }


def say(line: str) -> None:
    """Prints a line for the person, once per run, beside (not into) the program's output."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


def _initial_params(directory: Path, abstract: Params) -> Params:
    stored = abstract_params(directory)
    if split(stored, _is_adapter)[0]:
        return restore_params(directory, abstract)
    adapters, base = split(abstract, _is_adapter)
    if adapters:
        say(f"{directory} has no LoRA adapters; new ones are added.")
    return restore_params(directory, base)


def _is_adapter(path: tuple[str, ...]) -> bool:
    return path[-1] in ("lora_a", "lora_b")


def _check_same_data(stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    before, after = stored.get("data_fingerprint"), now.get("data_fingerprint")
    if before != after:
        raise CheckpointMismatch(
            f"the run was trained on data with the fingerprint {before}, but the data now has "
            f"{after}; bring the data back, or start a new directory with config.init_from."
        )


def _chosen(meta: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of a description that make a run what it is."""
    config = meta["config"]
    networks = {"stage": meta["stage"], **{k: config[k] for k in _NETWORKS if k in config}}
    for name in ("video_model", "decoder"):
        if name in networks:
            networks[name] = {k: v for k, v in networks[name].items() if k not in COMPUTE_SETTINGS}
    recipe = {k: config[k] for k in _RECIPE if k in config}
    training = {k: v for k, v in config["training"].items() if k in _TRAINING}
    return {"networks": networks, "recipe": recipe | {"training": training}}


# From a configuration to its stage.


def make_stage(
    experiment: Experiment, mesh: Mesh, backbone_of: Backbone = load_backbone
) -> Stage:
    """The stage that `config.stage` names; the mesh and `backbone_of` are for stage 2's backbone."""
    if experiment.stage == "video":
        return video_stage(experiment)
    return action_stage(experiment, mesh, backbone_of)


# The train step of a configuration with its arguments as shapes: nothing is allocated.


@dataclass(frozen=True)
class Program:
    """A train step and its arguments as shapes with shardings.

    Attributes:
        mesh: the devices; abstract (`abstract_mesh`) where only shapes are wanted.
        stage, optimizer: what is trained, and how.
        step: not compiled.
        state, batch: its arguments, beside `stage.frozen`.
    """

    mesh: Mesh | AbstractMesh
    stage: Stage
    optimizer: optax.GradientTransformation
    step: Step
    state: TrainState
    batch: Batch

    @property
    def argument_bytes(self) -> int:
        """Of state, frozen network and batch, per device, without what a compiler pads."""
        return _bytes((self.state, self.stage.frozen, self.batch))

    def compile(self) -> Callable[..., Any]:
        """The compiled step (state, frozen, batch) -> (state, metrics)."""
        with jax.set_mesh(self.mesh):
            return compile_step(self.step, self.state, self.stage.frozen, self.batch)


def make_program(
    experiment: Experiment, mesh: Mesh | AbstractMesh, backbone_of: Backbone = load_backbone
) -> Program:
    """The step that `loop.train` would run on this mesh, not compiled yet.

    Args:
        experiment: of a training run; no data is read.
        mesh: of `make_mesh`, whose devices may be those of a pod that is not here, or of
            `abstract_mesh`, which has none: nothing can be compiled for it.
        backbone_of: `abstract_backbone` where only the shapes of the frozen network are needed.

    Raises:
        ValueError: if batch, mesh, network and devices do not go together.
    """
    stage = make_stage(experiment, mesh, backbone_of)
    optimizer, state, step = assemble(experiment, stage, mesh)
    samples, shapes = experiment.config.training.batch_size, experiment.batch_shapes
    batch = {
        name: jax.ShapeDtypeStruct((samples, *shapes[name]), "float32", sharding=sharding)
        for name, sharding in sharding_tree(stage.batch_axes, mesh, experiment.rules).items()
    }
    return Program(mesh, stage, optimizer, step, state, batch)


def assemble(
    experiment: Experiment, stage: Stage, mesh: Mesh | AbstractMesh
) -> tuple[optax.GradientTransformation, TrainState, Step]:
    """What a configuration trains a stage with: the optimizer, the state as shapes, the step.

    Args:
        experiment: `config.optimizer` and `config.training` are read.
        stage: what is trained.
        mesh: where.

    Raises:
        ValueError: if batch, mesh and stage do not go together.
    """
    config, settings, rules = experiment.config, experiment.config.training, experiment.rules
    experiment.check_batch(mesh)
    optimizer = make_optimizer(config.optimizer)
    step = make_step(
        stage,
        optimizer,
        make_schedule(config.optimizer),
        rules,
        seed=settings.seed,
        ema_decay=settings.ema_decay,
        accumulate=settings.accumulate,
    )
    return optimizer, abstract_state(stage, optimizer, settings.ema_decay > 0, mesh, rules), step


def _bytes(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
