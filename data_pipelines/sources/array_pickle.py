"""NumPy arrays out of pickles, without running the pickle.

A pickle is a program that may call any Python function. Here the standard library decodes its
opcodes (`pickletools.genops`, which executes nothing), and they are carried out on lists, tuples,
dicts and plain values. A name is only compared with the few that NumPy writes around an array;
nothing is imported or called, and any other name is an error. Both spellings of NumPy's modules
are known: `numpy.core` (1.x) and `numpy._core` (2.x).
"""

import math
import pickletools
import re
from typing import Any, NamedTuple

import numpy as np

_NUMPY = {
    f"numpy.{core}.{name}": name.rpartition(".")[2]
    for core in ("core", "_core")
    for name in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
}
_NAMES = _NUMPY | {
    "numpy.ndarray": "ndarray",
    "numpy.dtype": "dtype",
    "_codecs.encode": "encode",  # protocols 1 and 2 have no bytes
    "__builtin__.bytes": "bytes",
}
_NUMBER = re.compile(r"[<>=|]?[biufc]\d{1,2}")  # a dtype's code; never objects or structures

_CONSTANTS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BYTEARRAY8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "SHORT_BINSTRING", "BINSTRING"),
}


class PickleRefused(ValueError):
    """A pickle that is damaged, or holds more than arrays and plain values."""


class _Name(NamedTuple):
    kind: str  # a value of `_NAMES`


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
        return _finished(_run(data), {})
    except PickleRefused as error:
        raise PickleRefused(f"{where} {error}") from None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise PickleRefused(
            f"{where}: a damaged pickle ({error}); copy or make it again"
        ) from error


def _run(data: bytes) -> Any:
    stack: list[Any] = []
    below_marks: list[list[Any]] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, below_marks.pop()
        return items

    def last(count: int) -> list[Any]:
        return [stack.pop() for _ in range(count)][::-1]

    for opcode, arg, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                below_marks.append(stack)
                stack = []
            case "POP":
                stack.pop()
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(memo[arg])
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case name if name in _CONSTANTS:
                stack.append(arg)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                items = since_mark()
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(last(int(opcode.name[-1]))))
            case "EMPTY_LIST":
                stack.append([])
            case "LIST":
                items = since_mark()
                stack.append(items)
            case "APPEND":
                _list(stack[-2]).append(stack.pop())
            case "APPENDS":
                items = since_mark()
                _list(stack[-1]).extend(items)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                _set(stack[-3], last(2))
            case "SETITEMS":
                items = since_mark()
                _set(stack[-1], items)
            case "GLOBAL":
                stack.append(_named(arg.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                stack.append(_named(".".join(last(2))))
            case "INST":
                raise _refusal(arg.replace(" ", ".", 1))
            case "REDUCE":
                stack.append(_call(*last(2)))
            case "BUILD":
                target, state = last(2)
                _build(target, state)
                stack.append(target)
            case name:
                raise ValueError(f"NumPy does not write the opcode {name}")
    raise ValueError("it has no end")


def _refusal(name: str) -> PickleRefused:
    return PickleRefused(
        f"would call {name}; only NumPy arrays and plain values are read, and nothing is executed. "
        "Do not load this file with pickle unless you trust where it comes from"
    )


def _named(name: str) -> _Name:
    if name not in _NAMES:
        raise _refusal(name)
    return _Name(_NAMES[name])


def _list(target: Any) -> list:
    if not isinstance(target, list):
        raise TypeError("items are put into something that is no list")
    return target


def _set(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict):
        raise TypeError("entries are put into something that is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | float | bytes | None):
            raise TypeError("a dict has keys that are no names")
        target[key] = value


def _call(function: Any, args: Any) -> Any:
    match function, args:
        case _Name("dtype"), (str(code), *_) if _NUMBER.fullmatch(code):
            return _Pending(np.dtype(code))
        case _Name("dtype"), (code, *_):
            raise PickleRefused(f"holds an array of type {code!r}; only numbers are read")
        case _Name("encode"), (str(text), "latin1"):
            return text.encode("latin1")
        case _Name("bytes"), ():
            return b""
        case _Name("_reconstruct"), (_Name("ndarray"), *_):
            return _Pending()
        case _Name("scalar"), (_Pending(value=np.dtype() as dtype), content):
            return _array(content, dtype, (1,), "C")[0]
        case _Name("_frombuffer"), (content, _Pending(value=np.dtype() as dtype), shape, order):
            return _array(content, dtype, shape, order)
    raise ValueError("something is called in a way that NumPy does not")


def _build(target: Any, state: Any) -> None:
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
        case _Pending() | _Name():
            raise ValueError("it holds something that is no array")
        case _:
            result = value
    done[id(value)] = result
    return result
