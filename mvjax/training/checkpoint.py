"""Saving and restoring a run: arrays, the loader's position, and what the run is.

A checkpoint is `<workdir>/checkpoints/<step>/` with three items: `state` (the arrays as a plain
nested dict), `data` (JSON: the loader's position, which is that of all processes) and `meta` (JSON:
configuration, versions, data fingerprint, whatever the caller adds). This file and `bridge.py`
alone import orbax.
"""

import dataclasses
import errno
import importlib.metadata
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from mvjax.parallel import everywhere

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
SPARE_BYTES = 8 << 20  # metadata and the loader's position, beside the arrays
SHOWN = 5  # names listed per message


class CheckpointMismatch(ValueError):
    """A readable checkpoint that does not fit the run; the message says what to change."""


@dataclass(frozen=True)
class Restored:
    """A checkpoint read back: the state on its target shardings, loader position and meta."""

    state: Any
    position: Any
    meta: dict[str, Any]


class Store:
    """The checkpoints of one training directory. Close it (or use `with`) to finish writing."""

    def __init__(self, workdir: Path, *, keep: int, keep_every: int = 0):
        """Opens the directory, clearing away half-written checkpoints.

        Args:
            workdir: The training directory.
            keep: How many of the newest checkpoints stay.
            keep_every: Those of steps that this divides stay as well; 0 for none.
        """
        self.folder = checkpoint_folder(workdir)
        kept: list[Any] = [checkpoint_managers.LatestN(keep)]
        if keep_every:
            kept.append(checkpoint_managers.EveryNSteps(keep_every))
        options = checkpoint_managers.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
        )
        self._manager = _Manager(self.folder, options=options)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def meta(self, step: int) -> dict[str, Any] | None:
        """What a complete step says about the run; None if that cannot be read."""
        try:
            found = ocp.JsonCheckpointHandler().restore(self.folder / str(step) / "meta")
        except Exception:  # `restore` tells what is wrong, and goes back a step
            found = None
        return found if everywhere(found is not None) else None

    def save(self, step: int, state: Any, position: Any, meta: Mapping[str, Any]) -> None:
        """Starts writing a checkpoint; returns once the arrays are copied off the devices.

        Args:
            step: Number of steps made.
            state: The train state; may be donated as soon as this returns.
            position: The loader's `get_state()` after the batch of this step (a JSON-able value
                or bytes), the same in all processes.
            meta: JSON-able description of the run.

        Raises:
            OSError: If the disk has no room for it (ENOSPC), before anything is written.
        """
        arrays = vars(state)
        self._check_room(sum(leaf.nbytes for leaf in jax.tree.leaves(arrays)))
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(arrays),
                data=ocp.args.JsonSave(_encoded(position)),
                meta=ocp.args.JsonSave(dict(meta)),
            ),
        )

    def _check_room(self, size: int) -> None:
        # Orbax writes in background threads, whose errors are many and late.
        free = shutil.disk_usage(self.folder).free
        if not everywhere(free >= size + SPARE_BYTES):
            needed = f"{os.strerror(errno.ENOSPC)}, {size >> 20} MB needed"
            raise OSError(errno.ENOSPC, needed, str(self.folder))

    def wait(self) -> None:
        """Blocks until everything saved is on disk."""
        self._manager.wait_until_finished()

    def restore(self, abstract: Any) -> Restored | None:
        """Reads the newest readable checkpoint onto the shardings and dtypes of `abstract`.

        A step that cannot be read (cut off or damaged) is set aside as `damaged_<step>` with a
        warning, and the one before is used.

        Returns:
            The checkpoint, or None if the directory has none.

        Raises:
            CheckpointMismatch: If the checkpoint is sound but belongs to other settings.
            OSError: If there are checkpoints, but none can be read.
        """
        damaged: dict[int, Exception] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            failure = restored = None
            try:
                restored = self._restore_step(step, abstract)
            except NOT_ITS_FAULT:
                raise
            except Exception as error:  # orbax and tensorstore raise many kinds for damaged files
                failure = error
            if everywhere(failure is None):  # each process reads its own part
                self._set_aside(damaged)
                return restored
            damaged[step] = failure or OSError("another process cannot read its part")
        if damaged:
            error = next(iter(damaged.values()))
            raise OSError(
                f"none of the checkpoints {list(damaged)} in {self.folder} can be read (the "
                f"newest: {reason(error)}); bring back a copy, or start in a new directory."
            ) from error
        return None

    def _restore_step(self, step: int, abstract: Any) -> Restored:
        where = self.folder / str(step)
        wanted = vars(abstract)
        check_match(leaf_paths(stored_tree(where)), leaf_paths(wanted), where)
        # The handlers themselves: unlike the manager they do not wait for other processes, which
        # may have found their part damaged.
        arrays = ocp.PyTreeCheckpointHandler().restore(
            where / "state",
            args=ocp.args.PyTreeRestore(
                item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted)
            ),
        )
        check_restored(arrays, where)
        position = _decoded(_stored_position(where / "data"))
        meta = ocp.JsonCheckpointHandler().restore(where / "meta")
        return Restored(dataclasses.replace(abstract, **arrays), position, meta)

    def _set_aside(self, damaged: Mapping[int, Exception]) -> None:
        for step, error in damaged.items():
            if jax.process_index() == 0:
                warnings.warn(
                    f"checkpoint {step} in {self.folder} cannot be read and is set aside as "
                    f"damaged_{step} ({reason(error)}).",
                    stacklevel=3,
                )
                target = self.folder / f"damaged_{step}"
                shutil.rmtree(target, ignore_errors=True)
                (self.folder / str(step)).rename(target)
        if damaged:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("damaged checkpoints set aside")
            self._manager.reload()


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which leaves it to the loop to ask whether all processes should stop."""

    def reached_preemption(self, step: int) -> bool:
        # It would ask about its own step numbers, also from background threads; what the
        # processes agree on would then be a step that they never reach, and they would not stop.
        return False


def checkpoint_folder(workdir: Path) -> Path:
    """Where a training directory keeps its checkpoints."""
    return Path(workdir).absolute() / "checkpoints"


def stored_tree(where: Path) -> dict[str, Any]:
    """The shapes and dtypes that `<step>/state` holds, as a nested dict, without reading arrays."""
    return ocp.PyTreeCheckpointHandler().metadata(where / "state").tree


def _encoded(position: Any) -> dict[str, Any]:
    is_bytes = isinstance(position, bytes)
    return {"bytes": position.decode("latin-1")} if is_bytes else {"json": position}


def _decoded(stored: Mapping[str, Any]) -> Any:
    return stored["bytes"].encode("latin-1") if "bytes" in stored else stored["json"]


def _stored_position(folder: Path) -> dict[str, Any]:
    # Earlier versions wrote one file per process; what they hold is the same in all of them.
    for path in folder.glob("process_0-of-*.json"):
        return json.loads(path.read_text())
    return ocp.JsonCheckpointHandler().restore(folder)


def library_versions() -> dict[str, str]:
    """Package name -> installed version, stored beside every checkpoint."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


