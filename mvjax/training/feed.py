"""Bringing batches to the devices ahead of time, without losing track of the loader's position."""

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from mvjax.training.stage import Batch


def device_batches(
    loader: Any, shardings: Mapping[str, NamedSharding], ahead: int = 2
) -> Iterator[tuple[Batch, Any]]:
    """Yields (global sharded batch, loader position after it), keeping `ahead` batches in transfer.

    The loader is always some batches further than the steps made, so each batch carries the
    position that belongs to it; that is what a checkpoint must store.

    Args:
        loader: A Grain iterator over this process's part of each batch (dict of numpy arrays),
            with `get_state()`.
        shardings: Which entries to send, and how they are split.
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
    batch = {}
    for name, sharding in shardings.items():
        if name not in local:
            raise ValueError(
                f"the loader gives the batch entries {sorted(local)}, but the stage needs {name!r}."
            )
        try:
            batch[name] = jax.make_array_from_process_local_data(sharding, np.asarray(local[name]))
        except ValueError as error:
            raise ValueError(
                f"batch entry {name!r} of shape {np.shape(local[name])} per process cannot be "
                f"split as {sharding.spec} over the mesh {dict(sharding.mesh.shape)}; make "
                "training.batch_size a multiple of the mesh axes of the batch."
            ) from error
    return batch
