"""Reading a training directory: which checkpoint, its description, its parameters.

Only the parameters are read, straight onto the reader's own mesh and dtype: each device reads its
part, and optimizer state is never touched.
"""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from mvjax.identity import digest, digest_of_sums, piece_sums
from mvjax.models.network import Params, merge, split
from mvjax.training.checkpoint import (
    check_match,
    checkpoint_folder,
    leaf_paths,
    read_arrays,
    read_json,
    stored_tree,
)
from mvjax.training.damage import CheckpointDamaged, CheckpointMismatch, damage_reported

log = logging.getLogger(__name__)

# The networks of a joint run, as parts of its tree of parameters, and the stages that train each
# alone.
BACKBONE, DECODER = "backbone", "decoder"
_PART_OF = {"video": BACKBONE, "action": DECODER}


def restore_params(
    directory: Path,
    abstract: Params,
    *,
    use_ema: bool = True,
    step: int | None = None,
    part: str = "",
) -> Params:
    """Reads the parameters of a finished or running training directory.

    Args:
        directory: The training directory (the one that holds `checkpoints/`).
        abstract: Nested dict of `jax.ShapeDtypeStruct` with the target shape, dtype and sharding;
            it must have exactly the stored parameters.
        use_ema: Take the moving average of a parameter where one is stored.
        step: Which checkpoint; the newest when None.
        part: Of a joint run, the network that is read (`Checkpoint.part`); "" for all.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        CheckpointMismatch: If parameters are absent, extra or of another shape, naming both sides.
        OSError: If it is damaged, or does not hold the numbers that were saved.
    """
    where = step_folder(directory, step)
    with damage_reported(where):
        stored = stored_params(where, part)
        check_match(leaf_paths(stored["params"]), leaf_paths(abstract), where)
        stored_averages = flatten_dict(stored["ema"]) if use_ema else {}
        averaged, raw = split(abstract, lambda path: path in stored_averages)
        wanted = {
            name: {part: tree} if part else tree
            for name, tree in (("params", raw), ("ema", averaged))
            if tree
        }
        restored = read_arrays(where, wanted, partial=True)
        if part:
            restored = {name: tree[part] for name, tree in restored.items()}
        params = merge(restored.get("params", {}), restored.get("ema", {}))
        if use_ema:
            _check_digest(where, leaf_paths(params), leaf_paths(_as_read(stored)), part)
    return params


def stored_params(where: Path, part: str = "") -> dict[str, Params]:
    """Shapes and dtypes of a checkpoint's "params" and "ema" ({} without averages)."""
    stored = stored_tree(where)
    trees = {"params": stored["params"], "ema": stored.get("ema") or {}}
    return {name: tree.get(part, {}) for name, tree in trees.items()} if part else trees


def _as_read(stored: Params) -> Params:
    """The parameters that other programs read: averaged where there is an average."""
    return merge(stored["params"], stored["ema"])


def _check_digest(
    where: Path, restored: Mapping[str, Any], stored: Mapping[str, Any], part: str
) -> None:
    # Of arrays in another dtype than stored, the digest is another one.
    if any(leaf.dtype != stored[name].dtype for name, leaf in restored.items()):
        return
    saved = _saved_digest(read_json(where / "meta"), part)
    if saved and saved != (found := digest(restored)):
        raise CheckpointDamaged(
            f"its parameters have the digest {found}, but had {saved} when they were saved: a file "
            "was changed, or belongs to another checkpoint"
        )


def _saved_digest(meta: Mapping[str, Any], part: str) -> str | None:
    return meta.get("part_digests", {}).get(part) if part else meta.get("digest")


