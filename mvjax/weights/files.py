"""Tensors in a file: known by name, shape and type, and read one at a time."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np


class WeightsError(ValueError):
    """A weights file that cannot be read; the message says what was found and what to do."""


@dataclass(frozen=True)
class TorchTensor:
    """One tensor of a PyTorch checkpoint, not yet read.

    Attributes:
        shape: In PyTorch's order of axes.
        dtype: NumPy type; bfloat16 and the 8-bit floats are those of `ml_dtypes`.
        read: Returns the values, C-contiguous and possibly read-only. They are memory-mapped where
            the file allows it, so no memory is held before the call or after the array is freed.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


Tensors = dict[str, TorchTensor]


def map_array(
    path: Path,
    offset: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
    strides: tuple[int, ...] | None = None,
) -> np.ndarray:
    """Memory-maps an array, read-only; copies it only if it is not contiguous or not aligned.

    Args:
        offset: Byte of the first element.
        strides: In elements, 0 or more; None for C order.
    """
    if 0 in shape:  # an empty range cannot be mapped
        return np.empty(shape, dtype)
    count, steps = math.prod(shape), None
    if strides is not None:
        count = span(shape, strides)
        # The stride of an axis of length one is never used, and may be anything.
        steps = [stride * dtype.itemsize if size > 1 else 0 for size, stride in zip(shape, strides)]
    mapped = np.memmap(path, np.uint8, "r", offset, (count * dtype.itemsize,))
    array = np.ndarray(shape, dtype, mapped, strides=steps)
    if array.flags.c_contiguous and array.flags.aligned:
        return array
    return array.copy(order="C")


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Number of elements from the first to the last one of a view, both included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))


def raw_bytes(name: str, tensor: TorchTensor) -> np.ndarray:
    """Reads a tensor as flat bytes; raises WeightsError if they are not what it declares."""
    array = tensor.read()
    if (array.shape, array.dtype) != (tensor.shape, tensor.dtype):
        declared = f"{tensor.dtype}{tensor.shape}"
        raise WeightsError(f"{name} reads as {array.dtype}{array.shape}, but declares {declared}.")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


class TypeNames(NamedTuple):
    """The names of a NumPy type in the two formats."""

    torch: str
    storage: str | None  # types since PyTorch 2.1 have none: they are saved as untyped bytes
    safetensors: str | None


TYPE_NAMES = {
    np.dtype(kind): TypeNames(*names)
    for kind, *names in (
        (np.float64, "float64", "DoubleStorage", "F64"),
        (np.float32, "float32", "FloatStorage", "F32"),
        (np.float16, "float16", "HalfStorage", "F16"),
        (ml_dtypes.bfloat16, "bfloat16", "BFloat16Storage", "BF16"),
        (np.int64, "int64", "LongStorage", "I64"),
        (np.int32, "int32", "IntStorage", "I32"),
        (np.int16, "int16", "ShortStorage", "I16"),
        (np.int8, "int8", "CharStorage", "I8"),
        (np.uint8, "uint8", "ByteStorage", "U8"),
        (np.bool_, "bool", "BoolStorage", "BOOL"),
        (np.complex64, "complex64", "ComplexFloatStorage", "C64"),
        (np.complex128, "complex128", "ComplexDoubleStorage", None),
        (np.uint16, "uint16", None, "U16"),
        (np.uint32, "uint32", None, "U32"),
        (np.uint64, "uint64", None, "U64"),
        (ml_dtypes.float8_e4m3fn, "float8_e4m3fn", None, "F8_E4M3"),
        (ml_dtypes.float8_e5m2, "float8_e5m2", None, "F8_E5M2"),
        (ml_dtypes.float8_e4m3fnuz, "float8_e4m3fnuz", None, "F8_E4M3FNUZ"),
        (ml_dtypes.float8_e5m2fnuz, "float8_e5m2fnuz", None, "F8_E5M2FNUZ"),
        (ml_dtypes.float8_e8m0fnu, "float8_e8m0fnu", None, "F8_E8M0"),
    )
}
