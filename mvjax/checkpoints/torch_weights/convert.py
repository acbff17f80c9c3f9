"""From published weights to a checkpoint of ours, one tensor at a time."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax.traverse_util import unflatten_dict

from mvjax.checkpoints.streamed import StreamedArray, write_streamed
from mvjax.checkpoints.torch_weights.kind import Config
from mvjax.checkpoints.torch_weights.kind_video import with_adapters_config
from mvjax.checkpoints.torch_weights.match import Parameter, check_shapes, match
from mvjax.checkpoints.torch_weights.peft import has_adapters, merge_adapters
from mvjax.checkpoints.torch_weights.rules import Layout
from mvjax.checkpoints.torch_weights.source import Source
from mvjax.checkpoints.torch_weights.tensors import Tensors, TorchTensor, WeightsError
from mvjax.checkpoints.versions import library_versions
from mvjax.models.param_tree import Params
from mvjax.models.text_tokenizer import FILES as TOKENIZER_FILES

_FLOATS = tuple(np.dtype(kind) for kind in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16))


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What converting will write.

    Attributes:
        source: the weights.
        tensors: those of the source, or with adapters merged into them.
        config: the sections of a configuration that the weights decide.
        params: our parameters, as `StreamedArray`s.
        num_parameters: how many.
        nbytes: their size.
    """

    source: Source
    tensors: Tensors
    config: Config
    params: Params
    num_parameters: int
    nbytes: int


def plan(
    source: Source, *, lora: str = "merge", alpha: float = 32.0, dtype: str = ""
) -> Conversion:
    """Works out a conversion from names and shapes; nothing is read but the file's directory.

    Args:
        source: the weights.
        lora: "merge" adds adapters to the kernels; "keep" keeps them beside.
        alpha: of the adapters.
        dtype: of the parameters written; "" keeps that of the file.

    Raises:
        WeightsError: names every tensor that is missing, unknown or of a wrong shape or type.
    """
    kind, tensors, config = source.kind, source.tensors, None
    if has_adapters(tensors):
        merged = merge_adapters(tensors, alpha)
        config = kind.infer(source.layout, merged, source.hints)
        if lora == "keep":
            config = with_adapters_config(config, tensors, alpha)
        else:
            tensors = merged
    config = config or kind.infer(source.layout, tensors, source.hints)
    found = match(tensors, kind.rules(source.layout, config))
    network = kind.network(config)
    check_shapes(found, network.abstract)
    _check_floats(found.parameters.values())
    arrays = {path: _streamed(parameter, dtype) for path, parameter in found.parameters.items()}
    return Conversion(
        source,
        tensors,
        config,
        params=unflatten_dict(arrays, sep="."),
        num_parameters=network.num_parameters,
        nbytes=sum(array.nbytes for array in arrays.values()),
    )


def write(
    conversion: Conversion, directory: Path, wrote: Callable[[int], None] = lambda size: None
) -> None:
    """Writes the checkpoint, all of it or nothing.

    Args:
        conversion: from `plan`.
        directory: the new training directory.
        wrote: called with the number of bytes after every tensor.

    Raises:
        WeightsError: if a tensor holds values that are not finite.
        FileExistsError, OSError: see `write_streamed`.
    """
    source = conversion.source
    meta: dict[str, Any] = {
        "stage": source.kind.stage,
        "config": conversion.config,
        "converted": {
            "from": source.path.name,
            "layout": source.layout,
            "tensors": len(source.tensors),
            "dropped": len(source.dropped),
        },
        "versions": library_versions(),
    }
    write_streamed(directory, conversion.params, json.loads(json.dumps(meta)), wrote)
    for name in TOKENIZER_FILES:
        if source.path.is_dir() and (source.path / name).is_file():
            shutil.copyfile(source.path / name, directory / name)


def _check_floats(parameters) -> None:
    strange = [
        f"{name} is {tensor.dtype}"
        for parameter in parameters
        for name, tensor in zip(parameter.names, parameter.tensors)
        if tensor.dtype not in _FLOATS
    ]
    if strange:
        raise WeightsError(
            f"weights must be float32, float16 or bfloat16, but {', '.join(strange)}; quantised "
            "weights cannot be converted."
        )


def _streamed(parameter: Parameter, dtype: str) -> StreamedArray:
    kinds = {tensor.dtype for tensor in parameter.tensors}
    if dtype or len(kinds) > 1 or kinds == {np.dtype(np.float64)}:
        kept = np.dtype(getattr(ml_dtypes, dtype) if dtype == "bfloat16" else dtype or np.float32)
    else:
        kept = kinds.pop()
    layout = parameter.rule.layout
    pieces = tuple(
        partial(_piece, name, tensor, layout, kept)
        for name, tensor in zip(parameter.names, parameter.tensors)
    )
    blocks = (len(pieces),) if parameter.stacked else ()
    return StreamedArray((*blocks, *parameter.shape), kept, pieces, parameter.stacked)


def _piece(name: str, tensor: TorchTensor, layout: Layout, dtype: np.dtype) -> np.ndarray:
    array = tensor.read()
    if count := _not_finite(array):
        raise WeightsError(
            f"{name} holds {count} values that are not finite (NaN or infinity); take another "
            "checkpoint of that training."
        )
    return contiguous(layout.to_ours(array)).astype(dtype, copy=False)


def _not_finite(array: np.ndarray) -> int:
    if array.dtype == ml_dtypes.bfloat16:  # on the bits: NumPy's own test is ten times slower
        return int(np.count_nonzero((array.view(np.uint16) & 0x7F80) == 0x7F80))
    return int(array.size - np.count_nonzero(np.isfinite(array)))


def contiguous(array: np.ndarray) -> np.ndarray:
    """As `np.ascontiguousarray`; matrices are transposed strip by strip, seven times as fast."""
    if array.ndim != 2 or array.flags.c_contiguous:
        return np.ascontiguousarray(array)
    out = np.empty(array.shape, array.dtype)
    for start in range(0, array.shape[1], 16):  # 16 columns of bfloat16 fill half a cache line
        out[:, start : start + 16] = array[:, start : start + 16]
    return out
