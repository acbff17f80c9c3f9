"""Reading what `torch.save` writes since PyTorch 1.6, without PyTorch.

The file is a zip archive whose entries are stored uncompressed: `<root>/data.pkl` describes the
tensors, `<root>/data/<key>` is one storage, the bytes one or more tensors are views of. So a tensor
is memory-mapped straight from its place in the archive. As with PyTorch's own `mmap=True`, the
checksums of the storages are not verified, since that would read every byte twice.
"""

import math
import pickle
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data_pipelines.pickles import Dialect, Name, describe_pickle
from mvjax.weights.files import (
    TYPE_NAMES,
    Tensors,
    TorchTensor,
    WeightsError,
    map_array,
    raw_bytes,
    replacing,
)

# The description of the tensors inside a PyTorch file, read without running it.
#
# The pickle in the file is carried out by `data_pipelines.pickles`, which knows no way to import
# or call anything. Here is what PyTorch's own names stand for: "calling" one means one of the few
# cases of `_call`, and any name but the ones PyTorch writes around tensors is an error.


class StoredTensor(NamedTuple):
    """A strided view of a storage; offset and strides count elements, as PyTorch does."""

    storage: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype | None  # None: untyped bytes, the tensor says the type


class _Opaque:
    """A value that is no tensor and is never looked into: an optimizer's device, a byte blob."""


_OPAQUE = _Opaque()

_STORAGES: dict[str, np.dtype | None] = {
    f"torch.{names.storage}": dtype for dtype, names in TYPE_NAMES.items() if names.storage
} | {"torch.storage.UntypedStorage": None, "torch.storage.TypedStorage": None}
_DTYPES = {f"torch.{names.torch}": dtype for dtype, names in TYPE_NAMES.items()}

# Calls that give a tensor, an ordered dict, or (the last lines) something `_Opaque`.
# `_io.BytesIO` is what Transformer Engine leaves in releases as `_extra_state`; protocol 2 writes
# bytes as `_codecs.encode`; the NumPy names are scalars such as a best loss.
_CALLS = {
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "collections.OrderedDict",
    *("_io.BytesIO", "_codecs.encode", "builtins.bytearray", "builtins.set", "builtins.complex"),
    *("torch.Size", "torch.device"),
    *("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
}
_NAMES = {name: name for name in _CALLS | _STORAGES.keys() | _DTYPES.keys()}
_NAMES |= {  # as protocol 2 spells them
    name.replace("builtins.", "__builtin__."): name for name in _CALLS if "builtins." in name
}
_LARGEST = 2**63  # of a PyTorch size or stride


def read_pickle(data: bytes, where: Path) -> Any:
    """What a pickle describes: dicts, lists, tuples, plain values, and `StoredTensor`s.

    Args:
        data: the pickle, protocol 2 to 5.
        where: the file, for messages.

    Raises:
        WeightsError: it refers to anything but tensors and plain values, or is damaged.
    """
    try:
        return describe_pickle(data, _PYTORCH)
    except WeightsError as error:
        raise WeightsError(f"{where} {error}") from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise WeightsError(
            f"{where} has a damaged description of its tensors (data.pkl: {error}); "
            "download it again."
        ) from error


def _refusal(name: str) -> WeightsError:
    return WeightsError(
        f"would call {name.replace('__builtin__.', 'builtins.', 1)}; a weights file must hold only "
        "tensors. If you trust where it comes from, load it in PyTorch and save its state_dict() "
        "again."
    )


def _storage(reference: Any) -> _Storage:
    """A persistent id: ("storage", class, key, device, number of elements)."""
    kind, storage, key, _, _ = reference
    if kind != "storage" or not isinstance(storage, Name) or not isinstance(key, str):
        raise ValueError("a storage is described in an unknown way")
    return _Storage(key, _STORAGES[storage.name])


def _call(function: Any, args: Any) -> Any:
    if not isinstance(function, Name) or function.name not in _CALLS:
        raise ValueError("something is called that is no function")
    match function.name.removeprefix("torch._utils."), args:
        case "_rebuild_tensor", (storage, offset, shape, strides):
            return _tensor(storage, offset, shape, strides)
        case "_rebuild_tensor_v2", (storage, offset, shape, strides, _, _, *metadata):
            return _tensor(storage, offset, shape, strides, metadata=metadata)
        case "_rebuild_tensor_v3", (storage, offset, shape, strides, _, _, dtype, *metadata):
            return _tensor(storage, offset, shape, strides, _DTYPES[dtype.name], metadata)
        case "_rebuild_parameter" | "_rebuild_parameter_with_state", (StoredTensor() as data, *_):
            return data
        case "collections.OrderedDict", ():
            return {}
        case name, _ if name == function.name and name != "collections.OrderedDict":
            return _OPAQUE
    raise ValueError(f"{function.name} has unknown arguments")


def _tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    dtype: np.dtype | None = None,
    metadata: Any = (),
) -> StoredTensor:
    dtype = dtype or storage.dtype
    numbers = (offset, *shape, *strides)
    if dtype is None or not all(type(n) is int and 0 <= n < _LARGEST for n in numbers):
        raise ValueError("a tensor has no type, or sizes that are no sizes")
    if len(shape) != len(strides):
        raise ValueError("a tensor has more sizes than strides, or fewer")
    if any(metadata):
        raise WeightsError(
            "holds a conjugated or negated view of a tensor; save a clone() of it instead."
        )
    return StoredTensor(storage.key, dtype, offset, tuple(shape), tuple(strides))