# What is stored against what is asked for: Orbax hands back a placeholder for a leaf that it does
# not find, without an error, so names and shapes are compared before every restore.


def check_match(stored: Mapping[str, Any], wanted: Mapping[str, Any], where: Path) -> None:
    """Raises CheckpointMismatch unless both have the same paths and shapes.

    Args:
        stored: Path -> shaped leaf, in the checkpoint.
        wanted: Path -> shaped leaf, in this run.
        where: The checkpoint, for the message.
    """
    missing = sorted(set(wanted) - set(stored), key=_parameters_first)
    extra = sorted(set(stored) - set(wanted), key=_parameters_first)
    if missing or extra:
        sides = [
            f"{label} {', '.join(names[:SHOWN])}"
            + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
            for label, names in (
                ("this configuration needs, but the checkpoint lacks:", missing),
                ("the checkpoint holds, but this configuration lacks:", extra),
            )
            if names
        ]
        raise CheckpointMismatch(
            f"{where} does not fit: {'; '.join(sides)}. Use the model and training settings it was "
            "made with, or another directory."
        )
    for name in sorted(wanted, key=_parameters_first):
        shapes = tuple(stored[name].shape), tuple(wanted[name].shape)
        if shapes[0] != shapes[1]:
            raise CheckpointMismatch(
                f"{name} has shape {shapes[0]} in {where}, but {shapes[1]} in this configuration; "
                "use the model settings it was made with, or another directory."
            )


def check_restored(restored: Any, where: Path) -> None:
    """Raises CheckpointMismatch if a leaf came back as a placeholder instead of an array."""
    absent = [
        name for name, leaf in leaf_paths(restored).items() if not isinstance(leaf, jax.Array)
    ]
    if absent:
        raise CheckpointMismatch(f"{where} holds no array for {', '.join(absent[:SHOWN])}.")


def leaf_paths(tree: Any) -> dict[str, Any]:
    """Leaves by path, e.g. "params/block/kernel"; the same for dicts, dataclasses and tuples."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(_part(key) for key in path): leaf for path, leaf in leaves}


def _parameters_first(name: str) -> tuple[bool, str]:
    return (not name.startswith("params/"), name)


def _part(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


# Errors that come while a sound checkpoint is read.
NOT_ITS_FAULT = (CheckpointMismatch, jax.errors.JaxRuntimeError, MemoryError)


@contextmanager
def explained(where: Path) -> Iterator[None]:
    """Inside the block, whatever is wrong with the checkpoint at `where` becomes one sentence.

    Raises:
        OSError: If it is damaged: orbax and tensorstore raise many kinds, few of which name it.
    """
    try:
        yield
    except NOT_ITS_FAULT:
        raise
    except Exception as error:
        raise OSError(
            f"the checkpoint {where} cannot be read ({reason(error)}); bring back a copy, or move "
            "it away: then the one before it is used."
        ) from error


def reason(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
