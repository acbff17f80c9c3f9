"""Prefetches batches to the devices without losing track of the loader's position."""

import copy
import math
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mvjax.training.objectives import Batch


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """The samples of a global batch that this process's devices hold, in ascending order.

    Processes that only share the work on the same samples (because the context or tensor axis
    spans them) get the same rows, so each reads what its devices need and nothing else.

    Args:
        sharding: Of an array whose first dimension is the samples.
        batch_size: Samples in the batch of all processes together, of `Experiment.check_batch`.
    """
    parts = np.arange(batch_size).reshape(_ways(sharding), -1)
    return parts[_local_parts(sharding)].ravel()


def device_batches(
    loader: Any, shardings: Mapping[str, NamedSharding], ahead: int = 2
) -> Iterator[tuple[Batch, Any]]:
    """Yields (global sharded batch, loader position after it), keeping `ahead` batches in transfer.

    The loader is always some batches further than the steps made, so each batch carries the
    position that belongs to it; that is what a checkpoint must store.

    Args:
        loader: A Grain iterator over the `local_rows` of each batch (dict of numpy arrays, whole
            in every dimension but the first), with `get_state()`.
        shardings: The entries to send, and how they are split.
        ahead: Batches in transfer beyond the one yielded.
    """
    queue: deque[tuple[Batch, Any]] = deque()
    for local in loader:
        position = copy.deepcopy(loader.get_state())
        queue.append((_to_devices(local, shardings), position))
        if len(queue) > ahead:
            yield queue.popleft()
    yield from queue


def _to_devices(local: Mapping[str, Any], shardings: Mapping[str, NamedSharding]) -> Batch:
    missing = set(shardings) - set(local)
    if missing:
        raise ValueError(
            f"the loader gives the batch entries {sorted(local)}, but the stage also needs "
            f"{sorted(missing)}."
        )
    return {name: _to_global(np.asarray(local[name]), s) for name, s in shardings.items()}


def _to_global(local: np.ndarray, sharding: NamedSharding) -> jax.Array:
    parts = _local_parts(sharding)
    samples, rest = divmod(len(local), len(parts))
    if rest:
        raise ValueError(
            f"{len(local)} samples per process cannot be split over {len(parts)} devices; make "
            "training.batch_size a multiple of the mesh axes of the batch."
        )

    def on_device(index: tuple[slice, ...]) -> np.ndarray:
        # The parts of a process need not be neighbours in the global batch.
        part = (index[0].start or 0) // samples
        first = samples * int(np.searchsorted(parts, part))
        return local[first : first + samples][(slice(None), *index[1:])]

    shape = (samples * _ways(sharding), *local.shape[1:])
    return jax.make_array_from_callback(shape, sharding, on_device)


def _axes(sharding: NamedSharding) -> tuple[str, ...]:
    """Mesh axes over which the first dimension is split."""
    entry = sharding.spec[0] if len(sharding.spec) else None
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _ways(sharding: NamedSharding) -> int:
    return math.prod(sharding.mesh.shape[axis] for axis in _axes(sharding))


def _local_parts(sharding: NamedSharding) -> list[int]:
    """Which of the equal parts of the first dimension this process's devices hold, ascending."""
    by_samples = NamedSharding(sharding.mesh, PartitionSpec(_axes(sharding)))
    indices = by_samples.addressable_devices_indices_map((_ways(sharding),)).values()
    return sorted({index[0].start or 0 for index in indices})
