"""Converting weights, one tensor at a time: published files into checkpoints of ours, and back.

conversion = prepare(open_source(path, hints))      # everything that does not fit is said here
write(conversion, directory)

export = prepare_export(directory, "diffusers")
write_export(export, destination)
"""

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax.traverse_util import unflatten_dict

from data_pipelines.atomic import replacing
from mvjax.models.layers import LoRA, merge_lora
from mvjax.models.network import Params
from mvjax.models.t5 import FILES as TOKENIZER_FILES
from mvjax.training.bridge import read_meta
from mvjax.training.checkpoint import check_match, leaf_paths, library_versions
from mvjax.weights.files import Tensors, TorchTensor, WeightsError
from mvjax.weights.kinds import KINDS, Config, Kind, with_adapters_config
from mvjax.weights.match import Parameter, check_shapes, collapse, match
from mvjax.weights.names import Layout, Rule, has_adapters, merge_adapters
from mvjax.weights.pt_files import write_pt
from mvjax.weights.safetensors_files import write_safetensors_folder
from mvjax.weights.source import Source
from mvjax.weights.streaming import ParameterReader, StreamedArray, write_streamed

_FLOATS = tuple(np.dtype(kind) for kind in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16))


@dataclass(frozen=True)
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


def prepare(
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
    kind, tensors, adapted = source.kind, source.tensors, has_adapters(source.tensors)
    merged = merge_adapters(tensors, alpha) if adapted else tensors
    config = kind.infer(source.layout, merged, source.hints)
    if adapted and lora == "keep":
        config = with_adapters_config(config, tensors, alpha)
    else:
        tensors = merged
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
        conversion: from `prepare`.
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


def _check_floats(parameters: Iterable[Parameter]) -> None:
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
        kept = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype or np.float32)
    else:
        kept = kinds.pop()
    rule = parameter.rule
    pieces = tuple(
        partial(_piece, name, tensor, rule.layout, kept)
        for name, tensor in zip(parameter.names, parameter.tensors)
    )
    blocks = (len(pieces),) if rule.stacked else ()
    return StreamedArray((*blocks, *parameter.shape), kept, pieces, rule.stacked)


def _piece(name: str, tensor: TorchTensor, layout: Layout, dtype: np.dtype) -> np.ndarray:
    array = tensor.read()
    if array.dtype == ml_dtypes.bfloat16:  # on the bits: NumPy's own test is ten times slower
        strange = np.count_nonzero((array.view(np.uint16) & 0x7F80) == 0x7F80)
    else:
        strange = array.size - np.count_nonzero(np.isfinite(array))
    if strange:
        raise WeightsError(
            f"{name} holds {strange} values that are not finite (NaN or infinity); take another "
            "checkpoint of that training."
        )
    return _contiguous(layout.to_ours(array)).astype(dtype, copy=False)


def _contiguous(array: np.ndarray) -> np.ndarray:
    """As `np.ascontiguousarray`; matrices are transposed strip by strip, seven times as fast."""
    if array.ndim != 2 or array.flags.c_contiguous:
        return np.ascontiguousarray(array)
    out = np.empty(array.shape, array.dtype)
    for start in range(0, array.shape[1], 16):  # 16 columns of bfloat16 fill half a cache line
        out[:, start : start + 16] = array[:, start : start + 16]
    return out


# --- From a checkpoint of ours to the files that PyTorch programs load ---


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


def prepare_export(directory: Path, target: str, *, lora: str = "merge", dtype: str = "") -> Export:
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
    read = partial(_read_merged, reader, stored, config) if lora == "merge" else reader.read
    if lora == "merge" and "lora" in config:
        config = {**config, "lora": {"rank": 0, "alpha": 0.0, "targets": []}}
    elif layout == "diffusers" and config.get("lora", {}).get("rank"):
        raise WeightsError("diffusers folders hold no adapters of ours; use --lora=merge.")
    prefix = "net." if layout in kind.prefixed else ""
    tensors = {
        prefix + name: tensor
        for rule in kind.rules(layout, config)
        for name, tensor in _tensors(rule, stored, read, dtype).items()
    }
    files = tuple(p for name in TOKENIZER_FILES if (p := directory / name).is_file())
    return Export(kind, layout, config, tensors, files)


