"""How the released networks are split over chips, written down so that a change shows in a diff.

python tests/sharding_dumps.py

rewrites tests/golden/shardings/. Shapes only: 256 chips and 14 billion parameters cost nothing.
"""

import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from mvjax.experiment import Experiment
from mvjax.models.network import Params, split
from mvjax.parallel import MESH_AXES, make_rules
from mvjax.training.bridge import abstract_backbone
from mvjax.training.checkpoint import leaf_paths
from mvjax.training.objectives import make_stage
from mvjax.training.step import abstract_state, make_optimizer

FOLDER = Path(__file__).with_name("golden") / "shardings"
# A small slice, and two slices that use every axis.
TOPOLOGIES = {"8": (1, 8, 1, 1), "256": (2, 32, 2, 2)}
CASES = {
    "2b_lora": ("bridge_video", {}),
    "2b_full": ("bridge_video", {"lora.rank": 0}),
    "2b_action": ("bridge_action", {}),
    "14b_full": ("cosmos14b_video", {}),
}


def names() -> Iterator[tuple[str, str]]:
    """Every (case, topology)."""
    return ((case, topology) for case in CASES for topology in TOPOLOGIES)


def config_of(case: str) -> ConfigDict:
    """The configuration that a dump describes."""
    name, settings = CASES[case]
    config = importlib.import_module(f"configs.{name}").get_config()
    config.update_from_flattened_dict(settings)
    return config


def dump(case: str, topology: str) -> dict[str, Any]:
    """What every chip of a topology holds of a stage: totals, and a row per tensor."""
    config, shape = config_of(case), TOPOLOGIES[topology]
    mesh = AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    rules = make_rules(config.rules)
    stage = make_stage(Experiment.from_config(config), mesh, abstract_backbone)
    optimizer = make_optimizer(config.optimizer)
    state = abstract_state(stage, optimizer, config.training.ema_decay > 0, mesh, rules)
    learns = leaf_paths(split(state.params, stage.trainable)[0])
    axes = traverse_util.flatten_dict(stage.axes, sep="/")
    totals = {
        "parameters": _bytes(state.params),
        "optimizer": _bytes(state.opt_state),
        "moving average": _bytes(state.ema),
        "frozen backbone": _bytes(stage.frozen),
    }
    return {
        "config": " ".join([CASES[case][0], *(f"{k}={v}" for k, v in CASES[case][1].items())]),
        "mesh": dict(zip(MESH_AXES, shape)),
        "bytes per device": totals | {"together": sum(totals.values())},
        "parameters": {
            name: {**_row(leaf), "axes": axes[name], "learns": name in learns}
            for name, leaf in leaf_paths(state.params).items()
        },
        "frozen backbone": {name: _row(leaf) for name, leaf in leaf_paths(stage.frozen).items()},
    }


def _row(leaf: jax.ShapeDtypeStruct) -> dict[str, Any]:
    return {
        "shape": leaf.shape,
        "dtype": leaf.dtype.name,
        "split": tuple(leaf.sharding.spec),
        "bytes per device": _bytes(leaf),
    }


def _bytes(tree: Params) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def as_text(dump: dict[str, Any]) -> str:
    """JSON with one tensor per line, so that a diff names the tensor."""
    sections = []
    for name, value in dump.items():
        if name in ("parameters", "frozen backbone"):
            rows = [f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(value.items())]
            body = "{\n" + ",\n".join(rows) + "\n  }" if rows else "{}"
        else:
            body = json.dumps(value)
        sections.append(f"  {json.dumps(name)}: {body}")
    return "{\n" + ",\n".join(sections) + "\n}\n"


def path_of(case: str, topology: str) -> Path:
    """The file of a dump."""
    return FOLDER / f"{case}_{topology}.json"


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for each in names():
        path_of(*each).write_text(as_text(dump(*each)))
