"""Reading and writing safetensors: one file, or shards with an index as Hugging Face has them.

The safetensors library checks a file and tells names, shapes and types. The values are mapped into
memory here, because for NumPy the library copies them and lacks the 8-bit floats. Writing is ours:
the library's `save_file` takes all tensors at once, and a model of 30 GB need not be in memory.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from data_pipelines.atomic import replacing
from mvjax.weights.files import TYPE_NAMES, Tensors, TorchTensor, WeightsError, map_array, raw_bytes

_TYPES = {names.safetensors: dtype for dtype, names in TYPE_NAMES.items() if names.safetensors}


def read_safetensors(path: Path) -> Tensors:
    """The tensors of one safetensors file.

    Raises:
        WeightsError: the file is cut off or damaged, or holds a type that NumPy cannot.
    """
    tensors: Tensors = {}
    try:
        with path.open("rb") as head, safe_open(path, framework="np") as file:
            begin = 8 + int.from_bytes(head.read(8), "little")  # the values follow the header
            for name in file.offset_keys():  # in the order of the values, which leave no gap
                entry = file.get_slice(name)
                code, shape = entry.get_dtype(), tuple(entry.get_shape())
                if code not in _TYPES:
                    raise WeightsError(
                        f"{path} stores {name} as {code}, which is not read here; convert it in "
                        f"PyTorch to one of {', '.join(_TYPES)}."
                    )
                dtype = _TYPES[code]
                read = partial(map_array, path, begin, shape, dtype)
                tensors[name] = TorchTensor(shape, dtype, read)
                begin += tensors[name].nbytes
    except SafetensorError as error:
        raise WeightsError(
            f"{path} ({path.stat().st_size:,} bytes) is cut off or damaged ({error}); download it "
            "again."
        ) from error
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, TorchTensor]) -> None:
    """Writes one safetensors file, reading one tensor at a time.

    Args:
        path: appears when the file is whole; folders on the way are made.
        tensors: by name; stored widest type first, so that every one lies aligned.

    Raises:
        WeightsError: safetensors lacks a tensor's type, or its values are not what it declares.
        OSError: the disk is full or read-only; nothing is left behind.
    """
    header = _header(tensors)
    with replacing(path) as unfinished:
        _write(unfinished, header, tensors)


def write_safetensors_folder(
    folder: Path,
    tensors: Mapping[str, TorchTensor],
    *,
    stem: str = "diffusion_pytorch_model",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes `<stem>.safetensors`; or, if that were too large, shards and their index.

    The files appear together when all are whole, the index last. Those that an earlier call left
    under the same stem are then removed.

    Args:
        folder: made if need be.
        tensors: by name; shards take them in this order.
        stem: file name without ending: `diffusion_pytorch_model` for diffusers, `model` for
            transformers.
        max_shard_bytes: of values in one file; a single larger tensor gets a file of its own.

    Raises:
        WeightsError, OSError: as `write_safetensors`.
    """
    shards: list[dict[str, TorchTensor]] = [{}]
    for name, tensor in tensors.items():
        filled = sum(one.nbytes for one in shards[-1].values())
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    numbers = [f"-{i:05d}-of-{len(shards):05d}" for i in range(1, len(shards) + 1)]
    names = [f"{stem}{n if len(shards) > 1 else ''}.safetensors" for n in numbers]
    headers = [_header(shard) for shard in shards]
    index = folder / f"{stem}.safetensors.index.json"
    with ExitStack() as stack:  # leaves in the opposite order: the index takes its place last
        if len(shards) > 1:
            files = {name: file for file, shard in zip(names, shards) for name in shard}
            total = sum(tensor.nbytes for tensor in tensors.values())
            content = {"metadata": {"total_size": total}, "weight_map": files}
            text = json.dumps(content, indent=2, sort_keys=True) + "\n"
            stack.enter_context(replacing(index)).write_text(text)
        for name, header, shard in zip(names, headers, shards):
            _write(stack.enter_context(replacing(folder / name)), header, shard)
    written = {*names, index.name} if len(shards) > 1 else {*names}
    numbered = f"{stem}-{'[0-9]' * 5}-of-{'[0-9]' * 5}.safetensors"
    for earlier in (folder / f"{stem}.safetensors", index, *folder.glob(numbered)):
        if earlier.name not in written:
            earlier.unlink(missing_ok=True)


def _header(tensors: Mapping[str, TorchTensor]) -> bytes:
    # `transformers` refuses a file that does not say which library its tensors are for.
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, tensor in _widest_first(tensors):
        names = TYPE_NAMES.get(tensor.dtype)
        if names is None or names.safetensors is None:
            raise WeightsError(
                f"safetensors has no type for {name}, which is {tensor.dtype}; convert it first, "
                "e.g. to float32."
            )
        place = {"shape": list(tensor.shape), "data_offsets": [begin, begin + tensor.nbytes]}
        entries[name] = {"dtype": names.safetensors, **place}
        begin += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(path: Path, header: bytes, tensors: Mapping[str, TorchTensor]) -> None:
    with path.open("wb") as file:
        file.write(header)
        for name, tensor in _widest_first(tensors):
            file.write(raw_bytes(name, tensor))


def _widest_first(tensors: Mapping[str, TorchTensor]) -> list[tuple[str, TorchTensor]]:
    return sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
