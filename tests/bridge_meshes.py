"""The stage bridge between meshes: saved by eight devices, read by two of them.

python tests/bridge_meshes.py FOLDER

prints as JSON what the two devices hold of a LoRA run's backbone, merged and in bfloat16.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before jax is imported
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import dataclasses

import jax
import numpy as np
from ml_collections import ConfigDict
from tiny_stages import build_stage, quick_compiles, tiny_config

from mvjax.experiment import Experiment
from mvjax.models.lora import merge_lora
from mvjax.models.network import Params
from mvjax.parallel import make_mesh
from mvjax.training.bridge import load_backbone
from mvjax.training.checkpoint import Store, leaf_paths
from mvjax.training.resume import describe
from mvjax.training.step import TrainState, assemble, create_state


def save_on_eight(folder: Path) -> tuple[ConfigDict, Params]:
    """A LoRA run at step 0, with adapters that are not zero; its configuration and parameters."""
    config = tiny_config("video", ema_decay=0.0)
    config.lora.update(rank=8, alpha=4.0)
    config.rules.lora = ("fsdp",)  # as published runs split their adapters
    config.mesh.update(data=1, fsdp=2, context=2, tensor=2)
    stage, mesh, _ = build_stage(config)
    optimizer, abstract, _ = assemble(Experiment.from_config(config), stage, mesh)
    with jax.set_mesh(mesh), Store(folder, keep=1) as store:
        state = create_state(stage, optimizer, abstract, seed=0)
        state = dataclasses.replace(state, params=_adapted(state))
        store.save(0, state, None, describe(Experiment.from_config(config), stage, {}))
    return config, jax.tree.map(np.asarray, state.params)


def _adapted(state: TrainState) -> Params:
    rng = np.random.default_rng(0)

    def changed(path, leaf):
        if path[-1].key != "lora_b":
            return leaf
        return jax.device_put(rng.normal(size=leaf.shape).astype(np.float32), leaf.sharding)

    return jax.tree_util.tree_map_with_path(changed, state.params)


def read_on_two(folder: Path) -> Params:
    """What stage 2 has after reading `folder` with two devices."""
    config = tiny_config("action")
    config.backbone.update(checkpoint=str(folder), precision="bfloat16")
    mesh = make_mesh({"fsdp": 2}, jax.devices()[:2])
    with jax.set_mesh(mesh):
        return load_backbone(Experiment.from_config(config), mesh)[1]


def compare(merged: Params, read: Params) -> dict[str, Any]:
    """Which tensors differ from `merged`, and which are whole on a device."""
    expected, found = leaf_paths(merged), leaf_paths(read)
    return {
        "tensors": len(found),
        "dtypes": sorted({leaf.dtype.name for leaf in found.values()}),
        "devices": sorted({len(leaf.sharding.device_set) for leaf in found.values()}),
        "different": [
            name
            for name in sorted(expected.keys() | found.keys())
            if not np.array_equal(expected[name], np.asarray(found[name]))
        ],
        "whole": [n for n, x in found.items() if x.addressable_shards[0].data.shape == x.shape],
        "bytes": sum(x.nbytes for x in found.values()),
        "bytes on a device": sum(x.addressable_shards[0].data.nbytes for x in found.values()),
    }


def main(folder: Path) -> dict[str, Any]:
    """Saves, merges on one device, reads on two, compares."""
    config, params = save_on_eight(folder)
    lora = Experiment.from_config(config).video.lora
    merged = jax.jit(
        lambda p: jax.tree.map(lambda leaf: leaf.astype("bfloat16"), merge_lora(p, lora))
    )(params)
    return compare(jax.tree.map(np.asarray, merged), read_on_two(folder))


if __name__ == "__main__":
    with quick_compiles():
        print(json.dumps(main(Path(sys.argv[1]))))
