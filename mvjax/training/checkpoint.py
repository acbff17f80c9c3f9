"""Saving and restoring a run: arrays, the loader's position, and what the run is.

A checkpoint is `<workdir>/checkpoints/<step>/` with three items: `state` (the arrays as a plain
nested dict), `data` (JSON: the loader's position, the same in all processes) and `meta` (JSON:
configuration, versions, data fingerprint, whatever the caller adds). Only this file and `bridge.py`
import orbax.
"""

import dataclasses
import errno
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from mvjax.identity import digest, package_versions
from mvjax.parallel import everywhere
from mvjax.training.damage import (
    CheckpointDamaged,
    CheckpointMismatch,
    is_damage,
    one_line,
    patiently,
    system_errors,
    unreadable,
)

log = logging.getLogger(__name__)
T = TypeVar("T")

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
SPARE_BYTES = 8 << 20  # metadata and the loader's position, beside the arrays
SHOWN = 5  # names listed per message


class Restored(NamedTuple):
    """A checkpoint read back: the state on its target shardings, loader position and meta."""

    state: Any
    position: Any
    meta: dict[str, Any]


Arrays = Mapping[str, Any]

# (a checkpoint's folder, its leaves by path, the items of the abstract state) -> (the items that
# are read, and how those of the state are made from them). Raises CheckpointMismatch.
Adapt = Callable[[Path, Arrays, Arrays], tuple[Arrays, Callable[[Arrays], Arrays]]]


