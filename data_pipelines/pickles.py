"""NumPy arrays out of pickles, without running the pickle.

The pickle is carried out by something that knows no way to import or call anything. Here is what
the few names stand for that NumPy writes around an array; any other is an error. Both spellings of
NumPy's modules are known: `numpy.core` (1.x) and `numpy._core` (2.x).
"""

import math
import pickletools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

# Pickles read as descriptions, without an unpickler.
#
# A pickle is a program for a small stack machine whose calls can reach any Python function, so
# loading one from a stranger is running a stranger's code. Here the opcodes are decoded by the
# standard library (`pickletools.genops`, which executes nothing) and carried out on lists,
# tuples, dicts and plain values. A name is only looked up among the few that a `Dialect` knows;
# nothing is imported, no attribute is set, and what a call gives is the dialect's own description
# of the result. Any other name or opcode is an error.


@dataclass(frozen=True)
class Name:
    """Something the pickle refers to by name, e.g. "torch.FloatStorage". It can do nothing."""

    name: str


@dataclass(frozen=True)
class Dialect:
    """What one library writes into pickles besides lists, tuples, dicts and plain values.

    Attributes:
        names: each "module.name" that may occur, and the `Name` it is called by here.
        effects: for each further opcode, what it leaves on the stack, from its argument in the
            pickle (if it has one) and what it takes off the stack (all after a mark as one list).
        refusal: the error for a name that is not among `names`.
        unwritten: how the error for any other opcode begins; the opcode follows.
    """

    names: Mapping[str, str]
    effects: Mapping[str, Callable[..., Any]]
    refusal: Callable[[str], Exception]
    unwritten: str

    def named(self, name: str) -> Name:
        """The `Name` for "module.name", or the refusal."""
        if name not in self.names:
            raise self.refusal(name)
        return Name(self.names[name])


def describe_pickle(data: bytes, dialect: Dialect) -> Any:
    """What a pickle describes; it may hold itself, or one part in many places.

    Raises:
        Exception: the dialect's refusal, for a name that it does not know.
        ValueError, TypeError, LookupError, AttributeError: the pickle is damaged.
    """
    effects = _PLAIN | dialect.effects
    stack: list[Any] = []
    below_marks: list[list[Any]] = []
    memo: dict[int, Any] = {}

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
            case "GLOBAL":
                stack.append(dialect.named(arg.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                stack.append(dialect.named(".".join(last(2))))
            case "INST":  # names and calls in one; Python 3 never writes it
                raise dialect.refusal(arg.replace(" ", ".", 1))
            case name if name in effects:
                inputs = [] if opcode.arg is None else [arg]
                if pickletools.markobject in opcode.stack_before:
                    items, stack = stack, below_marks.pop()
                    below = opcode.stack_before.index(pickletools.markobject)
                    inputs += [*last(below), items]
                else:
                    inputs += last(len(opcode.stack_before))
                stack.append(effects[name](*inputs))
            case name:
                raise ValueError(f"{dialect.unwritten} {name}")
    raise ValueError("it has no end")


def _extend(target: Any, items: list[Any]) -> list[Any]:
    if not isinstance(target, list):
        raise TypeError("items are put into something that is no list")
    target.extend(items)
    return target


def _set(target: Any, items: list[Any]) -> dict[Any, Any]:
    if not isinstance(target, dict):
        raise TypeError("entries are put into something that is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | float | bytes | None):
            raise TypeError("a dict has keys that are no names")
        target[key] = value
    return target


_CONSTANTS = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)
_PLAIN: dict[str, Callable[..., Any]] = {
    **{name: lambda value: value for name in _CONSTANTS},
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "TUPLE": tuple,
    **{f"TUPLE{count}": lambda *items: items for count in (1, 2, 3)},
    "EMPTY_LIST": list,
    "APPEND": lambda target, item: _extend(target, [item]),
    "APPENDS": _extend,
    "EMPTY_DICT": dict,
    "SETITEM": lambda target, key, value: _set(target, [key, value]),
    "SETITEMS": _set,
}


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
