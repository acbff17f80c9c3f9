"""Does a converted checkpoint compute what PyTorch computes from the source?

Needs torch, diffusers and transformers (`requirements-torch.txt`). Two checks: every parameter
equals bit for bit the tensor that PyTorch reads from the source; and the outputs for random inputs
agree in float32.
"""

import io
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil

from mvjax.checkpoints.bridge import restore_params
from mvjax.checkpoints.torch_weights.convert import Conversion
from mvjax.checkpoints.torch_weights.kind import Config
from mvjax.checkpoints.torch_weights.match import match
from mvjax.checkpoints.torch_weights.peft import has_adapters
from mvjax.checkpoints.torch_weights.torch_reference import REFERENCES, State
from mvjax.checkpoints.tree_match import leaf_paths

BOUND = 1e-5  # relative rms of the outputs, float32


def verify(conversion: Conversion, directory: Path) -> str:
    """Compares a converted checkpoint with its source.

    Returns:
        One sentence with what was compared.

    Raises:
        ImportError: if torch, or for outputs diffusers or transformers, is not installed.
        ValueError: if something differs, or the memory is too small to compare.
    """
    needed = 9 * conversion.num_parameters
    if psutil.virtual_memory().available < needed:
        raise ValueError(
            f"--verify needs {needed / 1e9:.0f} GB of free memory to run this model in float32; "
            f"{directory} is written, but not compared. Verify it on a larger machine."
        )
    source, config = conversion.source, conversion.config
    if config.get("lora", {}).get("rank"):
        raise ValueError("--verify compares networks without adapters; use it with --lora=merge.")
    state = torch_state(conversion)
    network = source.kind.network(_in_float32(config))
    target = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, "float32", sharding=target), network.abstract
    )
    compare_weights(conversion, state, restore_params(directory, abstract))
    reference = REFERENCES.get(source.kind.stage)
    if reference is None:
        return (
            f"verified: {len(state)} tensors equal those that torch reads. (No PyTorch package "
            f"holds the {source.kind.title} itself, so its outputs were not compared.)"
        )
    inputs = reference.inputs(config)
    theirs = reference.theirs(config, diffusers_state(conversion, state), inputs)
    del state  # one model at a time
    ours = reference.ours(network, restore_params(directory, abstract), inputs)
    errors = {name: relative_rms(ours[name], theirs[name]) for name in theirs}
    said = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    if not max(errors.values()) <= BOUND:
        raise ValueError(f"outputs differ from PyTorch's; relative rms of {said} (bound {BOUND}).")
    return f"verified against PyTorch in float32; relative rms of {said}."


def relative_rms(a: np.ndarray, b: np.ndarray) -> float:
    """‖a - b‖ / ‖b‖."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def torch_state(conversion: Conversion) -> State:
    """The tensors that were converted, in the dtype they were written in, then float32.

    PyTorch and safetensors read them from the source, but for those that adapters were merged into.
    """
    import torch

    source = conversion.source
    loaded = {} if has_adapters(source.tensors) else _read_by_torch(source.path)
    state, arrays = {}, leaf_paths(conversion.params)
    for path, parameter in _parameters(conversion).items():
        written = arrays[path.replace(".", "/")].dtype
        for name, tensor in zip(parameter.names, parameter.tensors):
            value = loaded[source.names[name]].float().numpy() if loaded else tensor.read()
            state[name] = torch.from_numpy(value.astype(written).astype(np.float32))
    return state


def _read_by_torch(path: Path) -> State:
    import torch
    from safetensors.torch import load_file

    if path.is_file():
        files = [path]
    else:  # the same order of preference as `open_weights`
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    state: State = {}
    for file in files:
        if zipfile.is_zipfile(file):
            with torch.serialization.safe_globals([io.BytesIO]):
                state |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        else:
            state |= load_file(file)
    return state


def compare_weights(conversion: Conversion, state: State, params: Any) -> None:
    """Raises ValueError unless every parameter equals its tensor, bit for bit in float32."""
    leaves, different = leaf_paths(params), []
    for path, parameter in _parameters(conversion).items():
        leaf = leaves[path.replace(".", "/")]
        pieces = leaf if parameter.stacked else leaf[None]
        different += [
            name
            for name, piece in zip(parameter.names, pieces)
            if not np.array_equal(
                parameter.rule.layout.to_torch(np.asarray(piece)), state[name].numpy()
            )
        ]
    if different:
        raise ValueError(f"written parameters differ from the source: {', '.join(different)}.")


def diffusers_state(conversion: Conversion, state: State) -> State:
    """The tensors under the names of diffusers (Hugging Face, for T5)."""
    theirs = {r.ours: r for r in conversion.source.kind.rules("diffusers", conversion.config)}
    return {
        theirs[path].torch.replace("{i}", str(i)): state[name]
        for path, parameter in _parameters(conversion).items()
        for i, name in enumerate(parameter.names)
    }


def _parameters(conversion: Conversion) -> dict:
    source = conversion.source
    rules = source.kind.rules(source.layout, conversion.config)
    return match(conversion.tensors, rules).parameters


def _in_float32(config: Config) -> Config:
    return {
        name: {**section, "precision": "float32"} if "precision" in section else section
        for name, section in config.items()
    }
