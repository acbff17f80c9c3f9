"""The description of the tensors inside a PyTorch file, read without running it.

The pickle in the file is carried out by `mvjax.inert_pickle`, which knows no way to import or call
anything. Here is what PyTorch's own names stand for: "calling" one means one of the few cases of
`_call`, and any name but the ones PyTorch writes around tensors is an error.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mvjax.checkpoints.torch_weights.dtypes import TYPE_NAMES
from mvjax.checkpoints.torch_weights.tensors import WeightsError
from mvjax.inert_pickle import Dialect, Name, describe_pickle


class StoredTensor(NamedTuple):
    """A strided view of a storage; offset and strides count elements, as PyTorch does."""

    storage: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype | None  # None: untyped bytes, the tensor says the type


class _Opaque:
    """A value that is no tensor and is never looked into: an optimizer's device, a byte blob."""


_OPAQUE = _Opaque()

_STORAGES: dict[str, np.dtype | None] = {
    f"torch.{names.storage}": dtype for dtype, names in TYPE_NAMES.items() if names.storage
} | {"torch.storage.UntypedStorage": None, "torch.storage.TypedStorage": None}
_DTYPES = {f"torch.{names.torch}": dtype for dtype, names in TYPE_NAMES.items()}

# Calls that give a tensor, an ordered dict, or (the last lines) something `_Opaque`.
# `_io.BytesIO` is what Transformer Engine leaves in releases as `_extra_state`; protocol 2 writes
# bytes as `_codecs.encode`; the NumPy names are scalars such as a best loss.
_CALLS = {
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "collections.OrderedDict",
    *("_io.BytesIO", "_codecs.encode", "builtins.bytearray", "builtins.set", "builtins.complex"),
    *("torch.Size", "torch.device"),
    *("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
}
_NAMES = {name: name for name in _CALLS | _STORAGES.keys() | _DTYPES.keys()}
_NAMES |= {  # as protocol 2 spells them
    name.replace("builtins.", "__builtin__."): name for name in _CALLS if "builtins." in name
}
_LARGEST = 2**63  # of a PyTorch size or stride


def read_pickle(data: bytes, where: Path) -> Any:
    """What a pickle describes: dicts, lists, tuples, plain values, and `StoredTensor`s.

    Args:
        data: the pickle, protocol 2 to 5.
        where: the file, for messages.

    Raises:
        WeightsError: it refers to anything but tensors and plain values, or is damaged.
    """
    try:
        return describe_pickle(data, _PYTORCH)
    except WeightsError as error:
        raise WeightsError(f"{where} {error}") from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise WeightsError(
            f"{where} has a damaged description of its tensors (data.pkl: {error}); "
            "download it again."
        ) from error


def _refusal(name: str) -> WeightsError:
    return WeightsError(
        f"would call {name.replace('__builtin__.', 'builtins.', 1)}; a weights file must hold only "
        "tensors. If you trust where it comes from, load it in PyTorch and save its state_dict() "
        "again."
    )


def _storage(reference: Any) -> _Storage:
    """A persistent id: ("storage", class, key, device, number of elements)."""
    kind, storage, key, _, _ = reference
    if kind != "storage" or not isinstance(storage, Name) or not isinstance(key, str):
        raise ValueError("a storage is described in an unknown way")
    return _Storage(key, _STORAGES[storage.name])


def _call(function: Any, args: Any) -> Any:
    if not isinstance(function, Name) or function.name not in _CALLS:
        raise ValueError("something is called that is no function")
    match function.name.removeprefix("torch._utils."), args:
        case "_rebuild_tensor", (storage, offset, shape, strides):
            return _tensor(storage, offset, shape, strides)
        case "_rebuild_tensor_v2", (storage, offset, shape, strides, _, _, *metadata):
            return _tensor(storage, offset, shape, strides, metadata=metadata)
        case "_rebuild_tensor_v3", (storage, offset, shape, strides, _, _, dtype, *metadata):
            return _tensor(storage, offset, shape, strides, _DTYPES[dtype.name], metadata)
        case "_rebuild_parameter" | "_rebuild_parameter_with_state", (StoredTensor() as data, *_):
            return data
        case "collections.OrderedDict", ():
            return {}
        case name, _ if name == function.name and name != "collections.OrderedDict":
            return _OPAQUE
    raise ValueError(f"{function.name} has unknown arguments")


def _tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    dtype: np.dtype | None = None,
    metadata: Any = (),
) -> StoredTensor:
    dtype = dtype or storage.dtype
    numbers = (offset, *shape, *strides)
    if dtype is None or not all(type(n) is int and 0 <= n < _LARGEST for n in numbers):
        raise ValueError("a tensor has no type, or sizes that are no sizes")
    if len(shape) != len(strides):
        raise ValueError("a tensor has more sizes than strides, or fewer")
    if any(metadata):
        raise WeightsError(
            "holds a conjugated or negated view of a tensor; save a clone() of it instead."
        )
    return StoredTensor(storage.key, dtype, offset, tuple(shape), tuple(strides))


_PYTORCH = Dialect(
    names=_NAMES,
    effects={
        "REDUCE": _call,
        "NEWOBJ": _call,
        "BINPERSID": _storage,
        # Attributes of an object, e.g. `_metadata` of a state_dict: not needed.
        "BUILD": lambda target, state: target,
        "EMPTY_SET": lambda: _OPAQUE,
        "ADDITEMS": lambda target, items: target,
    },
    refusal=_refusal,
    unwritten="PyTorch does not write the pickle opcode",
)
