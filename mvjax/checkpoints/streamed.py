"""Writing a checkpoint whose arrays are never in memory together.

The arrays of a converted model are made piece by piece, one block's tensor at a time, and each
piece becomes a chunk of an uncompressed Zarr array: a model larger than the memory is written at
the disk's speed, and a reader that wants some blocks reads only those. The result is an ordinary
checkpoint, read by `bridge.restore_params` onto any mesh.
"""

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from mvjax.checkpoints.store import SPARE_BYTES, checkpoint_folder
from mvjax.models.param_tree import Params

STEP = 0  # a converted checkpoint has made no steps


@dataclass(frozen=True)
class StreamedArray:
    """An array that is made when it is written.

    Attributes:
        shape: of the whole array.
        dtype: of every piece.
        pieces: called one after the other. Each returns a slice [shape[1:]] of a stacked array;
            an array that is not stacked has a single piece, the whole.
        stacked: whether the pieces lie on a leading axis.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[Callable[[], np.ndarray], ...]
    stacked: bool

    @property
    def nbytes(self) -> int:
        """Size of the whole array."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


class _StreamHandler(ocp.type_handlers.NumpyHandler):
    """Stores streamed arrays as NumPy arrays are stored, but one piece after the other."""

    def __init__(self, wrote: Callable[[int], None]):
        super().__init__()
        self._wrote = wrote

    async def serialize(self, values, infos, args=None):
        for value, info in zip(values, infos):
            await info.await_path_creation()
            store = await ts.open(_zarr(info.parent_dir / info.name, value), create=True)
            await self._write(store, value)
        return []

    async def _write(self, store: ts.TensorStore, value: StreamedArray) -> None:
        writing = None
        try:
            for i, piece in enumerate(value.pieces):
                array = piece()  # while the one before is being written
                if writing is not None:
                    await writing
                writing = (store[i] if value.stacked else store).write(array)
                self._wrote(array.nbytes)
        finally:  # a write that goes on would bring back a folder that is taken away
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


def write_streamed(
    directory: Path,
    params: Params,
    meta: Mapping[str, Any],
    wrote: Callable[[int], None] = lambda size: None,
) -> None:
    """Writes a checkpoint of streamed parameters; all of it or nothing.

    Args:
        directory: the training directory to make; it must not exist, or be empty.
        params: nested dict of `StreamedArray`.
        meta: what the checkpoint is; JSON.
        wrote: called with the number of bytes after every piece.

    Raises:
        FileExistsError: if the directory holds something.
        OSError: if the disk has no room (ENOSPC), before anything is written or while.
    """
    directory = Path(directory).absolute()
    with _new_folder(directory):
        free, size = shutil.disk_usage(directory).free, sum(a.nbytes for a in _leaves(params))
        if free < size + SPARE_BYTES:
            needed = f"{os.strerror(errno.ENOSPC)}, {size >> 20} MB needed, {free >> 20} MB free"
            raise OSError(errno.ENOSPC, needed, str(directory))
        with _without_orbax_remarks(), _manager(checkpoint_folder(directory), wrote) as manager:
            manager.save(
                STEP,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave({"params": params}),
                    meta=ocp.args.JsonSave(dict(meta)),
                ),
            )


def _manager(folder: Path, wrote: Callable[[int], None]) -> ocp.CheckpointManager:
    registry = ocp.type_handlers.create_type_handler_registry(
        (StreamedArray, _StreamHandler(wrote))
    )
    state = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
    return ocp.CheckpointManager(
        folder,
        item_handlers={"state": state, "meta": ocp.JsonCheckpointHandler()},
        options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False),
    )


def _leaves(params: Params) -> Iterator[StreamedArray]:
    for value in params.values():
        yield from _leaves(value) if isinstance(value, dict) else (value,)


@contextmanager
def _new_folder(directory: Path) -> Iterator[None]:
    """Makes a folder, and takes away again what it made if what follows fails."""
    folder = checkpoint_folder(directory)
    for killed in folder.glob("*.orbax-checkpoint-tmp*"):  # what a killed conversion left
        shutil.rmtree(killed)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} holds something already; choose a new directory.")
    made = [p for p in (folder, directory, *directory.parents) if not p.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(made[-1], ignore_errors=True)
        raise


@contextmanager
def _without_orbax_remarks() -> Iterator[None]:
    """Orbax warns that handlers for devices and for OCDBT are absent, which is intended here."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
