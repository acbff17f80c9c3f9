"""Reading and writing .pt files (also .pth and .bin) of PyTorch since 1.6, without PyTorch.

The file is a zip archive whose entries are not compressed: `<root>/data.pkl` describes the tensors,
and `<root>/data/<key>` is one storage, the bytes that one or more tensors are views of. A tensor is
memory-mapped directly from the archive. As with PyTorch's own `mmap=True`, the checksums of the
storages are not verified, since that would read every byte twice.
"""

import math
import pickle
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data_pipelines.atomic import replacing
from data_pipelines.pickles import Described, Dict, Function, Opaque, PickleRefused, load_pickle
from mvjax.weights.files import (
    TYPE_NAMES,
    Tensors,
    TorchTensor,
    WeightsError,
    map_array,
    raw_bytes,
    span,
)

# A real checkpoint nests a few dicts; a malicious one could nest them without end.
_DEEPEST = 32
_MOST_ENTRIES = 1_000_000
_ONLY_TENSORS = (
    "a weights file must hold only tensors. If you trust its source, load it in PyTorch and save "
    "its state_dict() again."
)

# What `zipfile` raises for damaged archives; OSError is a seek to a negative offset.
_ZIP_DAMAGE = (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, struct.error)
_LOCAL_HEADER = 30  # bytes before an entry's name; the data follow the name and the extra field


def read_pt(path: Path) -> Tensors:
    """Returns the tensors of a .pt, .pth or .bin file, named by their dict keys joined with dots.

    Everything else in the file (step counts, byte blobs, lists) is ignored.

    Raises:
        WeightsError: The file is cut off, damaged, of another kind, or would run code.
    """
    try:
        if not zipfile.is_zipfile(path):
            size = f"{path.stat().st_size / 1e6:,.1f} MB on disk"
            raise WeightsError(
                f"{path} is cut off: the end of the zip archive is missing ({size}); download it "
                "again."
            )
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            root = _root(path, archive)
            description = archive.read(f"{root}data.pkl")
            storages = {
                entry.filename.removeprefix(f"{root}data/"): (_first_byte(file, entry), entry)
                for entry in archive.infolist()
                if entry.filename.startswith(f"{root}data/")
            }
        tree = load_pickle(description, path, _NAMES, _ONLY_TENSORS, _storage)
    except WeightsError:
        raise
    except PickleRefused as error:
        raise WeightsError(str(error)) from error
    except _ZIP_DAMAGE as error:
        raise WeightsError(f"{path} is a damaged zip file ({error}); download it again.") from error
    if not isinstance(tree, dict):
        raise WeightsError(f"{path} holds no tensors by name; save a state_dict() instead.")
    tensors: Tensors = {}
    for count, (name, value) in enumerate(_entries(path, tree)):
        if count == _MOST_ENTRIES:
            raise WeightsError(f"{path} holds more than a million entries; it is not a checkpoint.")
        if name in tensors:
            raise WeightsError(f"{path} holds two entries called {name}; rename one of them.")
        if isinstance(value, Described) and isinstance(value.value, _Stored):
            tensors[name] = _mapped(path, storages, name, value.value)
    return tensors


def _root(path: Path, archive: zipfile.ZipFile) -> str:
    """Returns the folder of `data.pkl` with a slash; checks that `torch.save` wrote the file."""
    entries = {entry.filename: entry for entry in archive.infolist()}
    roots = [n.removesuffix("data.pkl") for n in entries if n[n.find("/") :] == "/data.pkl"]
    root = roots[0] if len(roots) == 1 else None
    compressed = [n for n, e in entries.items() if e.compress_type != zipfile.ZIP_STORED]
    if root is None:
        found = f"it has {len(roots) or 'no'} data.pkl; save the weights with torch.save."
        problem = f"is a zip file, but not one that torch.save wrote: {found}"
    elif f"{root}constants.pkl" in entries:
        problem = "is a TorchScript program; torch.jit.load it and torch.save its state_dict()."
    elif compressed:
        problem = f"is compressed ({compressed[0]}); pack it again without compression."
    elif f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
        problem = "is big-endian; load and save it with PyTorch on a little-endian machine."
    else:
        return root
    raise WeightsError(f"{path} {problem}")


