"""NumPy arrays out of pickles, without running the pickle.

The pickle is carried out by `mvjax.inert_pickle`, which knows no way to import or call anything.
Here is what the few names stand for that NumPy writes around an array; any other is an error. Both
spellings of NumPy's modules are known: `numpy.core` (1.x) and `numpy._core` (2.x).
"""

import math
import re
from typing import Any

import numpy as np

from mvjax.inert_pickle import Dialect, Name, describe_pickle

_NAMES = {
    f"numpy.{core}.{name}": name.rpartition(".")[2]
    for core in ("core", "_core")
    for name in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
} | {
    "numpy.ndarray": "ndarray",
    "numpy.dtype": "dtype",
    "_codecs.encode": "encode",  # protocols 1 and 2 have no bytes
    "__builtin__.bytes": "bytes",
}
_NUMBER = re.compile(r"[<>=|]?[biufc]\d{1,2}")  # a dtype's code; never objects or structures


class PickleRefused(ValueError):
    """A pickle that is damaged, or holds more than arrays and plain values."""


class _Pending:
    """An array or type that is made in two steps; what refers to it sees the finished one."""

    def __init__(self, value: Any = None):
        self.value = value


def read_array_pickle(data: bytes, where: object) -> Any:
    """What a pickle describes: lists, tuples, dicts, plain values and NumPy arrays of numbers.

    Args:
        data: the pickle, of any protocol that NumPy has been pickled with (1 to 5).
        where: the file, for messages.

    Raises:
        PickleRefused: if it refers to anything else, or is damaged.
    """
    try:
        return _finished(describe_pickle(data, _NUMPY), {})
    except PickleRefused as error:
        raise PickleRefused(f"{where} {error}") from None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise PickleRefused(
            f"{where}: a damaged pickle ({error}); copy or make it again"
        ) from error


def _refusal(name: str) -> PickleRefused:
    return PickleRefused(
        f"would call {name}; only NumPy arrays and plain values are read, and nothing is executed. "
        "Do not load this file with pickle unless you trust where it comes from"
    )


def _call(function: Any, args: Any) -> Any:
    match function, args:
        case Name("dtype"), (str(code), *_) if _NUMBER.fullmatch(code):
            return _Pending(np.dtype(code))
        case Name("dtype"), (code, *_):
            raise PickleRefused(f"holds an array of type {code!r}; only numbers are read")
        case Name("encode"), (str(text), "latin1"):
            return text.encode("latin1")
        case Name("bytes"), ():
            return b""
        case Name("_reconstruct"), (Name("ndarray"), *_):
            return _Pending()
        case Name("scalar"), (_Pending(value=np.dtype() as dtype), content):
            return _array(content, dtype, (1,), "C")[0]
        case Name("_frombuffer"), (content, _Pending(value=np.dtype() as dtype), shape, order):
            return _array(content, dtype, shape, order)
    raise ValueError("something is called in a way that NumPy does not")


def _build(target: Any, state: Any) -> Any:
    """The second step: a type's byte order, or an array's content."""
    match target, state:
        case _Pending(value=np.dtype() as dtype), (_, str(order), None, None, None, *_):
            target.value = dtype.newbyteorder(order)
        case _Pending(value=None), (
            _,
            shape,
            _Pending(value=np.dtype() as dtype),
            fortran,
            content,
        ):
            target.value = _array(content, dtype, shape, "F" if fortran else "C")
        case _:
            raise ValueError("an array is described in an unknown way")
    return target


def _array(content: Any, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    if isinstance(content, str):  # a string of Python 2
        content = content.encode("latin1")
    if len(content) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{len(content)} bytes for an array {dtype} {list(shape)}")
    return np.frombuffer(content, dtype).reshape(shape, order=order)


def _finished(value: Any, done: dict[int, Any]) -> Any:
    """The value with arrays in place of what stood for them; shared parts are looked at once."""
    if id(value) in done:
        return done[id(value)]
    match value:
        case _Pending(value=np.ndarray() as result):
            pass
        case list() | tuple():
            result = type(value)(_finished(item, done) for item in value)
        case dict():
            result = {key: _finished(item, done) for key, item in value.items()}
        case _Pending() | Name():
            raise ValueError("it holds something that is no array")
        case _:
            result = value
    done[id(value)] = result
    return result


_NUMPY = Dialect(
    names=_NAMES,
    effects={
        "REDUCE": _call,
        "BUILD": _build,
        # Lists and strings as Python 2 and protocol 0 write them.
        "LIST": list,
        "SHORT_BINSTRING": str,
        "BINSTRING": str,
    },
    refusal=_refusal,
    unwritten="NumPy does not write the opcode",
)
