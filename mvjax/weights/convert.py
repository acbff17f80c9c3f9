"""Converting weights one tensor at a time: published files into checkpoints, and back.

conversion = prepare(open_source(path, hints))      # raises if anything does not fit
write(conversion, directory)

export = prepare_export(directory, "diffusers")
write_export(export, destination)
"""

import dataclasses
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax.traverse_util import unflatten_dict

from data_pipelines.atomic import replacing
from data_pipelines.episode import reason
from data_pipelines.normalize import VECTORS, Normalizer
from mvjax.models.lora import LoRA, merge_lora
from mvjax.models.network import Params
from mvjax.models.t5 import FILES as TOKENIZER_FILES
from mvjax.training.checkpoint import check_match, leaf_paths, library_versions
from mvjax.training.directory import find_checkpoint, read_meta
from mvjax.weights.files import Tensors, TorchTensor, WeightsError
from mvjax.weights.kinds import (
    ACTION,
    KINDS,
    NO_LORA,
    TEXT,
    VIDEO,
    Config,
    Kind,
    with_adapters_config,
)
from mvjax.weights.match import Parameter, check_shapes, collapse, match
from mvjax.weights.names import Layout, Rule, has_adapters, merge_adapters
from mvjax.weights.pt_files import write_pt
from mvjax.weights.safetensors_files import write_safetensors_folder
from mvjax.weights.source import Source
from mvjax.weights.streaming import ParameterReader, StreamedArray, write_streamed

log = logging.getLogger(__name__)

_LARGE = 4096  # values; smaller tensors, such as biases, may well be zero
_FLOATS = tuple(np.dtype(kind) for kind in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16))


@dataclass(frozen=True)
class Conversion:
    """A conversion that is ready to be written."""

    source: Source
    tensors: Tensors  # those of the source, or with adapters merged into them
    config: Config  # the sections of a configuration that the weights determine
    params: Params  # `StreamedArray`s
    num_parameters: int
    nbytes: int
    zeros: list[str]  # filled while they are written: large tensors without a value


def prepare(
    source: Source, *, lora: str = "merge", alpha: float = 32.0, dtype: str = ""
) -> Conversion:
    """Determines the configuration and parameters from names and shapes; reads no values.

    Args:
        source: The weights.
        lora: "merge" adds adapters to the kernels; "keep" keeps them as parameters.
        alpha: LoRA alpha of the adapters.
        dtype: Type of the written parameters; "" keeps that of the file.

    Raises:
        WeightsError: Lists every tensor that is missing, unknown or of a wrong shape or type.
    """
    kind, tensors, adapted = source.kind, source.tensors, has_adapters(source.tensors)
    if adapted and not 0 < alpha < np.inf:
        raise WeightsError(f"its adapters are scaled by --lora_alpha, above 0; got {alpha:g}.")
    merged = merge_adapters(tensors, alpha) if adapted else tensors
    config = kind.infer(source.layout, merged, source.hints)
    if adapted and lora == "keep":
        config = with_adapters_config(config, tensors, alpha)
    else:
        tensors = merged
    found = match(tensors, kind.rules(source.layout, config))
    network = kind.network(config)
    check_shapes(found, network.abstract)
    unusable = [
        f"{name} is {tensor.dtype}"
        for parameter in found.parameters.values()
        for name, tensor in zip(parameter.names, parameter.tensors)
        if tensor.dtype not in _FLOATS
    ]
    if unusable:
        raise WeightsError(
            f"weights must be float32, float16 or bfloat16, but {', '.join(unusable)}; quantised "
            "weights cannot be converted."
        )
    zeros: list[str] = []
    arrays = {path: _streamed(p, dtype, zeros) for path, p in found.parameters.items()}
    params, nbytes = unflatten_dict(arrays, sep="."), sum(a.nbytes for a in arrays.values())
    return Conversion(source, tensors, config, params, network.num_parameters, nbytes, zeros)


