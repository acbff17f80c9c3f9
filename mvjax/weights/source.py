"""Opening published weights, whatever they come as, and recognising whose they are."""

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mvjax.weights.files import Tensors, WeightsError
from mvjax.weights.kinds import KINDS, Hints, Kind
from mvjax.weights.match import collapse
from mvjax.weights.pt_files import read_pt
from mvjax.weights.safetensors_files import read_safetensors

# What a folder may hold, the preferred first; Hugging Face often publishes the same weights twice.
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
    if not path.exists():
        raise WeightsError(f"{path} does not exist; give a weights file, or a folder of them.")
    tensors = _open_folder(path) if path.is_dir() else _open_file(path)
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
    elif head.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        problem = "is a web page; download it again, logged in and with the licence accepted."
    else:
        problem = "is neither a file of torch.save nor safetensors; give one of those."
    raise WeightsError(f"{path} {problem}")


def _open_folder(folder: Path) -> Tensors:
    for patterns in _IN_FOLDERS:
        found = sorted(p for pattern in patterns for p in folder.glob(pattern))
        if len(found) > 1:
            raise WeightsError(
                f"{folder} holds several weights files and no single index of them: "
                f"{_listed(found)}; give one of them."
            )
        if found:
            (path,) = found
            return _open_shards(path) if path.name.endswith(".index.json") else _open_file(path)
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
            f"{index} says that {absent[0]} is in {files[absent[0]]}, which lacks it (of "
            f"{len(absent)} such names); download both again."
        )
    return {name: by_shard[shard][name] for name, shard in files.items()}


def _listed(paths: Iterable[Path]) -> str:
    names = [path.name for path in paths]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


_PREFIX, _EMA_PREFIX = "net.", "net_ema."
_WRAPPER = "_checkpoint_wrapped_module."  # activation checkpointing in PyTorch adds it to names


@dataclass(frozen=True)
class Source:
    """Recognised weights.

    Attributes:
        path: the file or folder.
        kind: the network.
        layout: how it is published, e.g. "nvidia" or "diffusers".
        tensors: its tensors, under the names of that layout without prefix.
        names: the same names -> those in the file.
        dropped: names of entries that are not converted.
        hints: what was said or found beside the tensors.
    """

    path: Path
    kind: Kind
    layout: str
    tensors: Tensors
    names: dict[str, str]
    dropped: list[str]
    hints: Hints


def open_source(path: Path, hints: Hints, *, ema: bool = False) -> Source:
    """Opens and recognises weights; nothing but names, shapes and types is read.

    Args:
        path: a file, or a folder of Hugging Face.
        hints: what a person said about them.
        ema: whether to take the moving average (`net_ema.*`) instead of `net.*`.

    Raises:
        WeightsError: if the path is no file of weights or of a network that is not known here.
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
    published = path / "config.json"
    if path.is_dir() and published.is_file():
        try:
            hints = dataclasses.replace(hints, published=json.loads(published.read_text()))
        except ValueError as error:
            raise WeightsError(
                f"{published} is damaged ({error}); copy or download it again."
            ) from error
    kept = {known: tensors[name] for known, name in names.items()}
    return Source(path, kind, layout, kept, names, unused, hints)


def _without_prefix(
    path: Path, tensors: Iterable[str], ema: bool
) -> tuple[dict[str, str], list[str]]:
    """Names below `net.` or `net_ema.` without it -> in the file; and the other names."""
    names = {name: name.replace(_WRAPPER, "") for name in tensors}
    prefixes = {p for p in (_PREFIX, _EMA_PREFIX) if any(n.startswith(p) for n in names.values())}
    if not prefixes and not ema:
        return {short: name for name, short in names.items()}, []
    wanted = _EMA_PREFIX if ema else _PREFIX
    if wanted not in prefixes:
        found = ", ".join(sorted(prefixes)) or "names without a prefix"
        raise WeightsError(
            f"{path} has no tensors below {wanted!r}, but {found}; "
            + ("leave --ema out." if ema else "give --ema to take the moving average.")
        )
    taken = {s.removeprefix(wanted): name for name, s in names.items() if s.startswith(wanted)}
    return taken, [name for name, short in names.items() if not short.startswith(wanted)]


def _recognise(path: Path, tensors: Iterable[str]) -> tuple[Kind, str]:
    for kind in KINDS:
        for layout, signature in kind.signatures.items():
            if any(re.search(signature, name) for name in tensors):
                return kind, layout
    shown = collapse(tensors)
    raise WeightsError(
        f"{path} holds none of the networks that are known here ("
        + ", ".join(kind.title for kind in KINDS)
        + f"); its tensors are {', '.join(shown[:5])}"
        + (f" and {len(shown) - 5} other names." if len(shown) > 5 else ".")
    )