def _first_byte(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Returns the position of an entry's data in the file."""
    # The archive's directory does not hold it: PyTorch pads each entry's own header for alignment.
    file.seek(entry.header_offset)
    header = file.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or header[:4] != b"PK\3\4":
        raise zipfile.BadZipFile(f"no entry where {entry.filename} should be")
    name, extra = struct.unpack_from("<HH", header, 26)
    first = entry.header_offset + _LOCAL_HEADER + name + extra
    if first + entry.file_size > file.seek(0, 2):
        raise zipfile.BadZipFile(f"{entry.filename} ends after the file")
    return first


def _entries(
    path: Path, tree: dict[Any, Any], prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, Any]]:
    if depth == _DEEPEST:
        raise WeightsError(f"{path} nests dicts more than {_DEEPEST} deep; it is not a checkpoint.")
    for key, value in tree.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from _entries(path, value, f"{prefix}{key}.", depth + 1)


# --- What PyTorch's names in the pickle stand for (see `data_pipelines.pickles`) ---


class _Stored(NamedTuple):
    """A strided view of a storage; offset and strides count elements, as in PyTorch."""

    storage: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _storage(reference: Any) -> Described:
    """Describes a persistent id: ("storage", class, key, device, number of elements)."""
    kind, storage, key, _, _ = reference
    if kind != "storage" or not isinstance(storage, Described) or not isinstance(key, str):
        raise ValueError("a storage is described in an unknown way")
    return Described((key, storage.value))


def _tensor(view: tuple, dtype: Any = None, metadata: tuple = ()) -> Described:
    storage, offset, shape, strides = view
    key, stored_dtype = storage.value
    dtype = stored_dtype if dtype is None else dtype
    sound = all(type(n) is int and 0 <= n < 2**63 for n in (offset, *shape, *strides))
    if not isinstance(dtype, np.dtype) or not sound or len(shape) != len(strides):
        raise ValueError("a tensor has an invalid type, shape or strides")
    if any(metadata):
        raise PickleRefused(
            "holds a conjugated or negated view of a tensor; save a clone() of it instead."
        )
    return Described(_Stored(key, dtype, offset, tuple(shape), tuple(strides)))


def _parameter(data: Any, *_: Any) -> Described:
    if not isinstance(data, Described) or not isinstance(data.value, _Stored):
        raise ValueError("a parameter has unknown arguments")
    return data


_NAMES = {
    **{f"torch.{names.storage}": Described(d) for d, names in TYPE_NAMES.items() if names.storage},
    **{f"torch.{names.torch}": Described(dtype) for dtype, names in TYPE_NAMES.items()},
    "torch.storage.UntypedStorage": Described(),  # the tensor says the type
    "torch.storage.TypedStorage": Described(),
    "torch._utils._rebuild_tensor": Function(lambda *view: _tensor(view)),
    # After the view: requires_grad, hooks, (of version 3) the type, and metadata.
    "torch._utils._rebuild_tensor_v2": Function(lambda *a: _tensor(a[:4], metadata=a[6:])),
    "torch._utils._rebuild_tensor_v3": Function(lambda *a: _tensor(a[:4], a[6].value, a[7:])),
    "torch._utils._rebuild_parameter": Function(_parameter),
    "torch._utils._rebuild_parameter_with_state": Function(_parameter),
    "collections.OrderedDict": Function(lambda: Dict()),  # takes its content by `SETITEMS` only
}
# Values other than tensors. `_io.BytesIO` is Transformer Engine's `_extra_state` in releases;
# protocol 2 writes bytes as `_codecs.encode`, and the names of Python 2; the NumPy names are
# scalars such as a best loss.
_NAMES |= dict.fromkeys(
    (
        *("_io.BytesIO", "_codecs.encode", "torch.Size", "torch.device", "numpy.dtype"),
        *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
        *("builtins.bytearray", "builtins.set", "builtins.complex"),
        *("__builtin__.bytearray", "__builtin__.set", "__builtin__.complex"),
    ),
    Function(Opaque),
)