def write_export(
    export: Export, destination: Path, wrote: Callable[[int], None] = lambda size: None
) -> None:
    """Writes a file, or a folder with its `config.json`; all of it or nothing.

    Args:
        export: from `prepare_export`.
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
    with replacing(destination) as folder:
        stem = "model" if export.kind.stage == "text" else "diffusion_pytorch_model"
        write_safetensors_folder(folder, tensors, stem=stem)
        described = json.dumps(export.kind.published(export.config), indent=2) + "\n"
        (folder / "config.json").write_text(described)
        for path in export.tokenizer_files:
            shutil.copyfile(path, folder / path.name)


def _counted(tensor: TorchTensor, wrote: Callable[[int], None]) -> TorchTensor:
    def read() -> np.ndarray:
        array = tensor.read()
        wrote(array.nbytes)
        return array

    return dataclasses.replace(tensor, read=read)


def _read_merged(
    reader: ParameterReader, stored: Mapping[str, Any], config: Config, path: str, block: int | None
) -> np.ndarray:
    """As `ParameterReader.read`, with adapters added to the kernels that have them."""
    array = reader.read(path, block)
    layer, _, leaf = path.rpartition("/")
    if leaf != "kernel" or f"{layer}/lora_a" not in stored:
        return array
    a, b = (reader.read(f"{layer}/{part}", block) for part in ("lora_a", "lora_b"))
    adapters = {"lora_a": a.astype(np.float32), "lora_b": b}
    lora = LoRA(config["lora"]["rank"], config["lora"]["alpha"], ())
    return merge_lora({"kernel": array, **adapters}, lora)["kernel"].astype(array.dtype)


def _tensors(rule: Rule, stored: Mapping[str, Any], read: Read, dtype: str) -> Tensors:
    path = rule.ours.replace(".", "/")
    shape, kept = stored[path].shape, stored[path].dtype
    kept = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype or kept)

    def read_tensor(block: int | None) -> np.ndarray:
        return _contiguous(rule.layout.to_torch(read(path, block)).astype(kept, copy=False))

    blocks = range(shape[0]) if rule.stacked else (None,)
    shape = rule.layout.torch_shape(shape[1:] if rule.stacked else shape)
    return {rule.name(i): TorchTensor(shape, kept, partial(read_tensor, i)) for i in blocks}


# --- What will be done, for the person who asked for it ---


_SHOWN = 8  # names of dropped entries
# Sections that a training run has; what is left describes its network.
_OF_A_RUN = {"recording", "evaluation", "study", "datasets", "sampler", "mesh", "rules"}
_OF_A_RUN |= {"optimizer", "training", "flow", "backbone"}


def describe_conversion(conversion: Conversion, destination: Path) -> str:
    """What is read and what is written."""
    source = conversion.source
    lines = [
        f"{source.path}: {source.kind.title} ({source.layout} names), "
        f"{conversion.num_parameters:,} parameters, {_count_tensors(source.tensors)}",
        *_settings(conversion.config),
        f"into {destination}: {conversion.nbytes / 1e9:.2f} GB",
    ]
    if source.dropped:
        names = collapse(source.dropped)
        more = f" and {len(names) - _SHOWN} other names" if len(names) > _SHOWN else ""
        lines.insert(2, f"not converted: {', '.join(names[:_SHOWN])}{more}")
    return "\n".join(lines)


def describe_export(export: Export, source: Path, destination: Path) -> str:
    """What is read and what is written."""
    size = sum(tensor.nbytes for tensor in export.tensors.values())
    written = f"{'folder' if export.folder else 'file'} {destination} ({export.layout} names)"
    counted = f"into the {written}: {_count_tensors(export.tensors)}, {size / 1e9:.2f} GB"
    return "\n".join([f"{source}: {export.kind.title}", *_settings(export.config), counted])


def _count_tensors(tensors: Tensors) -> str:
    kinds = Counter(str(tensor.dtype) for tensor in tensors.values())
    return f"{len(tensors)} tensors ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})"


def _settings(config: Config) -> list[str]:
    return [
        f"{section}: {', '.join(f'{name}={value}' for name, value in settings.items())}"
        for section, settings in config.items()
        if section != "lora" or settings["rank"]
        if isinstance(settings, dict) and section not in _OF_A_RUN
    ]
