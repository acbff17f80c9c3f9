"""Saving and restoring a run: arrays, the loader's position, and what the run is.

A checkpoint is `<workdir>/checkpoints/<step>/` with three items: `state` (the arrays as a plain
nested dict), `data` (JSON: the loader's position, the same in all processes) and `meta` (JSON:
configuration, versions, data fingerprint, whatever the caller adds). Only this file and `bridge.py`
import orbax.
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
from pathlib import Path
from typing import Any, NamedTuple

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


# Errors that do not mean that a checkpoint is damaged.
_NOT_DAMAGE = (CheckpointMismatch, jax.errors.JaxRuntimeError, MemoryError)


class Restored(NamedTuple):
    """A checkpoint read back: the state on its target shardings, loader position and meta."""

    state: Any
    position: Any
    meta: dict[str, Any]


class Store:
    """The checkpoints of one training directory. Close it (or use `with`) to finish writing."""

    def __init__(self, workdir: Path, *, keep: int, keep_every: int = 0):
        """Opens the directory and removes half-written checkpoints.

        Args:
            workdir: The training directory.
            keep: How many of the newest checkpoints stay.
            keep_every: Checkpoints of multiples of this step stay as well; 0 for none.
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
        """The description of the run stored at a step; None if that cannot be read."""
        try:
            found = ocp.JsonCheckpointHandler().restore(self.folder / str(step) / "meta")
        except Exception:  # `restore` reports what is wrong, and goes back a step
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
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        # Orbax writes in background threads, whose errors are many and come late.
        if not everywhere(shutil.disk_usage(self.folder).free >= size + SPARE_BYTES):
            needed = f"{os.strerror(errno.ENOSPC)}, {size >> 20} MB needed"
            raise OSError(errno.ENOSPC, needed, str(self.folder))
        is_bytes = isinstance(position, bytes)
        stored = {"bytes": position.decode("latin-1")} if is_bytes else {"json": position}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(arrays),
                data=ocp.args.JsonSave(stored),
                meta=ocp.args.JsonSave(dict(meta)),
            ),
        )

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
            except _NOT_DAMAGE:
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
                f"newest: {_one_line(error)}); bring back a copy, or start in a new directory."
            ) from error
        return None

    def _restore_step(self, step: int, abstract: Any) -> Restored:
        where, wanted = self.folder / str(step), vars(abstract)
        check_match(leaf_paths(stored_tree(where)), leaf_paths(wanted), where)
        arrays = read_arrays(where, wanted)
        data = where / "data"
        # Earlier versions wrote one file per process, all with the same content.
        if earlier := next(data.glob("process_0-of-*.json"), None):
            stored = json.loads(earlier.read_text())
        else:
            stored = ocp.JsonCheckpointHandler().restore(data)
        position = stored["bytes"].encode("latin-1") if "bytes" in stored else stored["json"]
        meta = ocp.JsonCheckpointHandler().restore(where / "meta")
        return Restored(dataclasses.replace(abstract, **arrays), position, meta)

    def _set_aside(self, damaged: Mapping[int, Exception]) -> None:
        for step, error in damaged.items():
            if jax.process_index() == 0:
                warnings.warn(
                    f"checkpoint {step} in {self.folder} cannot be read and is set aside as "
                    f"damaged_{step} ({_one_line(error)}).",
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
        # Orbax would ask about its own step numbers, also from background threads; what the
        # processes agree on would then be a step that they never reach, and they would not stop.
        return False


def checkpoint_folder(workdir: Path) -> Path:
    """Where a training directory keeps its checkpoints."""
    return Path(workdir).absolute() / "checkpoints"


def library_versions() -> dict[str, str]:
    """Package name -> installed version, stored beside every checkpoint."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


# --- Reading arrays: what is stored against what is asked for ---


def stored_tree(where: Path) -> dict[str, Any]:
    """Shapes and dtypes in `<step>/state`, as a nested dict; no array is read."""
    return ocp.PyTreeCheckpointHandler().metadata(where / "state").tree


def read_arrays(where: Path, wanted: Any, partial: bool = False) -> Any:
    """Reads `<step>/state` onto shapes, dtypes and shardings; each device reads only its part.

    Args:
        where: The checkpoint, `<step>`.
        wanted: Tree of `jax.ShapeDtypeStruct` with shardings.
        partial: The checkpoint may hold more than what is wanted.

    Raises:
        CheckpointMismatch: If it lacks a leaf.
    """
    # The handler itself: unlike Orbax's manager it does not wait for other processes, which may
    # have found their part damaged.
    restored = ocp.PyTreeCheckpointHandler().restore(
        where / "state",
        args=ocp.args.PyTreeRestore(
            item=wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=partial,
        ),
    )
    # For a leaf that it does not find, Orbax returns a placeholder and no error.
    absent = [
        name for name, leaf in leaf_paths(restored).items() if not isinstance(leaf, jax.Array)
    ]
    if absent:
        raise CheckpointMismatch(f"{where} holds no array for {', '.join(absent[:SHOWN])}.")
    return restored


def check_match(stored: Mapping[str, Any], wanted: Mapping[str, Any], where: Path) -> None:
    """Raises CheckpointMismatch unless both have the same paths and shapes.

    Args:
        stored, wanted: Path -> shaped leaf, in the checkpoint and in this run.
        where: The checkpoint, for the message.
    """

    def parameters_first(name: str) -> tuple[bool, str]:
        return (not name.startswith("params/"), name)

    missing = sorted(set(wanted) - set(stored), key=parameters_first)
    extra = sorted(set(stored) - set(wanted), key=parameters_first)
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
    for name in sorted(wanted, key=parameters_first):
        shapes = tuple(stored[name].shape), tuple(wanted[name].shape)
        if shapes[0] != shapes[1]:
            raise CheckpointMismatch(
                f"{name} has shape {shapes[0]} in {where}, but {shapes[1]} in this configuration; "
                "use the model settings it was made with, or another directory."
            )


def leaf_paths(tree: Any) -> dict[str, Any]:
    """Leaves by path, e.g. "params/block/kernel"; the same for dicts, dataclasses and tuples."""

    def part(key: Any) -> str:
        for attribute in ("key", "name", "idx"):
            if hasattr(key, attribute):
                return str(getattr(key, attribute))
        return str(key)

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(part(key) for key in path): leaf for path, leaf in leaves}


@contextmanager
def damage_reported(where: Path) -> Iterator[None]:
    """Turns whatever a damaged checkpoint at `where` raises inside the block into one OSError.

    Orbax and tensorstore raise many kinds of errors, few of which name the checkpoint.
    """
    try:
        yield
    except _NOT_DAMAGE:
        raise
    except Exception as error:
        raise OSError(
            f"the checkpoint {where} cannot be read ({_one_line(error)}); bring back a copy, or "
            "move it away: then the one before it is used."
        ) from error


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
