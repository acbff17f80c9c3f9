"""Compares a converted checkpoint with PyTorch: its parameters, and the outputs it computes.

Every parameter must equal, bit for bit, the tensor that PyTorch reads from the source, and the
outputs for random inputs must agree in float32. Needs torch, diffusers and transformers (`pip
install 'mvjax[torch]'`), which are imported when used.
"""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from mvjax.training.checkpoint import leaf_paths
from mvjax.training.directory import restore_params
from mvjax.weights.convert import Conversion
from mvjax.weights.kinds import TEXT, VAE, VIDEO, Config
from mvjax.weights.match import Parameter, match
from mvjax.weights.names import has_adapters

State = dict[str, Any]  # name -> torch.Tensor, float32
BOUND = 1e-5  # relative rms of the outputs, float32

# What PyTorch computes, and a function that computes the same with our network.
Outputs = dict[str, Any]
Compared = tuple[Outputs, Callable[[Any], Outputs]]


def verify(conversion: Conversion, directory: Path) -> str:
    """Compares a converted checkpoint with its source; returns one sentence with the result.

    Raises:
        ImportError: torch, or for outputs diffusers or transformers, is not installed.
        ValueError: Something differs, or the memory is too small to compare.
    """
    needed = 9 * conversion.num_parameters
    if psutil.virtual_memory().available < needed:
        raise ValueError(
            f"--verify needs {needed / 1e9:.0f} GB of free memory to run this model in float32; "
            f"{directory} is written, but not verified. Verify it on a larger machine."
        )
    source, config = conversion.source, conversion.config
    if config.get("lora", {}).get("rank"):
        raise ValueError("--verify compares networks without adapters; use it with --lora=merge.")
    rules = source.kind.rules(source.layout, config)
    parameters = match(conversion.tensors, rules).parameters
    state = _torch_state(conversion, parameters)
    network = source.kind.network(
        {
            name: {**section, "precision": "float32"} if "precision" in section else section
            for name, section in config.items()
        }
    )
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, "float32", sharding=device), network.abstract
    )
    _compare_weights(parameters, state, restore_params(directory, abstract))
    compute = {"video": _video, "vae": _vae, "text": _text}.get(source.kind.stage)
    if compute is None:
        return (
            f"verified: {len(state)} tensors equal those that torch reads. (No PyTorch package "
            f"contains the {source.kind.title}, so its outputs were not compared.)"
        )
    # Under the names of diffusers (of Hugging Face, for T5).
    names = {rule.ours: rule for rule in source.kind.rules("diffusers", config)}
    state = {
        names[path].name(i): state[name]
        for path, parameter in parameters.items()
        for i, name in enumerate(parameter.names)
    }
    theirs, compute_ours = compute(config, state)
    del state  # one model at a time
    params = restore_params(directory, abstract)
    ours = jax.jit(lambda params: compute_ours(network.bind(params)))(params)
    errors = {name: _relative_rms(ours[name], theirs[name]) for name in theirs}
    listed = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    if not max(errors.values()) <= BOUND:
        raise ValueError(
            f"outputs differ from PyTorch's; relative rms of {listed} (bound {BOUND})."
        )
    return f"verified against PyTorch in float32; relative rms of {listed}."


def _torch_state(conversion: Conversion, parameters: dict[str, Parameter]) -> State:
    """Reads the converted tensors in the dtype in which they were written, then float32.

    PyTorch and safetensors read them from the source, unless adapters were merged into them.
    """
    import torch

    source = conversion.source
    loaded = {} if has_adapters(source.tensors) else _read_by_torch(source.path)
    state, arrays = {}, leaf_paths(conversion.params)
    for path, parameter in parameters.items():
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


def _compare_weights(parameters: dict[str, Parameter], state: State, params: Any) -> None:
    """Raises ValueError unless every parameter equals its tensor, bit for bit in float32."""
    leaves, different = leaf_paths(params), []
    for path, (rule, names, _) in parameters.items():
        leaf = leaves[path.replace(".", "/")]
        different += [
            name
            for name, piece in zip(names, leaf if rule.stacked else leaf[None])
            if not np.array_equal(rule.layout.to_torch(np.asarray(piece)), state[name].numpy())
        ]
    if different:
        raise ValueError(f"written parameters differ from the source: {', '.join(different)}.")


