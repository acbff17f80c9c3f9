"""`tf.train.Example` messages, read from their bytes with numpy alone.

A message is a map from names to lists of bytes, float32 or int64 (tensorflow/core/example). Only
what is asked for is decoded: naming a list's place costs a few bytes' reading, whatever its size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf's wire types
_KINDS = {1: "bytes", 2: "float", 3: "int64"}  # field numbers of the message Feature

Span = tuple[int, int]


@dataclass(frozen=True)
class Values:
    """One list of a message.

    Attributes:
        data: the whole message.
        kind: "bytes", "float" or "int64".
        spans: where the list's messages are.
    """

    data: bytes
    kind: str
    spans: tuple[Span, ...]

    def items(self) -> list[Span]:
        """Where the single values are (bytes), or runs of values (numbers)."""
        return [span for place in self.spans for n, _, span in _fields(self.data, *place) if n == 1]

    def blobs(self) -> list[bytes]:
        """The values of a list of bytes."""
        return [self.data[start:stop] for start, stop in self.items()]

    def numbers(self) -> np.ndarray:
        """The values of a list of numbers: float32 or int64 [n].

        Raises:
            ValueError: if it is a list of bytes or damaged.
        """
        if self.kind == "bytes":
            raise ValueError("bytes are stored where numbers are expected")
        # Packed or not, the values lie in order.
        raw = b"".join(self.blobs())
        if self.kind == "float":
            return np.frombuffer(raw, "<f4").astype(np.float32)
        return _decode_varints(np.frombuffer(raw, np.uint8))


def parse_example(data: bytes) -> dict[str, Values]:
    """The lists of a message by name.

    Raises:
        ValueError: if these bytes are no such message.
    """
    found = {}
    for number, _, features in _fields(data, 0, len(data)):
        if number != 1:
            continue
        for _, _, entry in _fields(data, *features):
            parts = {n: span for n, _, span in _fields(data, *entry)}
            if 1 not in parts or 2 not in parts:  # a name with no list, as for optional values
                continue
            lists = [(n, span) for n, _, span in _fields(data, *parts[2]) if n in _KINDS]
            if lists:
                kind = lists[-1][0]
                spans = tuple(span for n, span in lists if n == kind)
                name = data[slice(*parts[1])].decode("utf-8")
                found[name] = Values(data, _KINDS[kind], spans)
    return found


def _fields(data: bytes, start: int, stop: int) -> Iterator[tuple[int, int, Span]]:
    """Field number, wire type and place of every field of a message."""
    at = start
    while at < stop:
        tag, at = _varint(data, at, stop)
        wire = tag & 7
        if wire == _BYTES:
            size, at = _varint(data, at, stop)
            end = at + size
        elif wire == _VARINT:
            _, end = _varint(data, at, stop)
        elif wire in (_FIXED32, _FIXED64):
            end = at + (4 if wire == _FIXED32 else 8)
        else:
            raise ValueError(f"no tf.train.Example: wire type {wire} at byte {at}")
        if end > stop:
            raise ValueError(f"no tf.train.Example: a field passes its end at byte {stop}")
        yield tag >> 3, wire, (at, end)
        at = end


def _varint(data: bytes, at: int, stop: int) -> tuple[int, int]:
    value = shift = 0
    while at < stop:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError(f"no tf.train.Example: it ends within a number at byte {stop}")


def _decode_varints(raw: np.ndarray) -> np.ndarray:
    """Integers of seven bits per byte, lowest first, the top bit set in all but the last byte."""
    ends = np.flatnonzero(raw < 0x80)
    starts = np.concatenate([[0], ends[:-1] + 1])[: len(ends)]
    sizes = ends - starts + 1
    if sizes.sum() != len(raw) or sizes.max(initial=0) > 10:
        raise ValueError("no tf.train.Example: it ends within a number")
    values = np.zeros(len(ends), np.uint64)
    for place in range(sizes.max(initial=0)):
        longer = sizes > place
        bits = (raw[starts[longer] + place] & 0x7F).astype(np.uint64)
        values[longer] |= bits << np.uint64(7 * place)
    return values.view(np.int64)
