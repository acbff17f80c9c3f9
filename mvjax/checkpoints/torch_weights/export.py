"""From a checkpoint of ours to the files that PyTorch programs load, one tensor at a time."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mvjax.checkpoints.bridge import read_meta
from mvjax.checkpoints.reader import ParameterReader
from mvjax.checkpoints.torch_weights.convert import contiguous
from mvjax.checkpoints.torch_weights.kind import Config, Kind
from mvjax.checkpoints.torch_weights.pt_writer import write_pt
from mvjax.checkpoints.torch_weights.rules import Rule
from mvjax.checkpoints.torch_weights.safetensors_files import write_safetensors_folder
from mvjax.checkpoints.torch_weights.source import KINDS
from mvjax.checkpoints.torch_weights.tensors import Tensors, TorchTensor, WeightsError
from mvjax.checkpoints.tree_match import check_match, leaf_paths
from mvjax.models.text_tokenizer import FILES as TOKENIZER_FILES

Read = Callable[[str, int | None], np.ndarray]  # a parameter, or one block of a stacked one
TARGETS = ("diffusers", "nvidia", "mimic-video")


@dataclass(frozen=True)
class Export:
    """What an export will write.

    Attributes:
        kind: the network.
        layout: of the names.
        config: of the network, without adapters that are merged.
        tensors: under their published names.
        tokenizer_files: that belong to the network and are copied beside it.
    """

    kind: Kind
    layout: str
    config: Config
    tensors: Tensors
    tokenizer_files: tuple[Path, ...]

    @property
    def folder(self) -> bool:
        """Whether a folder of Hugging Face is written, rather than a file of PyTorch."""
        return self.layout == "diffusers"


def plan_export(directory: Path, target: str, *, lora: str = "merge", dtype: str = "") -> Export:
    """Works out an export; the arrays are read when they are written.

    Moving averages are taken where the run has them, as the policy does.

    Args:
        directory: a training directory, or a converted checkpoint.
        target: for whom, one of TARGETS.
        lora: "merge" adds adapters to the kernels, "keep" writes them as peft does.
        dtype: of the tensors; "" keeps that of the checkpoint.

    Raises:
        WeightsError: if that kind of network has no such layout.
        FileNotFoundError: if the directory has no checkpoint.
    """
    meta = read_meta(directory)
    kind = next((kind for kind in KINDS if kind.stage == meta["stage"]), None)
    if kind is None or target not in kind.exports:
        can = ", ".join(kind.exports) if kind else "nothing"
        raise WeightsError(
            f"{directory} holds a checkpoint of stage {meta['stage']!r}, which cannot be written "
            f"for {target}; possible is {can}."
        )
    layout, config = kind.exports[target], meta["config"]
    reader = ParameterReader(directory)
    stored = leaf_paths(reader.tree)
    check_match(stored, leaf_paths(kind.network(config).abstract), directory)
    read = _merging(reader, config) if lora == "merge" else reader.read
    if lora == "merge" and "lora" in config:
        config = {**config, "lora": {"rank": 0, "alpha": 0.0, "targets": []}}
    elif layout == "diffusers" and config.get("lora", {}).get("rank"):
        raise WeightsError("diffusers folders hold no adapters of ours; use --lora=merge.")
    prefix = "net." if layout in kind.prefixed else ""
    tensors = {}
    for rule in kind.rules(layout, config):
        for name, tensor in _tensors(rule, stored, read, dtype).items():
            tensors[prefix + name] = tensor
    files = tuple(p for name in TOKENIZER_FILES if (p := directory / name).is_file())
    return Export(kind, layout, config, tensors, files)


def write_export(
    export: Export, destination: Path, wrote: Callable[[int], None] = lambda size: None
) -> None:
    """Writes a file, or a folder with its `config.json`; all of it or nothing.

    Args:
        export: from `plan_export`.
        destination: the new file or folder.
        wrote: called with the number of bytes after every tensor.

    Raises:
        FileExistsError: if the destination exists.
        OSError: if it cannot be written.
    """
    empty = export.folder and destination.is_dir() and not any(destination.iterdir())
    if destination.exists() and not empty:
        raise FileExistsError(f"{destination} exists already; choose another name.")
    tensors = {name: _counted(tensor, wrote) for name, tensor in export.tensors.items()}
    if not export.folder:
        write_pt(destination, tensors)
        return
    partial_folder = destination.with_name(destination.name + ".partial")
    shutil.rmtree(partial_folder, ignore_errors=True)  # of a killed export
    try:
        partial_folder.mkdir(parents=True)
        stem = "model" if export.kind.stage == "text" else "diffusion_pytorch_model"
        write_safetensors_folder(partial_folder, tensors, stem=stem)
        described = json.dumps(export.kind.published(export.config), indent=2) + "\n"
        (partial_folder / "config.json").write_text(described)
        for path in export.tokenizer_files:
            shutil.copyfile(path, partial_folder / path.name)
        partial_folder.replace(destination)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def _counted(tensor: TorchTensor, wrote: Callable[[int], None]) -> TorchTensor:
    def read() -> np.ndarray:
        array = tensor.read()
        wrote(array.nbytes)
        return array

    return dataclasses.replace(tensor, read=read)


def _merging(reader: ParameterReader, config: Config) -> Read:
    """Reads parameters, with adapters added to the kernels that have them."""
    lora = config.get("lora", {})
    adapted = {path for path in leaf_paths(reader.tree) if path.endswith("/lora_a")}

    def read(path: str, block: int | None) -> np.ndarray:
        array = reader.read(path, block)
        layer, _, leaf = path.rpartition("/")
        if leaf == "kernel" and f"{layer}/lora_a" in adapted:
            a, b = (reader.read(f"{layer}/{part}", block) for part in ("lora_a", "lora_b"))
            scale = lora["alpha"] / lora["rank"]
            array = (array + scale * (a.astype(np.float32) @ b)).astype(array.dtype)
        return array

    return read


def _tensors(rule: Rule, leaves: Mapping[str, Any], read: Read, dtype: str) -> Tensors:
    path = rule.ours.replace(".", "/")
    stored = leaves[path]
    kept = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype or stored.dtype)
    stacked = "{i}" in rule.torch
    shape = rule.layout.torch_shape(stored.shape[1:] if stacked else stored.shape)

    def read_tensor(block: int | None) -> np.ndarray:
        return contiguous(rule.layout.to_torch(read(path, block)).astype(kept, copy=False))

    blocks = range(stored.shape[0]) if stacked else (None,)
    return {
        rule.torch.replace("{i}", str(i)): TorchTensor(shape, kept, partial(read_tensor, i))
        for i in blocks
    }