def write(
    conversion: Conversion, directory: Path, wrote: Callable[[int], None] = lambda size: None
) -> None:
    """Writes a new training directory, and calls `wrote` with the bytes of every tensor written.

    Raises:
        WeightsError: A tensor holds values that are not finite.
        FileExistsError, OSError: See `write_streamed`.
    """
    source = conversion.source
    folder = source.path if source.path.is_dir() else source.path.parent
    files = [folder / name for name in TOKENIZER_FILES] if source.kind is TEXT else []
    tokenizer_files = [path for path in files if path.is_file()]
    for path in tokenizer_files:
        if "Git LFS" in (why := reason(path, "")):
            raise WeightsError(f"{path}: {why}.")
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
    for path in tokenizer_files:
        shutil.copyfile(path, directory / path.name)
    if conversion.zeros:
        log.warning(
            "%d large tensors of %s hold only zeros (%s): unless that is intended, the download "
            "did not finish; compare the file's checksum.",
            len(conversion.zeros),
            source.path,
            ", ".join(collapse(conversion.zeros)[:5]),
        )


def give_statistics(normalizer: Normalizer, directory: Path) -> None:
    """Writes released statistics beside the converted decoder that they belong to.

    The file names the decoder by its digest, so that it fits no other.

    Raises:
        WeightsError: the decoder has other vectors, or the directory holds no converted decoder.
        FileExistsError: it has statistics already.
    """
    try:
        decoder = find_checkpoint(directory)
    except FileNotFoundError as error:
        raise WeightsError(
            f"statistics belong to a decoder, and {directory} holds none: convert it first."
        ) from error
    if decoder.meta["stage"] != ACTION.stage or "converted" not in decoder.meta:
        raise WeightsError(
            f"{directory} holds a checkpoint of stage {decoder.meta['stage']!r} that was "
            f"{'converted' if 'converted' in decoder.meta else 'trained here'}; released "
            "statistics belong to a converted action decoder."
        )
    for key, section in VECTORS.items():
        io = decoder.meta["config"]["policy_io"][section]
        shape = np.shape(normalizer.statistics[key]["mean"])
        if shape != (io["horizon"], io["dim"]):
            raise WeightsError(
                f"these statistics are of another robot or another length: their {key} are "
                f"{list(shape)} (steps, numbers), those of the decoder in {directory} "
                f"{[io['horizon'], io['dim']]}."
            )
    path = directory / "normalizer.json"
    if path.exists():
        raise FileExistsError(
            f"{path} exists already. To give the decoder other statistics, remove the file first."
        )
    dataclasses.replace(normalizer, decoder=decoder.identity["digest"]).save(path)


def _streamed(parameter: Parameter, dtype: str, zeros: list[str]) -> StreamedArray:
    kinds = {tensor.dtype for tensor in parameter.tensors}
    if not dtype and (len(kinds) > 1 or kinds == {np.dtype(np.float64)}):
        dtype = "float32"
    kept = np.dtype(dtype) if dtype else kinds.pop()  # ml_dtypes has registered "bfloat16"
    rule = parameter.rule
    pieces = tuple(
        partial(_piece, name, tensor, rule.layout, kept, zeros)
        for name, tensor in zip(parameter.names, parameter.tensors)
    )
    blocks = (len(pieces),) if rule.stacked else ()
    return StreamedArray((*blocks, *parameter.shape), kept, pieces, rule.stacked)