_PYTORCH = Dialect(
    names=_NAMES,
    effects={
        "REDUCE": _call,
        "NEWOBJ": _call,
        "BINPERSID": _storage,
        # Attributes of an object, e.g. `_metadata` of a state_dict: not needed.
        "BUILD": lambda target, state: target,
        "EMPTY_SET": lambda: _OPAQUE,
        "ADDITEMS": lambda target, items: target,
    },
    refusal=_refusal,
    unwritten="PyTorch does not write the pickle opcode",
)


# A real checkpoint nests a few dicts; a file made to exhaust the reader would nest without end.
_DEEPEST = 32
_MOST_ENTRIES = 1_000_000

# What `zipfile` raises for broken archives; OSError is a seek to before the file.
_ZIP_DAMAGE = (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, struct.error)
_LOCAL_HEADER = 30  # bytes before an entry's name; the data follow the name and the extra field


def read_pt(path: Path) -> Tensors:
    """The tensors of a .pt, .pth or .bin file, named by their dict keys joined with dots.

    Whatever else the file holds (step counts, byte blobs, lists) is left out.

    Raises:
        WeightsError: the file is cut off, damaged, of another kind, or would run code.
    """
    try:
        if not zipfile.is_zipfile(path):
            raise WeightsError(
                f"{path} is cut off: the directory at the end of its zip archive is missing "
                f"({path.stat().st_size / 1e6:,.1f} MB on disk); download it again."
            )
        archive = _Archive.open(path)
    except WeightsError:
        raise
    except _ZIP_DAMAGE as error:
        raise WeightsError(f"{path} is a damaged zip file ({error}); download it again.") from error
    root = read_pickle(archive.description, path)
    if not isinstance(root, dict):
        raise WeightsError(
            f"{path} holds no tensors by name; save a dict of tensors, such as a state_dict()."
        )
    tensors: Tensors = {}
    for count, (name, value) in enumerate(_entries(path, root)):
        if count == _MOST_ENTRIES:
            raise WeightsError(f"{path} holds more than a million entries; it is no checkpoint.")
        if name in tensors:
            raise WeightsError(f"{path} holds two entries called {name}; rename one of them.")
        if isinstance(value, StoredTensor):
            tensors[name] = archive.tensor(name, value)
    return tensors


