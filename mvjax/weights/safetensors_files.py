"""Reading and writing safetensors: one file, or shards with an index as Hugging Face has them.

The safetensors library checks a file and tells names, shapes and types. The values are
memory-mapped here, because for NumPy the library copies them and lacks the 8-bit floats. Writing is
our own: the library's `save_file` needs all tensors in memory at once.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mvjax.weights.files import TYPE_NAMES, Tensors, TorchTensor, WeightsError, map_array, raw_bytes

_TYPES = {names.safetensors: dtype for dtype, names in TYPE_NAMES.items() if names.safetensors}


def read_safetensors(path: Path) -> Tensors:
    """Returns the tensors of one safetensors file.

    Raises:
        WeightsError: The file is cut off or damaged, or holds a type that NumPy cannot.
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
                read = partial(map_array, path, begin, shape, _TYPES[code])
                tensors[name] = TorchTensor(shape, _TYPES[code], read)
                begin += tensors[name].nbytes
    except SafetensorError as error:
        if "unknown variant" in str(error):  # of the types
            raise WeightsError(
                f"{path} holds a type that this version of safetensors does not know ({error}); "
                "upgrade it (pip install -U safetensors), or convert the tensor in PyTorch."
            ) from error
        size = f"{path.stat().st_size:,} bytes"
        raise WeightsError(
            f"{path} ({size}) is cut off or damaged ({error}); download it again."
        ) from error
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, TorchTensor]) -> None:
    """Writes one safetensors file, one tensor at a time; not atomically.

    Raises:
        WeightsError: safetensors lacks a tensor's type, or its values are not what it declares.
    """
    # The widest types come first, so that every tensor is aligned.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    # `transformers` refuses a file that does not say which library its tensors are for.
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, tensor in ordered:
        names = TYPE_NAMES.get(tensor.dtype)
        if names is None or names.safetensors is None:
            raise WeightsError(
                f"safetensors has no type for {name}, which is {tensor.dtype}; convert it first."
            )
        place = {"shape": list(tensor.shape), "data_offsets": [begin, begin + tensor.nbytes]}
        entries[name] = {"dtype": names.safetensors, **place}
        begin += tensor.nbytes
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, tensor in ordered:
            file.write(raw_bytes(name, tensor))


def write_safetensors_folder(
    folder: Path,
    tensors: Mapping[str, TorchTensor],
    *,
    stem: str = "diffusion_pytorch_model",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes `<stem>.safetensors`; or, if that were too large, shards and their index.

    Args:
        folder: Created if it does not exist; the caller replaces it as a whole (`atomic`).
        tensors: By name; shards are filled in this order.
        stem: `diffusion_pytorch_model` for diffusers, `model` for transformers.
        max_shard_bytes: Limit of the values in one file; a larger tensor gets a file of its own.

    Raises:
        WeightsError: As for `write_safetensors`.
    """
    shards: list[dict[str, TorchTensor]] = [{}]
    for name, tensor in tensors.items():
        filled = sum(one.nbytes for one in shards[-1].values())
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    if len(shards) == 1:
        write_safetensors(folder / f"{stem}.safetensors", tensors)
        return
    files: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard)
        files |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": files}
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    (folder / f"{stem}.safetensors.index.json").write_text(text)
