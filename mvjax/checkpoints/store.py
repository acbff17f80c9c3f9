"""Saving and restoring a run: arrays, the loader's position, and what the run is.

A checkpoint is `<workdir>/checkpoints/<step>/` with three items: `state` (the arrays as a plain
nested dict), `data` (one loader position per process) and `meta` (JSON: configuration, versions,
data fingerprint, whatever the caller adds). This file and `bridge.py` alone import orbax.
"""

import dataclasses
import errno
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from mvjax.checkpoints.tree_match import (
    CheckpointMismatch,
    check_match,
    check_restored,
    leaf_paths,
)

SPARE_BYTES = 8 << 20  # metadata and the loader's position, beside the arrays


def checkpoint_folder(workdir: Path) -> Path:
    """Where a training directory keeps its checkpoints."""
    return Path(workdir).absolute() / "checkpoints"


@dataclass(frozen=True)
class Restored:
    """A checkpoint read back: the state on its target shardings, loader position and meta."""

    state: Any
    position: Any
    meta: dict[str, Any]


class Store:
    """The checkpoints of one training directory. Close it (or use `with`) to finish writing."""

    def __init__(self, workdir: Path, *, keep: int):
        """Opens the directory, clearing away half-written checkpoints.

        Args:
            workdir: The training directory.
            keep: How many of the newest checkpoints stay.
        """
        self.folder = checkpoint_folder(workdir)
        options = checkpoint_managers.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.LatestN(keep),
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, position: Any, meta: Mapping[str, Any]) -> None:
        """Starts writing a checkpoint; returns once the arrays are copied off the devices.

        Args:
            step: Number of steps made.
            state: The train state; may be donated as soon as this returns.
            position: The loader's `get_state()` after the batch of this step (a JSON-able value
                or bytes).
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
                data=grain.checkpoint.CheckpointSave(_Position(position)),
                meta=ocp.args.JsonSave(dict(meta)),
            ),
        )

    def _check_room(self, size: int) -> None:
        # Orbax writes in background threads, whose errors are many and late.
        free = shutil.disk_usage(self.folder).free
        if free < size + SPARE_BYTES and jax.process_count() == 1:
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
            try:
                restored = self._restore_step(step, abstract)
            except (CheckpointMismatch, jax.errors.JaxRuntimeError, MemoryError):
                raise  # the checkpoint is not at fault
            except Exception as error:  # orbax and tensorstore raise many kinds for damaged files
                damaged[step] = error
                continue
            self._set_aside(damaged)
            return restored
        if damaged:
            error = next(iter(damaged.values()))
            raise OSError(
                f"none of the checkpoints {list(damaged)} in {self.folder} can be read (the "
                f"newest: {_reason(error)}); bring back a copy, or start in a new directory."
            ) from error
        return None

    def _restore_step(self, step: int, abstract: Any) -> Restored:
        where = self.folder / str(step)
        wanted = vars(abstract)
        check_match(leaf_paths(stored_tree(where)), leaf_paths(wanted), where)
        position = _Position(None)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    item=wanted,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                ),
                data=_position_args(where, position),
                meta=ocp.args.JsonRestore(),
            ),
        )
        check_restored(restored.state, where)
        state = dataclasses.replace(abstract, **restored.state)
        return Restored(state, position.state, restored.meta)

    def _set_aside(self, damaged: Mapping[int, Exception]) -> None:
        for step, error in damaged.items():
            warnings.warn(
                f"checkpoint {step} in {self.folder} cannot be read and is set aside as "
                f"damaged_{step} ({_reason(error)}).",
                stacklevel=3,
            )
            if jax.process_index() == 0:
                target = self.folder / f"damaged_{step}"
                shutil.rmtree(target, ignore_errors=True)
                (self.folder / str(step)).rename(target)
        if damaged:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("damaged checkpoints set aside")
            self._manager.reload()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def stored_tree(where: Path) -> dict[str, Any]:
    """The shapes and dtypes that `<step>/state` holds, as a nested dict, without reading arrays."""
    return ocp.PyTreeCheckpointHandler().metadata(where / "state").tree


class _Position:
    """A loader position in the shape Grain's checkpoint handler writes: one file per process."""

    def __init__(self, state: Any):
        self.state = state

    def get_state(self) -> bytes:
        is_bytes = isinstance(self.state, bytes)
        value = self.state.decode("latin-1") if is_bytes else self.state
        return json.dumps({"bytes" if is_bytes else "json": value}).encode()

    def set_state(self, encoded: bytes) -> None:
        stored = json.loads(encoded)
        self.state = stored["bytes"].encode("latin-1") if "bytes" in stored else stored["json"]

    def start_prefetch(self) -> None:
        """Part of the handler's protocol; the loader itself decides when to read ahead."""


def _position_args(where: Path, position: _Position) -> grain.checkpoint.CheckpointRestore:
    files = sorted(path.name for path in (where / "data").glob("process_*-of-*.json"))
    name = f"process_{jax.process_index()}-of-{jax.process_count()}.json"
    if files and name not in files:
        raise CheckpointMismatch(
            f"{where} was saved by {len(files)} processes, but this run has {jax.process_count()}; "
            "continue with as many, or start a new run with config.init_from."
        )
    return grain.checkpoint.CheckpointRestore(position)
