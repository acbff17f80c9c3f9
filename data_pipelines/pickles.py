"""A safe unpickler for untrusted files: NumPy arrays (datasets) and PyTorch's .pt (weights).

A pickle is a program that can call any Python function. `load_pickle` imports nothing: it looks up
the names in the pickle in a table of inert objects: a `Function` that returns a description, or
something `Described`. Any other name is an error. `pickle.Unpickler` has three more weaknesses,
which a scan beforehand (`pickletools`, which executes nothing) removes:

- Opcodes that bypass the table (the extension registry) or that no library writes are refused.
- A number in the file could decide how much memory is allocated: the memo's index must not exceed
  the number of its entries, and a string's length must not exceed the file.
- Keys of dicts are hashed, which for nested tuples takes exponential time or overflows the C
  stack. The opcodes that make dicts and sets are replaced by ones that take our `Dict` or `Opaque`.
"""

import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


class PickleRefused(ValueError):
    """The pickle is damaged, or contains something that is not allowed."""


class Inert:
    """An object without attributes that a pickle could set (BUILD)."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class Described(Inert):
    """A placeholder for what it describes: a class, a storage, a tensor."""

    __slots__ = ("value",)

    def __init__(self, value: Any = None):
        self.value = value


class Function(Inert):
    """A placeholder for a function; its result describes what the function would return."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]):
        self._call = call

    def __call__(self, *args: Any) -> Any:
        """Describes the result."""
        return self._call(*args)


class Opaque(Inert):
    """A value whose content is ignored, such as a set."""

    __slots__ = ()

    def __init__(self, *args: Any):
        pass

    def add(self, item: Any) -> None:
        """Ignores an element of a set."""


class Dict(dict, Inert):
    """A dict that accepts only keys that are cheap to hash."""

    __slots__ = ()

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, str | int | float | bytes | None):
            raise TypeError(f"a dict has a {type(key).__name__} as a key")
        super().__setitem__(key, value)


