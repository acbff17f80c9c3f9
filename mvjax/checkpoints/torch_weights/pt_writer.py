"""Writing a file that `torch.load(path, weights_only=True)` opens, without PyTorch."""

import math
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from mvjax.checkpoints.torch_weights.dtypes import TYPE_NAMES
from mvjax.checkpoints.torch_weights.partial_file import replacing
from mvjax.checkpoints.torch_weights.tensors import TorchTensor, WeightsError, raw_bytes

_ALIGNMENT = 64  # bytes; PyTorch's own choice, so that the file can be memory-mapped
_LOCAL_HEADER = 30 + 20  # bytes around an entry's name: the fixed part, and 64-bit sizes
_PADDING = 4  # bytes of the field that pads a header: its kind and length
_FIRST_YEAR = (1980, 1, 1, 0, 0, 0)  # no clock in the file: equal weights give equal bytes


def write_pt(path: Path, tensors: Mapping[str, TorchTensor]) -> None:
    """Writes tensors as `torch.save` writes a dict of them, reading one at a time.

    Every tensor gets its own storage, also where several were views of one.

    Args:
        path: appears when the file is whole; folders on the way are made.
        tensors: by name, in the order they shall have.

    Raises:
        WeightsError: PyTorch lacks a tensor's type, or its values are not what it declares.
        OSError: the disk is full or read-only; nothing is left behind.
    """
    description = _describe(tensors)
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:

        def add(name: str, data: bytes | np.ndarray) -> None:
            entry = zipfile.ZipInfo(f"archive/{name}", _FIRST_YEAR)
            unpadded = file.tell() + _LOCAL_HEADER + len(entry.filename) + _PADDING
            padding = -unpadded % _ALIGNMENT
            entry.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
            with archive.open(entry, "w", force_zip64=True) as destination:
                destination.write(data)

        add("data.pkl", description)
        add("byteorder", b"little")
        for key, (name, tensor) in enumerate(tensors.items()):
            add(f"data/{key}", raw_bytes(name, tensor))
        add("version", b"3\n")


def _describe(tensors: Mapping[str, TorchTensor]) -> bytes:
    """The pickle: a dict of calls that rebuild tensors from storages.

    Written opcode by opcode, because Python's pickler would have to import the functions it names.
    """
    entries = []
    for key, (name, tensor) in enumerate(tensors.items()):
        if tensor.dtype not in TYPE_NAMES:
            raise WeightsError(
                f"PyTorch has no type for {name}, which is {tensor.dtype}; convert it first, e.g. "
                "to float32."
            )
        entries.append(_value(name) + _rebuild(str(key), tensor))
    body = b"".join(entries)
    return pickle.PROTO + b"\2" + pickle.EMPTY_DICT + pickle.MARK + body + pickle.SETITEMS + b"."


def _rebuild(key: str, tensor: TorchTensor) -> bytes:
    names = TYPE_NAMES[tensor.dtype]
    count = math.prod(tensor.shape)
    if names.storage:
        function, kind, dtype = "_rebuild_tensor_v2", _name(f"torch {names.storage}"), ()
    else:  # untyped bytes, and the type as one more argument
        function, kind = "_rebuild_tensor_v3", _name("torch.storage UntypedStorage")
        dtype = (_name(f"torch {names.torch}"),)
        count *= tensor.dtype.itemsize
    storage = _tuple((_value("storage"), kind, _value(key), _value("cpu"), _value(count)))
    strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
    hooks = _name("collections OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    arguments = (
        storage + pickle.BINPERSID,
        _value(0),
        _tuple(map(_value, tensor.shape)),
        _tuple(map(_value, strides)),
        pickle.NEWFALSE,  # requires_grad
        hooks,
        *dtype,
    )
    return _name(f"torch._utils {function}") + _tuple(arguments) + pickle.REDUCE


def _name(module_and_name: str) -> bytes:
    return pickle.GLOBAL + "{}\n{}\n".format(*module_and_name.split()).encode()


def _tuple(items: Iterable[bytes]) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _value(value: str | int) -> bytes:
    """A string or a number of 0 or more."""
    if isinstance(value, str):
        text = value.encode()
        return pickle.BINUNICODE + struct.pack("<I", len(text)) + text
    if value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    return pickle.LONG1 + b"\x08" + struct.pack("<q", value)
