"""Messages of the openpi protocol: msgpack, in which an array is a map of bytes, dtype and shape.

An array is `{b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [2, 3]}`, a numpy
number `{b"__npgeneric__": True, b"data": 1.5, b"dtype": "<f4"}`. Whoever can reach the server can
send it anything, so `decode` unpickles nothing, knows plain numbers only, and gives up at a limit
before it has made much of a message that is built to be costly.
"""

import math
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np

_DTYPES = frozenset(
    order + kind
    for order, kinds in (("|", "b1 i1 u1"), ("<>", "i2 i4 i8 u2 u4 u8 f2 f4 f8"))
    for order in order
    for kind in kinds.split()
)


class ProtocolError(ValueError):
    """A message that is not of the protocol, or too large; says what to send instead."""


@dataclass(frozen=True)
class MessageLimits:
    """What a message may hold.

    Attributes:
        message_bytes: of the whole message.
        arrays: numpy arrays and numbers.
        maps, lists: maps and lists, those of the arrays included.
        entries: of one map or list.
        axes: of an array.
    """

    message_bytes: int = 32 * 2**20
    arrays: int = 32
    maps: int = 64
    lists: int = 128
    entries: int = 4096
    axes: int = 8


def encode(message: Any) -> bytes:
    """Maps, lists, texts, numbers, bytes and numpy arrays of plain numbers as msgpack."""
    return msgpack.packb(message, default=_pack)


def decode(data: bytes, limits: MessageLimits = MessageLimits()) -> Any:
    """What `encode` was given; arrays are read-only views of `data`.

    Raises:
        ProtocolError: the bytes are not msgpack, an array in it is not one, or a limit is exceeded.
    """
    if len(data) > limits.message_bytes:
        raise ProtocolError(
            f"The message has {len(data)} bytes; at most {limits.message_bytes} are taken: send "
            "smaller pictures."
        )
    build = _Builder(limits)
    try:
        return msgpack.unpackb(
            data,
            object_hook=build.map,
            list_hook=build.list,
            ext_hook=_refuse_extension,
            strict_map_key=False,  # openpi's keys are texts and bytes
            max_array_len=limits.entries,
            max_map_len=limits.entries,
        )
    except ProtocolError:
        raise
    # Whatever the parser stumbles over is the message's fault: it raises about ten types.
    except Exception as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise ProtocolError(f"The message is not a msgpack map as openpi's: {reason}.") from error


def _pack(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.str not in _DTYPES:
            raise TypeError(f"Arrays of dtype {value.dtype} cannot be sent, only plain numbers.")
        if isinstance(value, np.generic):
            return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
        return {
            b"__ndarray__": True,
            b"data": value.tobytes(),
            b"dtype": value.dtype.str,
            b"shape": value.shape,
        }
    raise TypeError(f"A {type(value).__name__} cannot be sent.")


def _refuse_extension(code: int, data: bytes) -> None:
    raise ProtocolError(
        f"The message has a msgpack extension of type {code}; send maps and arrays."
    )


class _Builder:
    """Turns maps into arrays, and counts while the message is being read."""

    def __init__(self, limits: MessageLimits) -> None:
        self._limits = limits
        self._counts = {"arrays": 0, "maps": 0, "lists": 0}

    def map(self, fields: dict) -> Any:
        self._count("maps")
        if b"__ndarray__" in fields:
            self._count("arrays")
            return self._array(fields)
        if b"__npgeneric__" in fields:
            self._count("arrays")
            return _number(fields)
        return fields

    def list(self, values: list) -> list:
        self._count("lists")
        return values

    def _count(self, what: str) -> None:
        self._counts[what] += 1
        if self._counts[what] > getattr(self._limits, what):
            raise ProtocolError(
                f"The message has more than {getattr(self._limits, what)} {what}; send one "
                "observation at a time, its numbers as numpy arrays."
            )

    def _array(self, fields: dict) -> np.ndarray:
        dtype, data, shape = _dtype(fields), fields.get(b"data"), fields.get(b"shape")
        sizes = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
        if not sizes or len(shape) > self._limits.axes or not isinstance(data, bytes):
            raise ProtocolError(
                "An array of the message lacks its bytes, or its shape is not a list of at most "
                f"{self._limits.axes} sizes."
            )
        if math.prod(shape) * dtype.itemsize != len(data):
            raise ProtocolError(
                f"An array of the message has {len(data)} bytes, but its shape and dtype "
                f"({dtype}) say {math.prod(shape) * dtype.itemsize}."
            )
        if not data:  # frombuffer takes no empty buffer
            return np.zeros(_bounded(shape), dtype)
        return np.frombuffer(data, dtype).reshape(shape)


def _bounded(shape: list[int]) -> list[int]:
    """The shape of an empty array; its other sizes may still overflow what numpy can count."""
    if any(size > 2**31 for size in shape):
        raise ProtocolError("An array of the message is empty, with a size beyond all use.")
    return shape


def _number(fields: dict) -> np.generic:
    dtype, value = _dtype(fields), fields.get(b"data")
    if not isinstance(value, bool | int | float):
        raise ProtocolError(f"A number of the message is a {type(value).__name__}.")
    return dtype.type(value)


def _dtype(fields: dict) -> np.dtype:
    name = fields.get(b"dtype")
    if not isinstance(name, str) or name not in _DTYPES:
        raise ProtocolError(
            f"An array of the message has dtype {str(name)[:40]!r}; booleans, integers and real "
            "numbers are taken, such as '|u1' and '<f4'."
        )
    return np.dtype(name)
