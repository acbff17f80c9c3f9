"""Pickles read as descriptions, without an unpickler.

A pickle is a program for a small stack machine whose calls can reach any Python function, so
loading one from a stranger is running a stranger's code. Here the opcodes are decoded by the
standard library (`pickletools.genops`, which executes nothing) and carried out on lists, tuples,
dicts and plain values. A name is only looked up among the few that a `Dialect` knows; nothing is
imported, no attribute is set, and what a call gives is the dialect's own description of the result.
Any other name or opcode is an error.
"""

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


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