_ALLOWED = {
    *("PROTO", "FRAME", "STOP", "MARK", "POP", "NONE", "NEWTRUE", "NEWFALSE"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("SHORT_BINSTRING", "BINSTRING", "LIST", "INST"),  # as Python 2 and protocol 0 write them
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_SET", "ADDITEMS"),
    *("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
    *("GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"),
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data, names, why, persistent):
        data, containers = _scanned(data)
        super().__init__(io.BytesIO(data), encoding="latin1", buffers=containers)
        self._names, self._why, self._persistent = names, why, persistent

    def find_class(self, module: str, name: str) -> Inert:
        found = self._names.get(f"{module}.{name}")
        if found is None:
            module = module.replace("__builtin__", "builtins")
            raise PickleRefused(f"would call {module}.{name}; {self._why}")
        return found

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise ValueError("it has persistent ids")
        return self._persistent(pid)


def load_pickle(
    data: bytes,
    where: object,
    names: Mapping[str, Inert],
    why: str,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """Returns lists, tuples, `Dict`s, plain values, and placeholders; also in cycles.

    Args:
        data: The pickle.
        where: The file, for messages.
        names: "module.name" -> placeholder; functions must be safe for any arguments.
        why: Ends the message about any other name: what is allowed, and what to do.
        persistent: Maps a persistent id to an object.

    Raises:
        PickleRefused: The pickle has another name or is damaged, or a function raises it.
    """
    try:
        return _Unpickler(data, names, why, persistent).load()
    except MemoryError:
        raise
    except PickleRefused as error:
        raise PickleRefused(f"{where} {error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise PickleRefused(f"{where}: a damaged pickle ({error}); copy it again") from error


def _scanned(data: bytes) -> tuple[bytes, list[Any]]:
    """Checks the opcodes; returns the pickle with safe ones, and the containers it will take."""
    scanned, containers = bytearray(data), []
    for count, (opcode, arg, position) in enumerate(pickletools.genops(data)):
        if opcode.name not in _ALLOWED:
            raise ValueError(f"it has the opcode {opcode.name}, which is not read here")
        match opcode.name:
            case "PUT" | "BINPUT" | "LONG_BINPUT" if not 0 <= arg <= count:
                raise ValueError(f"entry {arg} of its memo, where at most {count} are possible")
            case "EMPTY_DICT" | "EMPTY_SET":  # NEXT_BUFFER pushes the next of the containers
                containers.append(Dict() if opcode.name == "EMPTY_DICT" else Opaque())
                scanned[position] = pickle.NEXT_BUFFER[0]
            case "NEWOBJ":  # needs a class, whereas REDUCE calls anything
                scanned[position] = pickle.REDUCE[0]
    return bytes(scanned), containers


# --- NumPy arrays ---


_NUMBER = re.compile(r"[<>=|]?[biufc]\d{1,2}")  # a dtype's code; never objects or structures


class _Pending(Described):
    """An array or type that the pickle makes in two steps, and may refer to in between."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """The second step: a type's byte order, or an array's content."""
        match self.value, state:
            case np.dtype(), (_, str(order), None, None, None, *_):
                self.value = self.value.newbyteorder(order)
            case None, (_, shape, _Pending(value=np.dtype() as dtype), fortran, content):
                self.value = _array(content, dtype, shape, "F" if fortran else "C")
            case _:
                raise ValueError("the state of an array or type is invalid")


def read_array_pickle(data: bytes, where: object) -> Any:
    """Returns lists, tuples, dicts, plain values and NumPy arrays of numbers; protocols 1 to 5.

    Raises:
        PickleRefused: The pickle refers to anything else, or is damaged; names the file `where`.
    """
    why = (
        "only NumPy arrays and plain values are read, and nothing is executed. Do not load this "
        "file with pickle unless you trust its source"
    )
    described = load_pickle(data, where, _NUMPY, why)
    try:
        return _finished(described, {})
    except (ValueError, RecursionError) as error:
        raise PickleRefused(f"{where}: a damaged pickle ({error}); copy it again") from error


def _dtype(code: Any, *_: Any) -> _Pending:
    if not isinstance(code, str) or not _NUMBER.fullmatch(code):
        raise PickleRefused(f"holds an array of type {code!r}; only numbers are read")
    return _Pending(np.dtype(code))


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"bytes are encoded as {encoding!r}")
    return text.encode("latin1")


def _reconstruct(kind: Any, *_: Any) -> _Pending:
    if kind is not _NDARRAY:
        raise ValueError("an array has another class than numpy.ndarray")
    return _Pending()


def _frombuffer(content: Any, dtype: _Pending, shape: Any, order: Any) -> _Pending:
    return _Pending(_array(content, dtype.value, shape, order))


def _scalar(dtype: _Pending, content: Any) -> _Pending:
    return _Pending(_array(content, dtype.value, (1,), "C")[0])


def _array(content: Any, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    if isinstance(content, str):  # a string of Python 2
        content = content.encode("latin1")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"an array has the shape {shape!r}")
    if len(content) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(content)} bytes for an array {dtype} {list(shape)}")
    return np.frombuffer(content, dtype).reshape(shape, order=order)


def _finished(value: Any, done: dict[int, Any]) -> Any:
    """Returns the value with arrays in place of placeholders."""
    if id(value) in done:  # shared parts once: nested sharing would take exponential time
        return done[id(value)]
    match value:
        case _Pending(value=np.ndarray() | np.generic() as result):
            pass
        case list() | tuple():
            result = type(value)(_finished(item, done) for item in value)
        case Dict():
            result = {key: _finished(item, done) for key, item in value.items()}
        case Inert():
            raise ValueError("it holds something other than arrays")
        case _:
            result = value
    done[id(value)] = result
    return result


_NDARRAY = Described()
_NUMPY: dict[str, Inert] = {
    "numpy.ndarray": _NDARRAY,
    "numpy.dtype": Function(_dtype),
    "_codecs.encode": Function(_encode),  # protocols 1 and 2 have no bytes
    "__builtin__.bytes": Function(lambda: b""),
}
for _core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    _NUMPY |= {
        f"{_core}.multiarray._reconstruct": Function(_reconstruct),
        f"{_core}.multiarray.scalar": Function(_scalar),
        f"{_core}.numeric._frombuffer": Function(_frombuffer),
    }