def as_stored(
    where: Path, stored: Arrays, abstract: Arrays
) -> tuple[Arrays, Callable[[Arrays], Arrays]]:
    """Adapts nothing: the checkpoint must have exactly the leaves of the abstract state."""
    check_match(stored, leaf_paths(abstract), where)
    return abstract, lambda arrays: arrays


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
        self.failing = False  # whether the checkpoint before the newest could not be written

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def meta(self, step: int) -> dict[str, Any] | None:
        """The description of the run stored at a step; None if that is damaged."""
        # `restore` reports what is damaged, and goes back a step.
        return self._attempt(step, lambda where: read_json(where / "meta"))[0]

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
        self._wait_for_the_one_before(step)
        arrays = vars(state)
        meta = {**meta, "digests": {n: digest(leaf_paths(tree)) for n, tree in arrays.items()}}
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        # Orbax writes in background threads, whose errors are many and come late.
        if not everywhere(shutil.disk_usage(self.folder).free >= size + SPARE_BYTES):
            needed = f"{os.strerror(errno.ENOSPC)}, {size >> 20} MB needed"
            raise OSError(errno.ENOSPC, needed, str(self.folder))
        is_bytes = isinstance(position, bytes)
        stored = {"bytes": position.decode("latin-1")} if is_bytes else {"json": position}
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(arrays),
            data=ocp.args.JsonSave(stored),
            meta=ocp.args.JsonSave(meta),
        )
        with system_errors():
            self._manager.save(step, args=items)

    def finish(self) -> None:
        """Waits until what is being written is on the disk; raises what has failed."""
        with system_errors():
            self._manager.wait_until_finished()

    def _wait_for_the_one_before(self, step: int) -> None:
        try:
            self.finish()
            self.failing = False
        except OSError as error:
            # Of several processes, the others may have written their part.
            if jax.process_count() > 1 or self.failing:
                raise
            self.failing = True
            for part in self.folder.glob("*.orbax-checkpoint-tmp"):  # it takes room from this one
                shutil.rmtree(part, ignore_errors=True)
            log.warning(
                f"the previous checkpoint could not be written ({one_line(error)}); step {step} "
                "is saved in its place."
            )

    def restore(self, abstract: Any, adapt: Adapt = as_stored) -> Restored | None:
        """Reads the newest sound checkpoint onto the shardings and dtypes of `abstract`.

        A step that is proven to be damaged (cut off, or other bytes than were saved) is set aside
        as `damaged_<step>` with a warning, and the one before is used. Whatever else keeps it from
        being read, such as the network, permissions or memory, is an error that changes nothing.

        Args:
            abstract: The state as shapes.
            adapt: For a state whose layout may be another one than the checkpoint's.

        Returns:
            The checkpoint, or None if the directory has none.

        Raises:
            CheckpointMismatch: If the checkpoint is sound but belongs to other settings.
            OSError: If there are checkpoints, but none can be read.
        """
        damaged: dict[int, Exception] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            read, failure = self._attempt(step, lambda where: _read(where, vars(abstract), adapt))
            if read is not None:
                failure = _other_arrays(read)  # all processes together
            if read is not None and failure is None:
                self._set_aside(damaged)
                state = dataclasses.replace(abstract, **read.complete(read.arrays))
                return Restored(state, read.position, read.meta)
            damaged[step] = failure
        if damaged:
            error = next(iter(damaged.values()))
            raise OSError(
                f"none of the checkpoints {list(damaged)} in {self.folder} can be read (the "
                f"newest: {one_line(error)}); restore a copy, or start in a new directory."
            ) from error
        return None

    def _attempt(
        self, step: int, read: Callable[[Path], T]
    ) -> tuple[T, None] | tuple[None, Exception]:
        """Reads in every process its own part: what was read, or the damage that one has found."""
        where, found, failure = self.folder / str(step), None, None
        try:
            found = read(where)
        except Exception as error:
            failure = error
        if not everywhere(failure is None or is_damage(failure)):
            if failure is None or is_damage(failure):
                raise OSError(f"another process cannot read its part of {where}.")
            raise unreadable(where, failure) from failure
        if everywhere(failure is None):
            return found, None
        return None, failure or OSError("another process has found damage in its part")

    def _set_aside(self, damaged: Mapping[int, Exception]) -> None:
        for step, error in damaged.items():
            if jax.process_index() == 0:
                warnings.warn(
                    f"checkpoint {step} in {self.folder} cannot be read and is set aside as "
                    f"damaged_{step} ({one_line(error)}).",
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
    return {name: version for name, version in package_versions(PACKAGES).items() if version}


# --- Reading arrays: what is stored against what is asked for ---


def stored_tree(where: Path) -> dict[str, Any]:
    """Shapes and dtypes in `<step>/state`, as a nested dict; no array is read."""
    return patiently(lambda: ocp.PyTreeCheckpointHandler().metadata(where / "state").tree)


def read_json(item: Path) -> Any:
    """The JSON of an item such as `<step>/meta`."""
    # Not a Checkpointer: it asks for devices, and processes may not have met yet.
    return patiently(lambda: ocp.JsonCheckpointHandler().restore(item))


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
    restored = patiently(
        lambda: ocp.PyTreeCheckpointHandler().restore(
            where / "state",
            args=ocp.args.PyTreeRestore(
                item=wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=partial,
            ),
        )
    )
    # For a leaf that it does not find, Orbax returns a placeholder and no error.
    absent = [
        name for name, leaf in leaf_paths(restored).items() if not isinstance(leaf, jax.Array)
    ]
    if absent:
        raise CheckpointMismatch(f"{where} holds no array for {', '.join(absent[:SHOWN])}.")
    return restored


class _Read(NamedTuple):
    """What was read of a checkpoint, and how it becomes a state."""

    arrays: Arrays
    complete: Callable[[Arrays], Arrays]
    position: Any
    meta: dict[str, Any]
    digests: dict[str, str]  # of those items that were read as they were saved


def _read(where: Path, abstract: Arrays, adapt: Adapt) -> _Read:
    stored = leaf_paths(stored_tree(where))
    asked, complete = adapt(where, stored, abstract)
    arrays = read_arrays(where, asked, partial=leaf_paths(asked).keys() != stored.keys())
    data = where / "data"
    # Earlier versions wrote one file per process, all with the same content.
    if earlier := next(data.glob("process_0-of-*.json"), None):
        position = patiently(lambda: json.loads(earlier.read_text()))
    else:
        position = read_json(data)
    if not isinstance(position, dict) or not {"bytes", "json"} & set(position):
        raise CheckpointDamaged(f"{data} holds no position of a loader")
    text = position.get("bytes")
    position = position["json"] if text is None else text.encode("latin-1")
    meta = read_json(where / "meta")
    # What is asked for in another dtype, or in part, has another digest than what was saved.
    dtypes = {name: leaf.dtype for name, leaf in leaf_paths(asked).items()}
    other = {n.partition("/")[0] for n, leaf in stored.items() if dtypes.get(n) != leaf.dtype}
    digests = {name: text for name, text in meta.get("digests", {}).items() if name not in other}
    return _Read(arrays, complete, position, meta, digests)


def _other_arrays(read: _Read) -> CheckpointDamaged | None:
    """Whether arrays are not those that were saved: their files have no checksums of their own."""
    for name, saved in read.digests.items():
        found = digest(leaf_paths(read.arrays.get(name, {})))
        if found != saved:
            return CheckpointDamaged(f"{name} has the digest {found}, but {saved} was saved")
    return None


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