def _mapped(
    path: Path, storages: Mapping[str, tuple[int, zipfile.ZipInfo]], name: str, stored: _Stored
) -> TorchTensor:
    """Returns the tensor, which is mapped when it is read; checks that its storage holds it."""
    key, dtype, offset, shape, strides = stored
    if key not in storages:
        raise WeightsError(f"{path} lacks the values of {name} (data/{key}); download it again.")
    first, entry = storages[key]
    needed = 0 if 0 in shape else (offset + span(shape, strides)) * dtype.itemsize
    if needed > entry.file_size:
        raise WeightsError(
            f"{path} holds {entry.file_size:,} bytes of values for {name}, which needs "
            f"{needed:,}; download it again."
        )
    start = first + offset * dtype.itemsize
    return TorchTensor(shape, dtype, partial(map_array, path, start, shape, dtype, strides))


# --- Writing ---


_ALIGNMENT = 64  # bytes; PyTorch's own choice, so that the file can be memory-mapped
_ZIP64_SIZES = 20  # bytes that `force_zip64` adds to an entry's header
_PADDING = 4  # bytes of kind and length before the padding in a header
_FIRST_YEAR = (1980, 1, 1, 0, 0, 0)  # a fixed date, so that equal weights give equal bytes


def write_pt(path: Path, tensors: Mapping[str, TorchTensor]) -> None:
    """Writes a file that `torch.load(path, weights_only=True)` opens, one tensor at a time.

    Every tensor gets its own storage, also where several were views of one. The file is replaced
    atomically.

    Raises:
        WeightsError: PyTorch lacks a tensor's type, or its values are not what it declares.
    """
    description = _describe(tensors)
    with (
        replacing(path) as unfinished,
        unfinished.open("wb") as file,
        zipfile.ZipFile(file, "w") as archive,
    ):

        def add(name: str, data: bytes | np.ndarray) -> None:
            entry = zipfile.ZipInfo(f"archive/{name}", _FIRST_YEAR)
            header = _LOCAL_HEADER + len(entry.filename) + _ZIP64_SIZES + _PADDING
            padding = -(file.tell() + header) % _ALIGNMENT
            entry.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
            with archive.open(entry, "w", force_zip64=True) as destination:
                destination.write(data)

        add("data.pkl", description)
        add("byteorder", b"little")
        for key, (name, tensor) in enumerate(tensors.items()):
            add(f"data/{key}", raw_bytes(name, tensor))
        add("version", b"3\n")


def _describe(tensors: Mapping[str, TorchTensor]) -> bytes:
    """Returns the pickle: a dict of calls that rebuild tensors from storages."""
    # Opcode by opcode, because Python's pickler would have to import the functions it names.
    entries = b""
    for key, (name, tensor) in enumerate(tensors.items()):
        names, count = TYPE_NAMES.get(tensor.dtype), math.prod(tensor.shape)
        if names is None:
            raise WeightsError(
                f"PyTorch has no type for {name}, which is {tensor.dtype}; convert it first."
            )
        if names.storage:
            function, kind, dtype = "_rebuild_tensor_v2", _name("torch", names.storage), ()
        else:  # untyped bytes, and the type as one more argument
            function, kind = "_rebuild_tensor_v3", _name("torch.storage", "UntypedStorage")
            dtype = (_name("torch", names.torch),)
            count *= tensor.dtype.itemsize
        reference = _value("storage"), kind, _value(str(key)), _value("cpu"), _value(count)
        strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
        arguments = (
            _tuple(reference) + pickle.BINPERSID,
            _value(0),
            _tuple(map(_value, tensor.shape)),
            _tuple(map(_value, strides)),
            pickle.NEWFALSE,  # requires_grad
            _name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE,  # hooks
            *dtype,
        )
        call = _name("torch._utils", function) + _tuple(arguments) + pickle.REDUCE
        entries += _value(name) + call
    return pickle.PROTO + b"\2" + pickle.EMPTY_DICT + pickle.MARK + entries + pickle.SETITEMS + b"."


def _name(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tuple(items: Iterable[bytes]) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _value(value: str | int) -> bytes:
    """Encodes a string, or a number of 0 or more."""
    if isinstance(value, str):
        text = value.encode()
        return pickle.BINUNICODE + struct.pack("<I", len(text)) + text
    if value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    return pickle.LONG1 + b"\x08" + struct.pack("<q", value)
