"""Which published tensor is which of our parameters, and how its axes lie.

A table of rules says everything about one network in one published layout; conversion in both
directions, and the check that nothing is missing, are the same code for all tables.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """How a PyTorch tensor's axes become ours.

    Attributes:
        permute: our axes in terms of the tensor's, after its unit axes are dropped; () keeps them.
        units: trailing axes of length one that only PyTorch has.
    """

    permute: tuple[int, ...] = ()
    units: int = 0

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """Our array, a view where possible."""
        array = tensor.reshape(self._without_units(tensor.shape))
        return array.transpose(self.permute) if self.permute else array

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        if self.permute:
            array = array.transpose(np.argsort(self.permute))
        return array.reshape(*array.shape, *(1,) * self.units)

    def ours_shape(self, tensor: Sequence[int]) -> tuple[int, ...]:
        """Our array's shape, from the tensor's."""
        shape = self._without_units(tuple(tensor))
        return tuple(shape[axis] for axis in self.permute) if self.permute else shape

    def torch_shape(self, ours: Sequence[int]) -> tuple[int, ...]:
        """The tensor's shape, from our array's."""
        order = np.argsort(self.permute) if self.permute else range(len(ours))
        return (*(ours[axis] for axis in order), *(1,) * self.units)

    def _without_units(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[: len(shape) - self.units]


SAME = Layout()
LINEAR = Layout((1, 0))  # [out, in] -> [in, out]
CONV2D = Layout((2, 3, 1, 0))  # [out, in, h, w] -> [h, w, in, out]
CONV3D = Layout((2, 3, 4, 1, 0))  # [out, in, t, h, w] -> [t, h, w, in, out]
GAMMA2D = Layout(units=2)  # [c, 1, 1] -> [c]
GAMMA3D = Layout(units=3)  # [c, 1, 1, 1] -> [c]


class Rule(NamedTuple):
    """One tensor; or one per block, stacked on our leading axis, where `torch` holds "{i}".

    Attributes:
        torch: the published name, e.g. "blocks.{i}.mlp.layer1.weight".
        ours: the dotted path in our tree, e.g. "blocks.mlp.layer1.kernel".
        layout: how the axes lie.
    """

    torch: str
    ours: str
    layout: Layout = SAME


Rules = list[Rule]
