"""The one unpickler: it reads pickles of strangers, for data (NumPy arrays) and weights (.pt).

A pickle is a program that can call any Python function, so loading one from a stranger is running a
stranger's code. `load_pickle` imports nothing: a name in the pickle is looked up in a table, and
what the table holds is inert: a `Function` that returns a description, or something `Described`.
Any other name is an error. Three weaknesses of `pickle.Unpickler` remain, and a scan beforehand
(`pickletools`, which executes nothing) takes care of them:

- opcodes that no table sees (the extension registry) or that no library writes are refused;
- a number in the file must not decide how much memory is taken: the memo grows only by entries
  that are there, and strings are as long as what follows;
- a key of a dict is hashed, and for tuples of tuples that takes exponential time or overflows the
  stack of C. Opcodes that make dicts and sets are replaced: they take a `Dict` or `Opaque` of ours.
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
    """A pickle that is damaged, or holds more than the data it may hold."""


class Inert:
    """Has no attributes that a pickle could set, and nothing happens if it tries (BUILD)."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class Described(Inert):
    """Stands for what it describes: a class that is only named, a storage, a tensor."""

    __slots__ = ("value",)

    def __init__(self, value: Any = None):
        self.value = value


class Function(Inert):
    """What a pickle calls by name; the result describes what the named function would make."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]):
        self._call = call

    def __call__(self, *args: Any) -> Any:
        """Describes the result."""
        return self._call(*args)


class Opaque(Inert):
    """A value that is never looked into, such as a set."""

    __slots__ = ()

    def __init__(self, *args: Any):
        pass

    def add(self, item: Any) -> None:
        """Ignores an element of a set."""


class Dict(dict, Inert):
    """A dict whose keys are quickly hashed."""

    __slots__ = ()

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, str | int | float | bytes | None):
            raise TypeError(f"a dict has keys that are no names ({type(key).__name__})")
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
            raise ValueError("it refers to something outside")
        return self._persistent(pid)


def load_pickle(
    data: bytes,
    where: object,
    names: Mapping[str, Inert],
    why: str,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """What a pickle describes: lists, tuples, `Dict`s, plain values, and what `names` makes.

    It may hold itself, or one part in many places.

    Args:
        data: the pickle.
        where: the file, for messages.
        names: what each "module.name" stands for; functions must take any arguments without harm.
        why: what is read instead of any other name, and what to do.
        persistent: persistent id -> object.

    Raises:
        PickleRefused: the pickle has another name or is damaged, or a function raises it.
    """
    try:
        return _Unpickler(data, names, why, persistent).load()
    except MemoryError:
        raise
    except PickleRefused as error:
        raise PickleRefused(f"{where} {error}") from None
    except Exception as error:  # there is no end to what a damaged pickle can raise
        raise PickleRefused(
            f"{where}: a damaged pickle ({error}); copy or download it again"
        ) from error


def _scanned(data: bytes) -> tuple[bytes, list[Any]]:
    """Checks the opcodes; returns the pickle with harmless ones, and the containers it will take.

    NEXT_BUFFER pushes the next object that is given to the unpickler, and so takes the place of the
    opcodes that make a container. REDUCE calls where NEWOBJ would want a class.
    """
    scanned, containers = bytearray(data), []
    for count, (opcode, arg, position) in enumerate(pickletools.genops(data)):
        if opcode.name not in _ALLOWED:
            raise ValueError(f"it has the opcode {opcode.name}, which is not read here")
        match opcode.name:
            case "PUT" | "BINPUT" | "LONG_BINPUT" if not 0 <= arg <= count:
                raise ValueError(f"entry {arg} of its memo, where at most {count} are possible")
            case "EMPTY_DICT" | "EMPTY_SET":
                containers.append(Dict() if opcode.name == "EMPTY_DICT" else Opaque())
                scanned[position] = pickle.NEXT_BUFFER[0]
            case "NEWOBJ":
                scanned[position] = pickle.REDUCE[0]
    return bytes(scanned), containers


# NumPy arrays


_NUMBER = re.compile(r"[<>=|]?[biufc]\d{1,2}")  # a dtype's code; never objects or structures


class _Pending(Described):
    """An array or type that is made in two steps; what refers to it sees the finished one."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """The second step: a type's byte order, or an array's content."""
        match self.value, state:
            case np.dtype(), (_, str(order), None, None, None, *_):
                self.value = self.value.newbyteorder(order)
            case None, (_, shape, _Pending(value=np.dtype() as dtype), fortran, content):
                self.value = _array(content, dtype, shape, "F" if fortran else "C")
            case _:
                raise ValueError("an array is described in an unknown way")


def read_array_pickle(data: bytes, where: object) -> Any:
    """What a pickle describes: lists, tuples, dicts, plain values and NumPy arrays of numbers.

    Args:
        data: the pickle, of any protocol that NumPy has been pickled with (1 to 5).
        where: the file, for messages.

    Raises:
        PickleRefused: if it refers to anything else, or is damaged.
    """
    why = (
        "only NumPy arrays and plain values are read, and nothing is executed. Do not load this "
        "file with pickle unless you trust where it comes from"
    )
    described = load_pickle(data, where, _NUMPY, why)
    try:
        return _finished(described, {})
    except (ValueError, RecursionError) as error:
        raise PickleRefused(f"{where}: a damaged pickle ({error})") from error


def _dtype(code: Any, *_: Any) -> _Pending:
    if not isinstance(code, str) or not _NUMBER.fullmatch(code):
        raise PickleRefused(f"holds an array of type {code!r}; only numbers are read")
    return _Pending(np.dtype(code))


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"bytes are written as {encoding!r}")
    return text.encode("latin1")


def _reconstruct(kind: Any, *_: Any) -> _Pending:
    if kind is not _NDARRAY:
        raise ValueError("an array is of another class than numpy.ndarray")
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
    """The value with arrays in place of what stood for them; shared parts are looked at once."""
    if id(value) in done:
        return done[id(value)]
    match value:
        case _Pending(value=np.ndarray() | np.generic() as result):
            pass
        case list() | tuple():
            result = type(value)(_finished(item, done) for item in value)
        case Dict():
            result = {key: _finished(item, done) for key, item in value.items()}
        case Inert():
            raise ValueError("it holds something that is no array")
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
