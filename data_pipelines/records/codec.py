"""A record as bytes: a small JSON header followed by raw little-endian buffers.

No pickle, no schema files, and decoding copies nothing.
"""

import json
from collections.abc import Mapping

import ml_dtypes  # noqa: F401  (teaches numpy the name "bfloat16")
import numpy as np

_ALIGNMENT = 8


def encode_record(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Packs named numeric arrays into bytes: header length, JSON header, aligned buffers."""
    arrays = {key: np.asarray(value, order="C") for key, value in arrays.items()}
    for key, value in arrays.items():
        if value.dtype.hasobject or value.dtype.kind in "USM" or value.dtype.byteorder == ">":
            raise ValueError(
                f"Record entry {key!r} has dtype {value.dtype}; records hold little-endian numbers."
            )
    header = json.dumps([[k, v.dtype.name, v.shape] for k, v in arrays.items()]).encode()
    header += b" " * (-(4 + len(header)) % _ALIGNMENT)
    parts = [len(header).to_bytes(4, "little"), header]
    for value in arrays.values():
        parts += [value.tobytes(), bytes(-value.nbytes % _ALIGNMENT)]
    return b"".join(parts)


def decode_record(data: bytes) -> dict[str, np.ndarray]:
    """Unpacks `encode_record`; the arrays are read-only views of `data`."""
    start = 4 + int.from_bytes(data[:4], "little")
    arrays = {}
    for key, name, shape in json.loads(data[4:start]):
        dtype, count = np.dtype(name), int(np.prod(shape))
        arrays[key] = np.frombuffer(data, dtype, count, start).reshape(shape)
        start += -(-count * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    return arrays