def _entries(
    path: Path, tree: dict[Any, Any], prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, Any]]:
    if depth == _DEEPEST:
        raise WeightsError(f"{path} nests dicts more than {_DEEPEST} deep; it is no checkpoint.")
    for key, value in tree.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from _entries(path, value, f"{prefix}{key}.", depth + 1)


@dataclass(frozen=True)
class _Archive:
    """Where a PyTorch file keeps its parts.

    Attributes:
        path: the file.
        description: the bytes of `data.pkl`.
        storages: (first byte, size) by key.
    """

    path: Path
    description: bytes
    storages: dict[str, tuple[int, int]]

    @classmethod
    def open(cls, path: Path) -> "_Archive":
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            roots = [name.removesuffix("data.pkl") for name in entries if _is_description(name)]
            if len(roots) != 1:
                raise WeightsError(
                    f"{path} is a zip file, but not one that torch.save wrote: "
                    f"it has {len(roots) or 'no'} data.pkl; save the weights with torch.save."
                )
            (root,) = roots
            if f"{root}constants.pkl" in entries:
                raise WeightsError(
                    f"{path} is a TorchScript program; load it in PyTorch with torch.jit.load and "
                    "torch.save its state_dict()."
                )
            for entry in entries.values():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise WeightsError(
                        f"{path} is compressed ({entry.filename}), but torch.save stores tensors "
                        "plainly; unpack it and pack it again without compression."
                    )
            byteorder = f"{root}byteorder"
            if byteorder in entries and archive.read(byteorder) != b"little":
                raise WeightsError(
                    f"{path} was written on a big-endian machine; load and save it with PyTorch on "
                    "a little-endian one."
                )
            storages = {
                name.removeprefix(f"{root}data/"): (_first_byte(file, entry), entry.file_size)
                for name, entry in entries.items()
                if name.startswith(f"{root}data/")
            }
            return cls(path, archive.read(f"{root}data.pkl"), storages)

    def tensor(self, name: str, stored: StoredTensor) -> TorchTensor:
        """Checks that a tensor lies inside its storage."""
        if stored.storage not in self.storages:
            raise WeightsError(
                f"{self.path} lacks the values of {name} (data/{stored.storage}); download it "
                "again."
            )
        _, dtype, offset, shape, strides = stored
        first, size = self.storages[stored.storage]
        needed = _end(stored) * dtype.itemsize
        if needed > size:
            raise WeightsError(
                f"{self.path} holds {size:,} bytes of values for {name}, which needs {needed:,}; "
                "download it again."
            )
        start = first + offset * dtype.itemsize
        return TorchTensor(
            shape, dtype, partial(map_array, self.path, start, shape, dtype, strides)
        )


def _is_description(name: str) -> bool:
    return name.endswith("/data.pkl") and name.count("/") == 1


def _first_byte(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where an entry's data begin; only its own header knows, PyTorch pads it for alignment."""
    file.seek(entry.header_offset)
    header = file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or header[:4] != b"PK\3\4":
        raise zipfile.BadZipFile(f"no entry where {entry.filename} should be")
    name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    first = entry.header_offset + _LOCAL_HEADER + name + extra
    if first + entry.file_size > file.seek(0, 2):
        raise zipfile.BadZipFile(f"{entry.filename} ends after the file")
    return first


def _end(stored: StoredTensor) -> int:
    """One past the last element of the storage that a tensor touches."""
    if 0 in stored.shape:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(stored.shape, stored.strides))
    return stored.offset + last + 1


# Writing a file that `torch.load(path, weights_only=True)` opens, without PyTorch.


_ALIGNMENT = 64  # bytes; PyTorch's own choice, so that the file can be memory-mapped
_ZIP_LOCAL_HEADER = 30 + 20  # bytes around an entry's name: the fixed part, and 64-bit sizes
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
            unpadded = file.tell() + _ZIP_LOCAL_HEADER + len(entry.filename) + _PADDING
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
