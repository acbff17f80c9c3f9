"""Reading parameters one by one, and stacked ones block by block, as NumPy arrays."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from mvjax.checkpoints.bridge import step_folder
from mvjax.checkpoints.store import stored_tree
from mvjax.checkpoints.tree_match import leaf_paths
from mvjax.models.param_tree import Params


class ParameterReader:
    """The parameters of a training directory; moving averages where they are stored.

    `bridge.restore_params` reads whole trees onto devices; this reads what does not fit at once.

    Attributes:
        tree: nested dict of what is stored: shapes and dtypes.
    """

    def __init__(self, directory: Path, *, step: int | None = None):
        """Opens the newest checkpoint, or that of `step`."""
        where = step_folder(directory, step)
        self._state = (where / "state").absolute()
        stored = stored_tree(where)
        self.tree: Params = stored["params"]
        self._averaged = leaf_paths(stored.get("ema", {}))
        self._array = lru_cache(maxsize=4)(self._open)  # a kernel and its adapters

    def read(self, path: str, block: int | None = None) -> np.ndarray:
        """The parameter at a path such as "blocks/mlp/layer1/kernel", or one block of it."""
        array = self._array(path)
        return (array if block is None else array[block]).read().result()

    def _open(self, path: str) -> ts.TensorStore:
        item = "ema" if path in self._averaged else "params"
        return _open(self._state, ".".join([item, *path.split("/")]))


def _open(state: Path, name: str) -> ts.TensorStore:
    """The Zarr array in which Orbax keeps a leaf: a folder of its own, or a part of an OCDBT."""
    kvstore: dict[str, Any] = {"driver": "file", "path": f"{state}/{name}/"}
    if not (state / name).is_dir():
        base = {"driver": "file", "path": f"{state}/"}
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    array = ts.open({"driver": "zarr", "kvstore": kvstore}, read=True).result()
    chunk = array.chunk_layout.read_chunk.shape
    if not chunk or chunk[0] == 1:
        return array
    # A chunk holds several blocks: keep it between reads instead of decoding it for each.
    size = int(np.prod(chunk)) * array.dtype.numpy_dtype.itemsize
    context = ts.Context({"cache_pool": {"total_bytes_limit": size + (1 << 20)}})
    return ts.open({"driver": "zarr", "kvstore": kvstore}, read=True, context=context).result()
