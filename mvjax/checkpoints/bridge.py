"""Reading the parameters of a training directory into another program: the stage bridge.

Stage 2, the policy and the evaluation start from a stage-1 directory. Only the parameters are
read, straight onto the reader's own mesh and dtype: each device reads its part, and optimizer
state is never touched.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from mvjax.checkpoints import damage
from mvjax.checkpoints.store import checkpoint_folder, stored_tree
from mvjax.checkpoints.tree_match import check_match, check_restored, leaf_paths
from mvjax.models.param_tree import Params, merge


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
    with damage.said(where):
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
    with damage.said(where):
        stored = stored_tree(where)["params"]
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored)


def latest_step(directory: Path) -> int:
    """The newest checkpoint of a training directory."""
    return int(step_folder(directory, None).name)


def read_meta(directory: Path, *, step: int | None = None) -> dict[str, Any]:
    """The description stored with a checkpoint: configuration, versions, data, normalizer."""
    where = step_folder(directory, step)
    with damage.said(where):  # no Checkpointer: it asks for devices, before processes have met
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