def _piece(
    name: str, tensor: TorchTensor, layout: Layout, dtype: np.dtype, zeros: list[str]
) -> np.ndarray:
    array = tensor.read()
    if array.dtype == ml_dtypes.bfloat16:  # on the bits: NumPy's own test is ten times slower
        bad = np.count_nonzero((array.view(np.uint16) & 0x7F80) == 0x7F80)
    else:
        bad = array.size - np.count_nonzero(np.isfinite(array))
    if bad:
        raise WeightsError(
            f"{name} holds {bad} values that are not finite (NaN or infinity): compare the file's "
            "checksum, or take another checkpoint of that training."
        )
    if array.size > _LARGE and not array.reshape(-1)[:: array.size // _LARGE].any():
        if not array.any():
            zeros.append(name)
    return _contiguous(layout.to_ours(array)).astype(dtype, copy=False)


def _contiguous(array: np.ndarray) -> np.ndarray:
    """As `np.ascontiguousarray`; matrices are transposed strip by strip, seven times as fast."""
    if array.ndim != 2 or array.flags.c_contiguous:
        return np.ascontiguousarray(array)
    out = np.empty(array.shape, array.dtype)
    for start in range(0, array.shape[1], 16):  # 16 columns of bfloat16 fill half a cache line
        out[:, start : start + 16] = array[:, start : start + 16]
    return out


# --- From a checkpoint of this project to the files that PyTorch programs load ---


TARGETS = ("diffusers", "nvidia", "mimic-video")
JOINT_FILES = {VIDEO.stage: "video_dit.pt", ACTION.stage: "action_decoder.pt"}


@dataclass(frozen=True)
class Export:
    """An export that is ready to be written."""

    kind: Kind
    layout: str  # of the names; "diffusers" is a folder, any other one file
    config: Config  # of the network, without adapters that are merged
    tensors: Tensors  # under their published names
    tokenizer_files: tuple[Path, ...]  # copied into the folder


def prepare_exports(
    directory: Path, destination: Path, target: str, **options: str
) -> dict[Path, Export]:
    """What to write for a checkpoint, by where: at `destination`, or in it what a joint run holds.

    Of a joint run "mimic-video" has both networks, as `JOINT_FILES`; the other targets have no
    decoders, and are given the video DiT alone. Arguments and errors as of `prepare_export`.
    """
    if read_meta(directory)["stage"] != "joint":
        return {destination: prepare_export(directory, target, **options)}
    if target == "mimic-video":
        return {
            destination / name: prepare_export(directory, target, stage=stage, **options)
            for stage, name in JOINT_FILES.items()
        }
    log.warning("%s has no layout for action decoders: only the video DiT is written.", target)
    return {destination: prepare_export(directory, target, stage=VIDEO.stage, **options)}


def prepare_export(
    directory: Path, target: str, *, stage: str = "", lora: str = "merge", dtype: str = ""
) -> Export:
    """Determines what to write for a checkpoint; the arrays are read while they are written.

    Moving averages are taken where the run has them, as in the policy.

    Args:
        directory: A training directory or converted checkpoint.
        target: One of TARGETS.
        stage: Of a joint run, the stage that trains the network alone: "video" or "action".
        lora: "merge" adds adapters to the kernels, "keep" writes them as peft does.
        dtype: Type of the tensors; "" keeps that of the checkpoint.

    Raises:
        WeightsError: That kind of network has no such layout, or does not compute as published.
        FileNotFoundError: The directory has no checkpoint.
    """
    found = find_checkpoint(directory)
    meta, stage = found.meta, stage or found.meta["stage"]
    kind = next((kind for kind in KINDS if kind.stage == stage), None)
    if kind is None or target not in kind.exports:
        raise WeightsError(
            f"{directory} holds a checkpoint of stage {stage!r}, which cannot be written "
            f"for {target}; possible is {', '.join(kind.exports) if kind else 'nothing'}."
        )
    layout, config = kind.exports[target], meta["config"]
    if unlike := _unpublished(config):
        raise WeightsError(
            f"{directory} was trained with {unlike}, for which the published {kind.title} has no "
            f"place: it cannot be written for {target}."
        )
    reader = ParameterReader(directory, found.network(stage).part)
    stored = leaf_paths(reader.tree)
    check_match(stored, leaf_paths(kind.network(config).abstract), directory)
    read = partial(_read_merged, reader, stored, config) if lora == "merge" else reader.read
    if lora == "merge" and "lora" in config:
        config = {**config, "lora": NO_LORA}
    elif layout == "diffusers" and config.get("lora", {}).get("rank"):
        raise WeightsError("diffusers folders cannot hold these adapters; use --lora=merge.")
    prefix = "net." if layout in kind.prefixed else ""
    tensors = {
        prefix + name: tensor
        for rule in kind.rules(layout, config)
        for name, tensor in _tensors(rule, stored, read, dtype)
    }
    files = tuple(p for name in TOKENIZER_FILES if (p := directory / name).is_file())
    return Export(kind, layout, config, tensors, files)


def _unpublished(config: Mapping[str, Any]) -> str:
    """What a network was trained with that its tensors do not say and other programs do not do."""
    if views := sorted(config.get("clip", {}).get("views") or ()):
        return f"the views {', '.join(views)} beside the video"
    for section, name in (
        (config.get("video_model", {}), "attention_to"),
        (config, "context_frames"),
    ):
        if (value := section.get(name, "all")) != "all":
            return f"{name}={value!r}"
    return ""


def write_export(
    export: Export, destination: Path, wrote: Callable[[int], None] = lambda size: None
) -> None:
    """Writes a file, or a folder with its `config.json`, atomically; `wrote` as in `write`.

    Raises:
        FileExistsError: The destination exists.
    """
    folder = export.layout == "diffusers"
    empty = folder and destination.is_dir() and not any(destination.iterdir())
    if destination.exists() and not empty:
        raise FileExistsError(f"{destination} exists already; choose another name.")

    def read(tensor: TorchTensor) -> np.ndarray:
        array = tensor.read()
        wrote(array.nbytes)
        return array

    tensors = {
        name: dataclasses.replace(tensor, read=partial(read, tensor))
        for name, tensor in export.tensors.items()
    }
    if not folder:
        write_pt(destination, tensors)
        return
    with replacing(destination) as unfinished:
        stem = "model" if export.kind.stage == "text" else "diffusion_pytorch_model"
        write_safetensors_folder(unfinished, tensors, stem=stem)
        described = json.dumps(export.kind.published(export.config), indent=2) + "\n"
        (unfinished / "config.json").write_text(described)
        for path in export.tokenizer_files:
            shutil.copyfile(path, unfinished / path.name)


def _read_merged(
    reader: ParameterReader, stored: Mapping[str, Any], config: Config, path: str, block: int | None
) -> np.ndarray:
    """As `ParameterReader.read`, with adapters added to the kernels that have them."""
    array = reader.read(path, block)
    layer, _, leaf = path.rpartition("/")
    if leaf != "kernel" or f"{layer}/lora_a" not in stored:
        return array
    a, b = (reader.read(f"{layer}/{part}", block) for part in ("lora_a", "lora_b"))
    layer = {"kernel": array, "lora_a": a.astype(np.float32), "lora_b": b}
    lora = LoRA(config["lora"]["rank"], config["lora"]["alpha"], ())
    return merge_lora(layer, lora)["kernel"].astype(array.dtype)


def _tensors(
    rule: Rule, stored: Mapping[str, Any], read: Callable[..., np.ndarray], dtype: str
) -> Iterator[tuple[str, TorchTensor]]:
    path = rule.ours.replace(".", "/")
    shape, kept = stored[path].shape, np.dtype(dtype or stored[path].dtype)

    def read_tensor(block: int | None) -> np.ndarray:
        return _contiguous(rule.layout.to_torch(read(path, block)).astype(kept, copy=False))

    blocks = range(shape[0]) if rule.stacked else (None,)
    shape = rule.layout.torch_shape(shape[1:] if rule.stacked else shape)
    for i in blocks:
        yield rule.name(i), TorchTensor(shape, kept, partial(read_tensor, i))


# --- Descriptions for the user ---


# Sections of a training run that do not describe its network.
_OF_A_RUN = {"recording", "evaluation", "study", "datasets", "sampler", "mesh", "rules"}
_OF_A_RUN |= {"optimizer", "training", "flow", "backbone"}


def describe_conversion(conversion: Conversion, destination: Path) -> str:
    """Says what is read and what is written."""
    source = conversion.source
    lines = [
        f"{source.path}: {source.kind.title} ({source.layout} names), "
        f"{conversion.num_parameters:,} parameters, {_count_tensors(source.tensors)}",
        *_settings(conversion.config),
        f"into {destination}: {_size(conversion.nbytes)}",
    ]
    if source.dropped:
        names = collapse(source.dropped)
        more = f" and {len(names) - 8} other names" if len(names) > 8 else ""
        lines.insert(-1, f"not converted: {', '.join(names[:8])}{more}")
    return "\n".join(lines)


def describe_export(export: Export, source: Path, destination: Path) -> str:
    """Says what is read and what is written."""
    size = sum(tensor.nbytes for tensor in export.tensors.values())
    form = "folder" if export.layout == "diffusers" else "file"
    written = f"into the {form} {destination} ({export.layout} names): "
    written += f"{_count_tensors(export.tensors)}, {_size(size)}"
    return "\n".join([f"{source}: {export.kind.title}", *_settings(export.config), written])


def _count_tensors(tensors: Tensors) -> str:
    kinds = Counter(str(tensor.dtype) for tensor in tensors.values())
    return f"{len(tensors)} tensors ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"


def _settings(config: Config) -> list[str]:
    return [
        f"{section}: {', '.join(f'{name}={value}' for name, value in settings.items())}"
        for section, settings in config.items()
        if section != "lora" or settings["rank"]
        if isinstance(settings, dict) and section not in _OF_A_RUN
    ]