def abstract_params(directory: Path, *, step: int | None = None, part: str = "") -> Params:
    """Shapes and dtypes of the stored parameters, without shardings and without reading them."""
    where = step_folder(directory, step)
    with damage_reported(where):
        stored = stored_params(where, part)["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored)


def read_meta(directory: Path, *, step: int | None = None) -> dict[str, Any]:
    """The description stored with a checkpoint: configuration, versions, data, normalizer."""
    where = step_folder(directory, step)
    with damage_reported(where):
        return read_json(where / "meta")


def trained_config(directory: Path) -> ConfigDict:
    """The configuration that a run was trained with, as its newest checkpoint holds it.

    Relative paths in it belong to the folder in which the run was trained.

    Raises:
        FileNotFoundError: If it is no training directory.
        ValueError: If it holds converted weights, which know nothing but their network.
    """
    config = read_meta(directory).get("config", {})
    if "training" not in config:
        raise ValueError(
            f"{directory} holds converted weights, which know nothing but their network; give "
            "--config=FILE.py, e.g. configs/bridge_action.py (in Python: load_policy)."
        )
    return ConfigDict(_with_tuples(config))


def _with_tuples(value: Any) -> Any:
    """JSON made lists of the tuples; only tuples can be changed on a command line."""
    if isinstance(value, dict):
        return {key: _with_tuples(entry) for key, entry in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def step_folder(directory: Path, step: int | None) -> Path:
    """The folder of a checkpoint, the newest if `step` is None.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
    """
    folder = checkpoint_folder(directory)
    if not folder.is_dir():
        found = folder.parent.is_dir()
        why = "it has no folder 'checkpoints'" if found else "there is no such folder"
        raise FileNotFoundError(
            f"{directory} is not a training directory: {why}. PyTorch weights must be converted "
            f"first (python -m launch.convert SOURCE {directory})."
        )
    steps = checkpoint_steps(directory)
    if not steps or (step is not None and step not in steps):
        wanted = "complete checkpoint" if step is None else f"checkpoint {step}"
        raise FileNotFoundError(f"{directory} has no {wanted}; it has the steps {steps}.")
    return folder / str(steps[-1] if step is None else step)


def checkpoint_steps(directory: Path) -> list[int]:
    """The steps of the complete checkpoints of a training directory, in order; [] if none."""
    folder = checkpoint_folder(directory)
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


# --- A checkpoint that is chosen once ---


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a training directory and its description.

    A program chooses it once and reads everything from it: a training that goes on meanwhile writes
    newer ones and deletes older ones.

    Attributes:
        directory, step, meta: Of the checkpoint.
        part: Of a joint run, BACKBONE or DECODER where only that network is meant; "" for all that
            the checkpoint holds.
    """

    directory: Path
    step: int
    meta: Mapping[str, Any]
    part: str = ""

    def network(self, stage: str) -> "Checkpoint":
        """This checkpoint as that of one network, which stage "video" or "action" trains.

        Raises:
            CheckpointMismatch: If it holds neither that network alone nor both.
        """
        held = self.meta["stage"]
        if held not in (stage, "joint"):
            raise CheckpointMismatch(
                f"{self.directory} is a run of stage {held!r}, but a run of stage {stage!r} is "
                "needed here."
            )
        return self if held == stage else dataclasses.replace(self, part=_PART_OF[stage])

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Step and digest of the parameters that other programs read, and how adapters merge."""
        lora = {} if self.part == DECODER else self.meta["config"].get("lora", {})
        adapters = {"lora": {k: lora[k] for k in ("rank", "alpha")}} if lora.get("rank") else {}
        weights = _saved_digest(self.meta, self.part)
        if not weights:
            log.warning(
                "%s does not store a digest of its weights, as in earlier versions: it is computed "
                "from the files.",
                step_folder(self.directory, self.step),
            )
            weights = stored_digest(self.directory, self.step, self.part)
        return {"step": self.step, "digest": weights, **adapters}


def find_checkpoint(directory: Path, step: int | None = None) -> Checkpoint:
    """A checkpoint of a training directory; the newest if `step` is None."""
    where = step_folder(directory, step)
    return Checkpoint(Path(directory), int(where.name), read_meta(directory, step=int(where.name)))


def stored_digest(directory: Path, step: int, part: str = "") -> str:
    """The digest of a checkpoint's parameters, read leaf by leaf into the host's memory."""
    where, below = step_folder(directory, step), (part,) if part else ()
    with damage_reported(where):
        stored = stored_params(where, part)
        host = jax.sharding.SingleDeviceSharding(_host_device())
        averages, sums = flatten_dict(stored["ema"]), {}
        for path, leaf in flatten_dict(stored["params"]).items():
            item = "ema" if path in averages else "params"
            leaf = averages.get(path, leaf)
            wanted = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host)
            tree = unflatten_dict({(*below, *path): wanted})
            read = read_arrays(where, {item: tree}, partial=True)
            (array,) = jax.tree.leaves(read)
            sums["/".join(path)] = (array.shape, array.dtype, piece_sums(array))
    return digest_of_sums(sums)


def _host_device() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names the accelerator alone
        return jax.local_devices()[0]
