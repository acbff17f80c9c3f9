"""Opening published weights, whatever they come as."""

import json
from collections.abc import Iterable
from pathlib import Path

from mvjax.checkpoints.torch_weights.pt_reader import read_pt
from mvjax.checkpoints.torch_weights.safetensors_files import read_safetensors
from mvjax.checkpoints.torch_weights.tensors import Tensors, WeightsError

# What a folder may hold, the preferred first; Hugging Face often publishes the same weights twice.
_INDEXES = ("*.safetensors.index.json", "*.bin.index.json")
_IN_FOLDERS = (
    ("*.safetensors.index.json",),
    ("*.safetensors",),
    ("*.bin.index.json",),
    ("*pytorch_model.bin",),  # before the other .bin files, such as training_args.bin
    ("*.pt", "*.pth", "*.bin"),
)
_LEGACY_TORCH = bytes.fromhex("8a0a6cfc9c46f9206aa85019")  # its magic number, pickled
_HEAD = 512  # bytes that tell the kind of a file


def open_weights(path: Path) -> Tensors:
    """The tensors of a published checkpoint, none of them read yet.

    Args:
        path: a file of `torch.save` (.pt, .pth, .bin) or safetensors, known by its content; or a
            folder with one such file, or with shards and their index, as Hugging Face lays them
            out. Safetensors are preferred where a folder has both.

    Raises:
        WeightsError: says what was found instead, and what to do.
    """
    path = Path(path)
    if path.is_dir():
        tensors = _open_folder(path)
    elif path.exists():
        tensors = _open_file(path)
    else:
        raise WeightsError(f"{path} does not exist; give a weights file, or a folder of them.")
    if not tensors:
        raise WeightsError(f"{path} holds no tensors; give a file or folder with weights.")
    return tensors


def _open_file(path: Path) -> Tensors:
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if head[:4] == b"PK\3\4":
        return read_pt(path)
    if head[8:9] == b"{":  # after the header's length
        return read_safetensors(path)
    raise WeightsError(f"{path} {_what_else(head)}")


def _what_else(head: bytes) -> str:
    """What a file is that cannot be read, and what to do."""
    resave = "load it in PyTorch and torch.save its state_dict() again."
    if not head:
        return "is empty (0 bytes); download it again."
    if _LEGACY_TORCH in head:
        return f"is in the format of PyTorch before 1.6; {resave}"
    if head[257:262] == b"ustar":
        return f"is a tar archive; unpack it, or if PyTorch wrote it (before 1.0), {resave}"
    if head[:1] == b"\x80":
        return f"is a bare pickle, which may run code when loaded; if you trust it, {resave}"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer in place of the weights; run `git lfs pull` there."
    if head.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        return "is a web page; download it again, logged in and with the licence accepted."
    return "is neither a file of torch.save nor safetensors; give one of those."


def _open_folder(folder: Path) -> Tensors:
    for patterns in _IN_FOLDERS:
        found = sorted(p for pattern in patterns for p in folder.glob(pattern))
        if len(found) > 1:
            raise WeightsError(
                f"{folder} holds several weights files and no single index of them: "
                f"{_listed(found)}; give one of them."
            )
        if found:
            return _open_shards(found[0]) if patterns[0] in _INDEXES else _open_file(found[0])
    if (folder / ".metadata").exists():
        raise WeightsError(
            f"{folder} is a distributed checkpoint; turn it into one file with python -m "
            "torch.distributed.checkpoint.format_utils dcp_to_torch <folder> <file>."
        )
    inside = sorted(p for p in folder.iterdir() if p.is_dir())
    raise WeightsError(
        f"{folder} holds no weights file (*.safetensors, *.pt, *.pth, *.bin)"
        + (f"; give one of its folders: {_listed(inside)}." if inside else ".")
    )


def _open_shards(index: Path) -> Tensors:
    try:
        files: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
        shards = sorted(set(files.values()))
        outside = [shard for shard in shards if Path(shard).name != shard]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise WeightsError(
            f"{index} is no index of weights ({error}); download it again."
        ) from error
    if outside:
        raise WeightsError(f"{index} names files outside its folder: {', '.join(outside)}.")
    missing = [index.with_name(shard) for shard in shards if not index.with_name(shard).is_file()]
    if missing:
        raise WeightsError(
            f"{index.parent} lacks {_listed(missing)}, named in {index.name}; download the rest."
        )
    by_shard = {shard: _open_file(index.with_name(shard)) for shard in shards}
    absent = [name for name, shard in files.items() if name not in by_shard[shard]]
    if absent:
        raise WeightsError(
            f"{index} says that {absent[0]} is in {files[absent[0]]}, which lacks it"
            + (f" (and {len(absent) - 1} more)" if len(absent) > 1 else "")
            + "; download both again."
        )
    return {name: by_shard[shard][name] for name, shard in files.items()}


def _listed(paths: Iterable[Path]) -> str:
    names = [path.name for path in paths]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
