"""Tensors that lie in a file: known by name, shape and type, read one at a time."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np


class WeightsError(ValueError):
    """A weights file that cannot be read; the message says what was found and what to do."""


@dataclass(frozen=True)
class TorchTensor:
    """One tensor of a PyTorch checkpoint, not yet read.

    Attributes:
        shape: as PyTorch has it.
        dtype: its NumPy type; bfloat16 and the 8-bit floats are those of `ml_dtypes`.
        read: the values, C-contiguous and possibly read-only; memory-mapped where the file allows,
            so nothing is held before the call, nor after the array is let go.
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
        path: the file.
        offset: byte of the first element.
        shape, dtype: of the array.
        strides: in elements, 0 or more; None is row after row.
    """
    if 0 in shape:  # an empty range cannot be mapped
        return np.empty(shape, dtype)
    if strides is None:
        count, steps = math.prod(shape), None
    else:
        count = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))
        # The stride of an axis of length one is never used, and may be anything.
        steps = [stride * dtype.itemsize if size > 1 else 0 for size, stride in zip(shape, strides)]
    mapped = np.memmap(path, np.uint8, "r", offset, (count * dtype.itemsize,))
    array = np.ndarray(shape, dtype, mapped, strides=steps)
    if array.flags.c_contiguous and array.flags.aligned:
        return array
    return array.copy(order="C")


def raw_bytes(name: str, tensor: TorchTensor) -> np.ndarray:
    """Reads a tensor as flat bytes, ready to be written.

    Raises:
        WeightsError: what was read is not what the tensor declares.
    """
    array = tensor.read()
    if (array.shape, array.dtype) != (tensor.shape, tensor.dtype):
        raise WeightsError(
            f"The tensor {name} reads as {array.dtype}{array.shape}, but declares "
            f"{tensor.dtype}{tensor.shape}."
        )
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
