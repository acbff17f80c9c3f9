"""Where a run's first state comes from, and the description stored with its checkpoints."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import optax

from mvjax.checkpoints.bridge import abstract_params, restore_params
from mvjax.checkpoints.store import Store
from mvjax.checkpoints.tree_match import CheckpointMismatch
from mvjax.checkpoints.versions import library_versions
from mvjax.models.param_tree import Params, split
from mvjax.training.stage import Stage
from mvjax.training.state import TrainState, create_state


def start_state(
    config: Any,
    stage: Stage,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    store: Store,
    loader: Any,
    meta: Mapping[str, Any],
) -> TrainState:
    """Makes the state a run begins with; the order is

    1. continue this training directory, loader position included;
    2. else the parameters of the training directory `config.init_from`, at step 0 (LoRA adapters
       it does not have start as new);
    3. else from scratch.

    Args:
        config: `init_from` and `training.seed` are read.
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
        changes = _changes(restored.meta.get("config", {}), meta["config"])
        say(f"continuing {store.folder.parent} at step {int(restored.state.step)}.")
        if changes:
            say(f"settings changed since that checkpoint: {'; '.join(changes)}.")
        loader.set_state(restored.position)
        return restored.state
    seed = int(config.training.seed)
    if config.init_from:
        say(f"starting from the parameters of {config.init_from}.")
        params = _initial_params(Path(config.init_from), abstract.params)
        return create_state(stage, optimizer, abstract, seed, params)
    return create_state(stage, optimizer, abstract, seed)


def describe(config: Any, stage: Stage, extra: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says about itself: stage, configuration, versions, and `extra`."""
    return {
        "stage": stage.name,
        "config": json.loads(config.to_json_best_effort()),
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


def _changes(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    changes = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += _changes(old, new, f"{prefix}{key}.")
        elif old != new:
            changes.append(f"{prefix}{key} {old!r} -> {new!r}")
    return changes
