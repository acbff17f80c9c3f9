"""All stages on eight simulated devices, in several arrangements, compared with one device.

python tests/mesh_equality.py [KIND:DATA,FSDP,CONTEXT,TENSOR:ACCUMULATE ...]

prints one JSON line per case; without arguments, for all of them (about eight minutes).
"""

import itertools
import json
import math
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

if __name__ == "__main__":  # before jax is imported
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np
from ml_collections import ConfigDict
from tiny_stages import VIEWS, quick_compiles, tiny_batch, tiny_config

from mvjax.experiment import Experiment
from mvjax.parallel import MESH_AXES, make_mesh, make_rules, sharding_tree
from mvjax.training.bridge import abstract_backbone, load_backbone
from mvjax.training.checkpoint import leaf_paths
from mvjax.training.objectives import make_stage
from mvjax.training.step import TrainState, assemble, compile_step, create_state

KINDS = ("full", "lora", "action", "joint", "views", "action_views", "observed_first_views")
MESHES = ((8, 1, 1, 1), (1, 8, 1, 1), (1, 2, 2, 2), (2, 2, 2, 1), (1, 1, 8, 1))
STEPS = 5


class Case(NamedTuple):
    """What is trained, how the devices are arranged, and in how many parts a batch is taken."""

    kind: str
    mesh: tuple[int, ...]
    accumulate: int

    def __str__(self) -> str:
        return f"{self.kind}:{','.join(map(str, self.mesh))}:{self.accumulate}"


class Run(NamedTuple):
    """Losses of five steps, and the first step's gradient by parameter."""

    losses: np.ndarray
    gradient: dict[str, np.ndarray]


class Start(NamedTuple):
    """What every arrangement begins with, on the host."""

    state: TrainState
    frozen: Any


def all_cases() -> list[Case]:
    """Every stage on every mesh, with and without accumulation."""
    return [Case(*parts) for parts in itertools.product(KINDS, MESHES, (1, 2))]


def parse(word: str) -> Case:
    """The case that `str` wrote."""
    kind, mesh, accumulate = word.split(":")
    return Case(kind, tuple(map(int, mesh.split(","))), int(accumulate))


def config_of(kind: str) -> ConfigDict:
    """Tiny sizes that every axis divides; micro-batches of eight samples."""
    stage = kind.partition("_")[0]
    config = tiny_config(stage if stage in ("action", "joint") else "video", ema_decay=0.0)
    if kind.endswith("views"):
        config.clip.views = VIEWS
    config.training.batch_size = 16
    if kind.startswith("observed_first"):
        config.video_model.attention_to = "observed_first"
    if kind in ("lora", "joint", "views"):
        config.lora.update(rank=8, alpha=8.0)
        config.rules.lora = ("fsdp",)  # as published LoRA runs split their adapters
    return config


def run(case: Case, start: Start | None = None) -> tuple[Run, Start]:
    """Five steps from `start`, or from what is drawn; also gives what it began with."""
    config = config_of(case.kind)
    devices = jax.devices()[: math.prod(case.mesh)]
    mesh, rules = make_mesh(dict(zip(MESH_AXES, case.mesh)), devices), make_rules(config.rules)
    config.training.accumulate = case.accumulate

    def backbone_of(*where):
        if start is None:
            return load_backbone(*where)
        model, abstract = abstract_backbone(*where)
        return model, _placed(start.frozen, abstract)

    with jax.set_mesh(mesh):
        stage = make_stage(Experiment.from_config(config), mesh, backbone_of)
        optimizer, abstract, step = assemble(Experiment.from_config(config), stage, mesh)
        if start is None:
            state = create_state(stage, optimizer, abstract, config.training.seed)
            start = Start(*jax.tree.map(np.array, (state, stage.frozen)))
        else:
            state = _placed(start.state, abstract)
        split = sharding_tree(stage.batch_axes, mesh, rules)
        compiled, losses, gradient = None, [], {}
        for number in range(STEPS):
            arrays = tiny_batch(config, number)
            batch = {name: jax.device_put(arrays[name], to) for name, to in split.items()}
            compiled = compiled or compile_step(step, state, stage.frozen, batch)
            state, metrics = compiled(state, stage.frozen, batch)
            losses.append(float(metrics["loss"]))
            if not gradient:  # nothing is clipped: Adam's first moment is (1 - b1) times it
                moment = leaf_paths(state.opt_state.inner[1].mu)
                gradient = {k: np.asarray(m) / (1 - config.optimizer.b1) for k, m in moment.items()}
    return Run(np.array(losses), gradient), start


def compare(one: Run, other: Run) -> dict[str, Any]:
    """The largest relative differences of `other` from `one`, and the tensor that differs most.

    A gradient that is zero but for rounding has no relative difference of meaning, so a hundredth
    of the whole gradient's norm is added to the norm of every tensor.
    """
    whole = np.sqrt(sum(np.sum(g**2) for g in one.gradient.values()))
    difference = {
        name: float(np.linalg.norm(other.gradient[name] - g) / (np.linalg.norm(g) + 0.01 * whole))
        for name, g in one.gradient.items()
    }
    worst = max(difference, key=difference.get)
    return {
        "loss": float(np.max(np.abs(other.losses / one.losses - 1))),
        "gradient": difference[worst],
        "tensor": worst,
        "tensors": len(difference),
        "losses": other.losses.tolist(),
    }


def results(cases: list[Case]) -> Iterator[dict[str, Any]]:
    """Runs the cases, one device first for every kind among them."""
    for kind in KINDS:
        chosen = [case for case in cases if case.kind == kind]
        if chosen:
            one, start = run(Case(kind, (1, 1, 1, 1), 1))
        for case in chosen:
            yield {"case": str(case), **compare(one, run(case, start)[0])}


def _placed(arrays: Any, abstract: Any) -> Any:
    return jax.tree.map(
        lambda x, to: jax.device_put(x, to.sharding, may_alias=False), arrays, abstract
    )


if __name__ == "__main__":
    with quick_compiles():
        for result in results([parse(word) for word in sys.argv[1:]] or all_cases()):
            print(json.dumps(result), flush=True)
