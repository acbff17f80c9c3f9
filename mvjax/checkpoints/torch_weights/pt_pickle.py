"""The description of the tensors inside a PyTorch file, read without running it.

A pickle is a program for a small stack machine whose calls can reach any Python function, so
loading one from a stranger is running a stranger's code. Here no unpickler is used. The opcodes are
decoded by the standard library (`pickletools.genops`, which executes nothing) and carried out below
on dicts, lists, tuples and plain values. A name is only ever compared with the ones PyTorch writes
around tensors; nothing is imported, no attribute is set, and "calling" a name means one of the few
cases of `_call`. Any other name is an error.
"""

import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mvjax.checkpoints.torch_weights.dtypes import TYPE_NAMES
from mvjax.checkpoints.torch_weights.tensors import WeightsError


class StoredTensor(NamedTuple):
    """A strided view of a storage; offset and strides count elements, as PyTorch does."""

    storage: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Name:
    """Something the pickle refers to by name, e.g. "torch.FloatStorage"."""

    name: str


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
_KNOWN = _CALLS | _STORAGES.keys() | _DTYPES.keys()

_CONSTANTS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
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
        return _run(data)
    except WeightsError as error:
        raise WeightsError(f"{where} {error}") from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise WeightsError(
            f"{where} has a damaged description of its tensors (data.pkl: {error}); "
            "download it again."
        ) from error


def _run(data: bytes) -> Any:
    stack: list[Any] = []
    below_marks: list[list[Any]] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, below_marks.pop()
        return items

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
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case name if name in _CONSTANTS:
                stack.append(arg)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                items = since_mark()
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(last(int(opcode.name[-1]))))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                _extend(stack[-2], last(1))
            case "APPENDS":
                items = since_mark()
                _extend(stack[-1], items)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                _set(stack[-3], last(2))
            case "SETITEMS":
                items = since_mark()
                _set(stack[-1], items)
            case "EMPTY_SET":
                stack.append(_OPAQUE)
            case "ADDITEMS":
                since_mark()
            case "GLOBAL":
                stack.append(_named(arg.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                stack.append(_named(".".join(last(2))))
            case "INST":  # names and calls in one; PyTorch never writes it
                raise _refusal(arg.replace(" ", ".", 1))
            case "REDUCE" | "NEWOBJ":
                stack.append(_call(*last(2)))
            case "BUILD":  # attributes of an object, e.g. `_metadata` of a state_dict: not needed
                stack.pop()
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case name:
                raise ValueError(f"PyTorch does not write the pickle opcode {name}")
    raise ValueError("it has no end")


def _refusal(name: str) -> WeightsError:
    return WeightsError(
        f"would call {name}; a weights file must hold only tensors. If you trust where it comes "
        "from, load it in PyTorch and save its state_dict() again."
    )


def _named(name: str) -> _Name:
    name = name.replace("__builtin__.", "builtins.", 1)  # as protocol 2 spells it
    if name not in _KNOWN:
        raise _refusal(name)
    return _Name(name)


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)


def _set(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict):
        raise TypeError("entries are put into something that is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | float | bytes | None):
            raise TypeError("a dict has keys that are no names")
        target[key] = value


def _storage(reference: Any) -> _Storage:
    """A persistent id: ("storage", class, key, device, number of elements)."""
    kind, storage, key, _, _ = reference
    if kind != "storage" or not isinstance(storage, _Name) or not isinstance(key, str):
        raise ValueError("a storage is described in an unknown way")
    return _Storage(key, _STORAGES[storage.name])


def _call(function: Any, args: Any) -> Any:
    if not isinstance(function, _Name) or function.name not in _CALLS:
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
