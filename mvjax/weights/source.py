"""Opening published weights of any format, and recognising which network they belong to."""

import dataclasses
import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.episode import reason
from mvjax.weights.files import Tensors, WeightsError
from mvjax.weights.kinds import KINDS, Hints, Kind
from mvjax.weights.match import collapse
from mvjax.weights.pt_files import read_pt
from mvjax.weights.safetensors_files import read_safetensors

# What a folder may hold, in order of preference; Hugging Face often publishes weights twice.
_IN_FOLDERS = (
    ("*.safetensors.index.json",),
    ("*.safetensors",),
    ("*.bin.index.json",),
    ("*pytorch_model.bin",),  # before the other .bin files, such as training_args.bin
    ("*.pt", "*.pth", "*.bin"),
)
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.")  # in the name of one file of several
_LEGACY_TORCH = bytes.fromhex("8a0a6cfc9c46f9206aa85019")  # its magic number, pickled


def open_weights(path: Path) -> Tensors:
    """Returns the tensors of a published checkpoint, none of them read yet.

    Raises WeightsError if there are none.

    Args:
        path: A file of `torch.save` (.pt, .pth, .bin) or safetensors, recognised by its content; or
            a folder with one such file, or with shards and an index, as in Hugging Face's layout.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"{path} does not exist; give a weights file, or a folder of them.")
    if not path.is_dir() and _is_one_of_several(path):
        raise WeightsError(
            f"{path} is one of several shards; give the folder that holds all of them and their "
            f"index: {path.parent}."
        )
    tensors = _open_folder(path) if path.is_dir() else _open_file(path)
    if not tensors:
        raise WeightsError(f"{path} holds no tensors; give a file or folder with weights.")
    return tensors


def _is_one_of_several(path: Path) -> bool:
    found = _SHARD.search(path.name)
    return bool(found) and int(found[2]) > 1


def _open_file(path: Path) -> Tensors:
    with path.open("rb") as file:
        head = file.read(512)
    if head[:4] == b"PK\3\4":
        return read_pt(path)
    if head[8:9] == b"{":  # after the header's length
        return read_safetensors(path)
    resave = "load it in PyTorch and torch.save its state_dict() again."
    if not head:
        problem = "is empty (0 bytes); download it again."
    elif _LEGACY_TORCH in head:
        problem = f"is in the format of PyTorch before 1.6; {resave}"
    elif head[257:262] == b"ustar":
        problem = f"is a tar archive; unpack it, or if PyTorch wrote it (before 1.0), {resave}"
    elif head[:1] == b"\x80":
        problem = f"is a bare pickle, which may run code when loaded; if you trust it, {resave}"
    elif head.startswith(b"version https://git-lfs"):
        problem = "is a Git LFS pointer in place of the weights; run `git lfs pull` there."
    elif head.lstrip()[:5].lower() in (b"<!doc", b"<html", b"<?xml"):
        problem = "is a web page; download it again, logged in and with the licence accepted."
    elif head[:2] == b"\x1f\x8b" or head[:4] == b"\x28\xb5\x2f\xfd":
        problem = "is compressed; unpack it."
    elif head[:4] == b"GGUF":
        problem = "is a GGUF file; take the weights that it was made from (safetensors or .pt)."
    elif not any(head):
        problem = "begins with zeros, like a download that did not finish; download it again."
    elif head.lstrip()[:1] == b"{":
        problem = "is JSON; give the weights file, or the folder that holds both."
    else:
        problem = "is neither a file of torch.save nor safetensors; give one of those."
    raise WeightsError(f"{path} {problem}")


def _open_folder(folder: Path) -> Tensors:
    for patterns in _IN_FOLDERS:
        found = sorted(p for pattern in patterns for p in folder.glob(pattern))
        if found and not found[0].name.endswith(".json") and _is_one_of_several(found[0]):
            missing = _SHARD.sub(".", found[0].name) + ".index.json"
            raise WeightsError(
                f"{folder} holds shards ({_listed(found)}) without their index {missing}; download "
                "the whole folder."
            )
        if len(found) > 1:
            raise WeightsError(
                f"{folder} holds several weights files without an index: {_listed(found)}; give "
                "one of them."
            )
        if found:
            (path,) = found
            return _open_shards(path) if path.name.endswith(".index.json") else _open_file(path)
    if (folder / ".metadata").exists():
        raise WeightsError(
            f"{folder} is a distributed checkpoint; turn it into one file with python -m "
            "torch.distributed.checkpoint.format_utils dcp_to_torch <folder> <file>."
        )
    if (folder / "_CHECKPOINT_METADATA").exists() or folder.name == "checkpoints":
        raise WeightsError(
            f"{folder} is inside a checkpoint of this project; give the training directory that "
            "holds the folder `checkpoints`, with --to to export it."
        )
    inside = sorted(p for p in folder.iterdir() if p.is_dir())
    hint = f"; give one of its folders: {_listed(inside)}." if inside else "."
    raise WeightsError(f"{folder} holds no weights file (*.safetensors, *.pt, *.pth, *.bin){hint}")


def _open_shards(index: Path) -> Tensors:
    try:
        files: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
        shards = sorted(set(files.values()))
        outside = [shard for shard in shards if Path(shard).name != shard]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise _damaged(index, error) from error
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
            f"{index} says that {absent[0]} is in {files[absent[0]]}, which lacks it (and "
            f"{len(absent) - 1} more); download both again."
        )
    return {name: by_shard[shard][name] for name, shard in files.items()}


def _damaged(path: Path, error: Exception) -> WeightsError:
    """Of a JSON file that cannot be read."""
    what = reason(path, f"lacks {error}" if isinstance(error, KeyError) else error)
    return WeightsError(f"{path} is damaged ({what}); download it again.")


def _listed(paths: list[Path]) -> str:
    more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
    return ", ".join(path.name for path in paths[:5]) + more


@dataclass(frozen=True)
class Source:
    """Recognised weights."""

    path: Path
    kind: Kind
    layout: str  # e.g. "nvidia" or "diffusers"
    tensors: Tensors  # under the names of that layout without prefix
    names: dict[str, str]  # the same names -> those in the file
    dropped: list[str]  # names of entries that are not converted
    hints: Hints  # given by the user or found beside the tensors


def open_source(path: Path, hints: Hints, *, ema: bool = False) -> Source:
    """Opens and recognises a file or folder of weights; reads only names, shapes and types.

    With `ema`, the moving average (`net_ema.*`) is taken instead of `net.*`.

    Raises:
        WeightsError: The path does not hold weights, or not those of a known network.
    """
    tensors = open_weights(path)
    below, unused = _without_prefix(path, tensors, ema)
    kind, layout = _recognise(path, below)
    names: dict[str, str] = {}
    for short, name in below.items():
        known = kind.aliases.get(short, short)
        if re.search(kind.dropped, short) or known in names:
            unused.append(name)
        else:
            names[known] = name
    published = (path if path.is_dir() else path.parent) / "config.json"
    if layout == "diffusers" and published.is_file():
        try:
            described = json.loads(published.read_text())
        except ValueError as error:
            raise _damaged(published, error) from error
        if not isinstance(described, dict):
            raise _damaged(published, ValueError("it holds no settings"))
        hints = dataclasses.replace(hints, published=described)
    kept = {known: tensors[name] for known, name in names.items()}
    return Source(path, kind, layout, kept, names, unused, hints)


def _without_prefix(
    path: Path, tensors: Iterable[str], ema: bool
) -> tuple[dict[str, str], list[str]]:
    """Returns names without `net.` or `net_ema.` -> those in the file; and all other names."""
    # PyTorch's activation checkpointing adds this word to names.
    names = {name: name.replace("_checkpoint_wrapped_module.", "") for name in tensors}
    prefixes = {p for p in ("net.", "net_ema.") if any(n.startswith(p) for n in names.values())}
    if not prefixes and not ema:
        return {short: name for name, short in names.items()}, []
    wanted = "net_ema." if ema else "net."
    if wanted not in prefixes:
        found = ", ".join(sorted(prefixes)) or "names without a prefix"
        todo = "leave --ema out." if ema else "give --ema to take the moving average."
        raise WeightsError(f"{path} has no tensors below {wanted!r}, but {found}; {todo}")
    taken = {s.removeprefix(wanted): name for name, s in names.items() if s.startswith(wanted)}
    return taken, [name for name, short in names.items() if not short.startswith(wanted)]


def _recognise(path: Path, tensors: Collection[str]) -> tuple[Kind, str]:
    adapters = [name for name in tensors if "lora_" in name]
    for kind in KINDS if len(adapters) < len(tensors) else ():  # else their layers may match
        for layout, signature in kind.signatures.items():
            if any(re.search(signature, name) for name in tensors):
                return kind, layout
    shown = collapse(tensors)
    if adapters:
        raise WeightsError(
            f"{path} holds LoRA adapters of layers called {', '.join(shown[:3])}, without the "
            "weights that they adapt; merge them in PyTorch, and convert the result."
        )
    more = f" and {len(shown) - 5} other names" if len(shown) > 5 else ""
    raise WeightsError(
        f"{path} holds no known network ({', '.join(kind.title for kind in KINDS)}); its tensors "
        f"are {', '.join(shown[:5])}{more}."
    )
