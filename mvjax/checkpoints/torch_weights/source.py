"""A file or folder of PyTorch weights, recognised by what it holds."""

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mvjax.checkpoints.torch_weights.kind import Hints, Kind
from mvjax.checkpoints.torch_weights.kind_action import ACTION
from mvjax.checkpoints.torch_weights.kind_text import TEXT
from mvjax.checkpoints.torch_weights.kind_vae import VAE
from mvjax.checkpoints.torch_weights.kind_video import VIDEO
from mvjax.checkpoints.torch_weights.match import collapse
from mvjax.checkpoints.torch_weights.open import open_weights
from mvjax.checkpoints.torch_weights.tensors import Tensors, WeightsError

KINDS = (ACTION, VIDEO, VAE, TEXT)
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
    kept = {known: tensors[name] for known, name in names.items()}
    published = path / "config.json"
    if path.is_dir() and published.is_file():
        hints = dataclasses.replace(hints, published=_read_config(published))
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


def _read_config(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise WeightsError(f"{path} is damaged ({error}); copy or download it again.") from error