def _relative_rms(a: np.ndarray, b: np.ndarray) -> float:
    """Returns ‖a - b‖ / ‖b‖."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# --- PyTorch's networks, built from a configuration of ours ---


def cosmos_transformer(config: Config, **settings: Any) -> Any:
    """Builds diffusers' `CosmosTransformer3DModel` without torchvision."""
    import torch
    from diffusers import CosmosTransformer3DModel
    from diffusers.models.transformers import transformer_cosmos

    def resize(x, size, interpolation=None):
        return torch.nn.functional.interpolate(x, size=size, mode="nearest")

    # diffusers takes this one function from torchvision, which has no build for every torch.
    transformer_cosmos.transforms = SimpleNamespace(
        functional=SimpleNamespace(resize=resize),
        InterpolationMode=SimpleNamespace(NEAREST=None),
    )
    return CosmosTransformer3DModel(**_settings(VIDEO.published(config)) | settings)


def wan_autoencoder(config: Config) -> Any:
    """Builds diffusers' `AutoencoderKLWan`."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(**_settings(VAE.published(config)))


def _settings(published: Config) -> Config:
    return {name: value for name, value in published.items() if not name.startswith("_")}


# --- Outputs for random inputs, of tensors under the names of diffusers ---


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _video(config: Config, state: State) -> Compared:
    import torch

    latents, text = _random(1, 3, 8, 8, 16), _random(1, 16, config["text"]["dim"])
    timesteps = np.array([[1e-4, 0.7, 0.7]], np.float32)
    mask = np.zeros((1, 3, 8, 8), np.float32)
    mask[:, 0] = 1.0
    model = cosmos_transformer(config)
    model.load_state_dict(state, assign=True)
    with torch.no_grad():
        (velocity,) = model.eval()(
            hidden_states=torch.from_numpy(latents).movedim(-1, 1),
            timestep=torch.from_numpy(timesteps)[:, None, :, None, None],
            encoder_hidden_states=torch.from_numpy(text),
            condition_mask=torch.from_numpy(mask)[:, None],
            padding_mask=torch.zeros(1, 1, *mask.shape[-2:]),
            fps=None,  # a number would scale the rotary positions; NVIDIA's network does not
            return_dict=False,
        )
    inputs = dict(latents=latents, timesteps=timesteps, text=text, condition_mask=mask)
    return {"velocity": velocity.movedim(1, -1)}, lambda net: {"velocity": net(**inputs)}


def _vae(config: Config, state: State) -> Compared:
    import torch

    tokenizer = config["tokenizer"]
    video, latents = (
        np.tanh(_random(1, 5, 32, 48, 3)),
        _random(1, 2, 4, 6, tokenizer["latent_channels"]),
    )
    model = wan_autoencoder(config)
    model.load_state_dict(state, assign=True)
    model.eval()
    mean, std = (
        torch.tensor(tokenizer[f"latent_{name}"])[:, None, None, None] for name in ("mean", "std")
    )
    x, z = (torch.from_numpy(array).movedim(-1, 1) for array in (video, latents))
    with torch.no_grad():
        encoded = (model.encode(x).latent_dist.mode() - mean) / std
        decoded = model.decode(z * std + mean).sample
    theirs = {"latents": encoded.movedim(1, -1), "video": decoded.movedim(1, -1)}

    def ours(net: Any) -> Outputs:
        # diffusers clips, too.
        return {"latents": net.encode(video), "video": jnp.clip(net.decode(latents), -1, 1)}

    return theirs, ours


def _text(config: Config, state: State) -> Compared:
    import torch
    from transformers import T5Config, T5EncoderModel

    vocab_size = config["text_encoder"]["vocab_size"]
    mask = np.arange(24)[None] < np.array([[24], [9]])
    tokens = np.random.default_rng(0).integers(2, vocab_size, (2, 24))
    tokens = np.where(mask, tokens, 0).astype(np.int32)
    model = T5EncoderModel(T5Config(**TEXT.published(config)))
    model.load_state_dict({**state, "encoder.embed_tokens.weight": state["shared.weight"]})
    ids, attended = torch.from_numpy(tokens).long(), torch.from_numpy(mask).long()
    with torch.no_grad():
        output = model.eval()(input_ids=ids, attention_mask=attended).last_hidden_state
    return {"embedding": output * attended[..., None]}, lambda net: {"embedding": net(tokens, mask)}
