"""Reading and writing checkpoints of this project without holding a whole model in memory.

The arrays of a converted model are computed one block's tensor at a time, and each becomes a chunk
of an uncompressed Zarr array. So a model larger than the memory is written at the disk's speed, and
a reader of some blocks reads only those. The result is an ordinary checkpoint.
"""

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from data_pipelines.atomic import write_json
from data_pipelines.lock import LOCK, run_lock
from mvjax.identity import digest_of_sums, piece_sums
from mvjax.models.network import Params
from mvjax.training.checkpoint import SPARE_BYTES, checkpoint_folder, leaf_paths
from mvjax.training.directory import step_folder, stored_params


@dataclass(frozen=True)
class StreamedArray:
    """An array that is computed when it is written: whole, or in slices of a leading axis."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[Callable[[], np.ndarray], ...]  # a single one if not stacked; [shape[1:]] if so
    stacked: bool

    @property
    def nbytes(self) -> int:
        """Size of the whole array in bytes."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


class _StreamHandler(ocp.type_handlers.NumpyHandler):
    """Stores streamed arrays as Orbax stores NumPy arrays, but one piece after the other."""

    def __init__(self, wrote: Callable[[int], None]):
        super().__init__()
        self._wrote = wrote
        self.sums: dict[int, np.ndarray] = {}  # id of an array -> its `piece_sums`

    async def serialize(self, values, infos, args=None):
        for value, info in zip(values, infos):
            await info.await_path_creation()
            store = await ts.open(_zarr(info.parent_dir / info.name, value), create=True)
            await self._write(store, value)
        return []

    async def _write(self, store: ts.TensorStore, value: StreamedArray) -> None:
        writing, sums = None, np.zeros(2, np.uint32)
        try:
            for i, piece in enumerate(value.pieces):
                array = piece()  # while the previous one is being written
                sums += piece_sums(array, i * array.size)
                if writing is not None:
                    await writing
                writing = (store[i] if value.stacked else store).write(array)
                self._wrote(array.nbytes)
            self.sums[id(value)] = sums
        finally:  # a write still in progress would recreate a folder that is removed on failure
            if writing is not None:
                await writing


def _zarr(path: Any, value: StreamedArray) -> dict[str, Any]:
    chunks = [1, *value.shape[1:]] if value.stacked else list(value.shape)
    return {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(path)},
        "metadata": {
            "shape": list(value.shape),
            "chunks": [max(size, 1) for size in chunks],
            "dtype": ts.dtype(value.dtype).name if value.dtype.kind == "V" else value.dtype.str,
            "compressor": None,
        },
    }


@contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Silences Orbax's warning that handlers for devices and OCDBT are absent, as intended."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@_quiet_orbax()
def write_streamed(
    directory: Path,
    params: Params,
    meta: Mapping[str, Any],
    wrote: Callable[[int], None] = lambda size: None,
) -> None:
    """Writes `StreamedArray`s as a new training directory; leaves nothing behind if it fails.

    Args:
        directory: Must not exist, or be empty.
        params: Nested dict of `StreamedArray`.
        meta: Description of the checkpoint; JSON. The digest of the parameters is added.
        wrote: Called with the number of bytes after every piece.

    Raises:
        FileExistsError: The directory is not empty.
        OSError: The disk has not enough room (ENOSPC), checked before anything is written; or
            another process converts into the directory.
    """
    directory = Path(directory).absolute()
    handler, leaves = _StreamHandler(wrote), leaf_paths(params)
    registry = ocp.type_handlers.create_type_handler_registry((StreamedArray, handler))
    state = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
    with _new_folder(directory):
        free = shutil.disk_usage(directory).free
        size = sum(array.nbytes for array in leaves.values())
        if free < size + SPARE_BYTES:
            needed = f"{os.strerror(errno.ENOSPC)}, {size >> 20} MB needed, {free >> 20} MB free"
            raise OSError(errno.ENOSPC, needed, str(directory))
        with ocp.CheckpointManager(
            checkpoint_folder(directory),
            item_handlers={"state": state, "meta": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
        ) as manager:
            manager.save(
                0,  # step: nothing has been trained
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave({"params": params}),
                    meta=ocp.args.JsonSave(dict(meta)),
                ),
            )
        # Known only now: the arrays were computed while they were written.
        digest = digest_of_sums(
            {n: (a.shape, a.dtype, handler.sums[id(a)]) for n, a in leaves.items()}
        )
        path = step_folder(directory, 0) / "meta" / "metadata"
        write_json(path, json.loads(path.read_text()) | {"digest": digest})


@contextmanager
def _new_folder(directory: Path) -> Iterator[None]:
    """Creates a folder and keeps it to this process; removes what it created if the block fails."""
    # Not `atomic.replacing`: the manager finishes a checkpoint by renaming, and must see the folder
    # under its own name.
    folder = checkpoint_folder(directory)
    full = f"{directory} is not empty; choose a new directory."
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(full)
    made = [folder, *(p for p in (directory, *directory.parents) if not p.exists())]
    with run_lock(directory):
        for killed in folder.glob("*.orbax-checkpoint-tmp*"):  # what a killed conversion left
            shutil.rmtree(killed)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        if any(path.name != LOCK for path in directory.iterdir()):
            raise FileExistsError(full)
        try:
            yield
        except BaseException:
            shutil.rmtree(made[-1], ignore_errors=True)
            raise


class ParameterReader:
    """Reads the newest parameters of a training directory one by one, as NumPy arrays.

    It prefers moving averages where they are stored. `directory.restore_params` reads whole trees.

    Attributes:
        tree: Nested dict of the stored shapes and dtypes.
    """

    def __init__(self, directory: Path, part: str = ""):
        """Opens the newest checkpoint; `part` is a network of a joint run, "" all there is."""
        where = step_folder(directory, None)
        self._state, self._part = (where / "state").absolute(), part
        stored = stored_params(where, part)
        self.tree: Params = stored["params"]
        self._averaged = leaf_paths(stored["ema"])
        self._array = lru_cache(maxsize=4)(self._open)  # a kernel and its adapters

    def read(self, path: str, block: int | None = None) -> np.ndarray:
        """Returns the parameter at a path such as "blocks/mlp/layer1/kernel", or one block."""
        array = self._array(path)
        return (array if block is None else array[block]).read().result()

    def _open(self, path: str) -> ts.TensorStore:
        """Opens the Zarr array in which Orbax keeps a leaf: a folder, or a part of an OCDBT."""
        item = "ema" if path in self._averaged else "params"
        name = ".".join([item, *[self._part] * bool(self._part), *path.split("/")])
        kvstore: dict[str, Any] = {"driver": "file", "path": f"{self._state}/{name}/"}
        if not (self._state / name).is_dir():
            base = {"driver": "file", "path": f"{self._state}/"}
            kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        spec = {"driver": "zarr", "kvstore": kvstore}
        array = ts.open(spec, read=True).result()
        chunk = array.chunk_layout.read_chunk.shape
        if not chunk or chunk[0] == 1:
            return array
        # A chunk holds several blocks: keep it between reads instead of decoding it for each.
        size = int(np.prod(chunk)) * array.dtype.numpy_dtype.itemsize
        context = ts.Context({"cache_pool": {"total_bytes_limit": size + (1 << 20)}})
        return ts.open(spec, read=True, context=context).result()
