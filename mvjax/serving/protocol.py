"""Messages of the openpi protocol: msgpack, in which an array is a map of bytes, dtype and shape.

An array is `{b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [2, 3]}`, a numpy
number `{b"__npgeneric__": True, b"data": 1.5, b"dtype": "<f4"}`. Messages come from anyone who can
reach the server. Therefore `decode` unpickles nothing, accepts only numeric dtypes, and stops at
limits before a message that is built to be costly has used much time or memory.
"""

import math
from collections import Counter
from typing import Any

import msgpack
import numpy as np

MESSAGE_BYTES = 32 * 2**20  # default limit of a message
LIMITS = {"arrays": 32, "maps": 64, "lists": 128}  # per message; an array is a map with a list
ENTRIES = 4096  # of a map or list
AXES = 8  # of an array
_DTYPES = frozenset(
    order + kind
    for orders, kinds in (("|", "b1 i1 u1"), ("<>", "i2 i4 i8 u2 u4 u8 f2 f4 f8"))
    for order in orders
    for kind in kinds.split()
)


class ProtocolError(ValueError):
    """A message that does not follow the protocol or exceeds a limit."""


def encode(message: Any) -> bytes:
    """Packs maps, lists, texts, numbers, bytes and numeric numpy arrays as msgpack."""
    return msgpack.packb(message, default=_pack)


def decode(data: bytes, message_bytes: int = MESSAGE_BYTES) -> Any:
    """Unpacks what `encode` packed; arrays are read-only views of `data`.

    Raises:
        ProtocolError: the bytes are not msgpack, an array is malformed, or a limit is exceeded,
            such as `message_bytes` of the whole message.
    """
    if len(data) > message_bytes:
        raise ProtocolError(
            f"The message has {len(data)} bytes; at most {message_bytes} are accepted: send "
            "smaller pictures."
        )
    build = _Builder()
    try:
        return msgpack.unpackb(
            data,
            object_hook=build.map,
            list_hook=build.list,
            ext_hook=_refuse_extension,
            strict_map_key=False,  # openpi's keys are texts and bytes
            max_array_len=ENTRIES,
            max_map_len=ENTRIES,
        )
    except ProtocolError:
        raise
    except Exception as error:  # the parser raises about ten types, all because of the message
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise ProtocolError(f"The message is not a msgpack map as openpi's: {reason}.") from error


def _pack(value: Any) -> Any:
    if not isinstance(value, np.ndarray | np.generic) or value.dtype.str not in _DTYPES:
        kind = getattr(value, "dtype", type(value).__name__)
        raise TypeError(f"{kind} cannot be sent: arrays must be numeric.")
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    return {
        b"__ndarray__": True,
        b"data": value.tobytes(),
        b"dtype": value.dtype.str,
        b"shape": value.shape,
    }


def _refuse_extension(code: int, data: bytes) -> None:
    raise ProtocolError(f"The message has a msgpack extension of type {code}.")


class _Builder:
    """Builds arrays from maps, and counts while the message is being parsed."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def map(self, fields: dict) -> Any:
        self._count("maps")
        for mark, build in ((b"__ndarray__", _array), (b"__npgeneric__", _number)):
            if mark in fields:
                self._count("arrays")
                return build(fields)
        return fields

    def list(self, values: list) -> list:
        self._count("lists")
        return values

    def _count(self, what: str) -> None:
        self._counts[what] += 1
        if self._counts[what] > LIMITS[what]:
            raise ProtocolError(
                f"The message has more than {LIMITS[what]} {what}: send one observation at a time, "
                "its numbers as numpy arrays."
            )


def _array(fields: dict) -> np.ndarray:
    dtype, data, shape = _dtype(fields), fields.get(b"data"), fields.get(b"shape")
    sizes = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
    if not sizes or len(shape) > AXES or not isinstance(data, bytes):
        raise ProtocolError(
            f"An array lacks its bytes, or its shape is not a list of at most {AXES} sizes."
        )
    expected = math.prod(shape) * dtype.itemsize
    if expected != len(data):
        raise ProtocolError(
            f"An array has {len(data)} bytes, but its shape and dtype ({dtype}) need {expected}."
        )
    # An empty array's other sizes may overflow numpy's integers.
    if any(size > 2**31 for size in shape):
        raise ProtocolError("An empty array has a size beyond 2**31.")
    return np.frombuffer(data, dtype).reshape(shape) if data else np.zeros(shape, dtype)


def _number(fields: dict) -> np.generic:
    dtype, value = _dtype(fields), fields.get(b"data")
    if not isinstance(value, bool | int | float):
        raise ProtocolError(f"A numpy number holds a {type(value).__name__}.")
    return dtype.type(value)


def _dtype(fields: dict) -> np.dtype:
    name = fields.get(b"dtype")
    if not isinstance(name, str) or name not in _DTYPES:
        raise ProtocolError(
            f"An array has dtype {str(name)[:40]!r}; expected booleans, integers or real numbers, "
            "such as '|u1' and '<f4'."
        )
    return np.dtype(name)
