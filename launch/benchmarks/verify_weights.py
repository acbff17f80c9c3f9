"""Does a converted checkpoint compute what PyTorch computes from the source?

Needs torch, diffusers and transformers (`pip install 'mvjax[torch]'`), which are imported when they
are used. Two checks: every parameter equals bit for bit the tensor that PyTorch reads from the
source; and the outputs for random inputs agree in float32.
"""

import io
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import psutil

from mvjax.models.network import Network
from mvjax.training.bridge import restore_params
from mvjax.training.checkpoint import leaf_paths
from mvjax.weights.convert import Conversion
from mvjax.weights.kinds import TEXT, VAE, VIDEO, Config
from mvjax.weights.match import Parameter, match
from mvjax.weights.names import has_adapters

Arrays = dict[str, np.ndarray]
State = dict[str, Any]  # name -> torch.Tensor, float32
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
    rules = source.kind.rules(source.layout, config)
    parameters = match(conversion.tensors, rules).parameters
    state = _torch_state(conversion, parameters)
    network = source.kind.network(
        {
            name: {**section, "precision": "float32"} if "precision" in section else section
            for name, section in config.items()
        }
    )
    target = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, "float32", sharding=target), network.abstract
    )
    _compare_weights(parameters, state, restore_params(directory, abstract))
    reference = _REFERENCES.get(source.kind.stage)
    if reference is None:
        return (
            f"verified: {len(state)} tensors equal those that torch reads. (No PyTorch package "
            f"holds the {source.kind.title} itself, so its outputs were not compared.)"
        )
    # Under the names of diffusers (of Hugging Face, for T5).
    names = {rule.ours: rule for rule in source.kind.rules("diffusers", config)}
    state = {
        names[path].name(i): state[name]
        for path, parameter in parameters.items()
        for i, name in enumerate(parameter.names)
    }
    inputs = reference.inputs(config)
    theirs = reference.theirs(config, state, inputs)
    del state  # one model at a time
    ours = reference.ours(network, restore_params(directory, abstract), inputs)
    errors = {name: _relative_rms(ours[name], theirs[name]) for name in theirs}
    said = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    if not max(errors.values()) <= BOUND:
        raise ValueError(f"outputs differ from PyTorch's; relative rms of {said} (bound {BOUND}).")
    return f"verified against PyTorch in float32; relative rms of {said}."


def _torch_state(conversion: Conversion, parameters: dict[str, Parameter]) -> State:
    """The tensors that were converted, in the dtype they were written in, then float32.

    PyTorch and safetensors read them from the source, but for those that adapters were merged into.
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
    for path, parameter in parameters.items():
        leaf, rule = leaves[path.replace(".", "/")], parameter.rule
        different += [
            name
            for name, piece in zip(parameter.names, leaf if rule.stacked else leaf[None])
            if not np.array_equal(rule.layout.to_torch(np.asarray(piece)), state[name].numpy())
        ]
    if different:
        raise ValueError(f"written parameters differ from the source: {', '.join(different)}.")


def _relative_rms(a: np.ndarray, b: np.ndarray) -> float:
    """‖a - b‖ / ‖b‖."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# PyTorch's implementations, built from a configuration of ours


def cosmos_transformer(config: Config, **settings: Any) -> Any:
    """diffusers' `CosmosTransformer3DModel`, made to run without torchvision."""
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
    """diffusers' `AutoencoderKLWan`."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(**_settings(VAE.published(config)))


def _settings(published: Config) -> Config:
    return {name: value for name, value in published.items() if not name.startswith("_")}


# How each kind of network is compared: random inputs, PyTorch's outputs (from tensors under the
# names of diffusers), and the same outputs of ours.


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


class _Video:
    @staticmethod
    def inputs(config: Config) -> Arrays:
        mask = np.zeros((1, 3, 8, 8), np.float32)
        mask[:, 0] = 1.0
        return {
            "latents": _random(1, 3, 8, 8, 16),
            "timesteps": np.array([[1e-4, 0.7, 0.7]], np.float32),
            "text": _random(1, 16, config["text"]["dim"]),
            "condition_mask": mask,
        }

    @staticmethod
    def theirs(config: Config, state: State, inputs: Arrays) -> Arrays:
        import torch

        model = cosmos_transformer(config)
        model.load_state_dict(state, assign=True)
        latents, mask = (torch.from_numpy(inputs[n]) for n in ("latents", "condition_mask"))
        with torch.no_grad():
            (velocity,) = model.eval()(
                hidden_states=latents.movedim(-1, 1),
                timestep=torch.from_numpy(inputs["timesteps"])[:, None, :, None, None],
                encoder_hidden_states=torch.from_numpy(inputs["text"]),
                condition_mask=mask[:, None],
                padding_mask=torch.zeros(1, 1, *mask.shape[-2:]),
                fps=None,  # a number would scale the rotary positions; NVIDIA's network does not
                return_dict=False,
            )
        return {"velocity": velocity.movedim(1, -1).numpy()}

    @staticmethod
    def ours(network: Network, params: Any, inputs: Arrays) -> Arrays:
        velocity = jax.jit(lambda p, i: network.bind(p)(**i))(params, inputs)
        return {"velocity": np.asarray(velocity)}


class _VAE:
    @staticmethod
    def inputs(config: Config) -> Arrays:
        channels = config["tokenizer"]["latent_channels"]
        video = np.tanh(_random(1, 5, 32, 48, 3))
        return {"video": video, "latents": _random(1, 2, 4, 6, channels)}

    @staticmethod
    def theirs(config: Config, state: State, inputs: Arrays) -> Arrays:
        import torch

        model = wan_autoencoder(config)
        model.load_state_dict(state, assign=True)
        model.eval()
        mean, std = (
            torch.tensor(config["tokenizer"][f"latent_{n}"])[:, None, None, None]
            for n in ("mean", "std")
        )
        video, latents = (torch.from_numpy(inputs[n]).movedim(-1, 1) for n in ("video", "latents"))
        with torch.no_grad():
            encoded = (model.encode(video).latent_dist.mode() - mean) / std
            decoded = model.decode(latents * std + mean).sample
        return {"latents": encoded.movedim(1, -1).numpy(), "video": decoded.movedim(1, -1).numpy()}

    @staticmethod
    def ours(network: Network, params: Any, inputs: Arrays) -> Arrays:
        vae = network.bind(params)
        video = np.clip(np.asarray(vae.decode(inputs["latents"])), -1, 1)  # as diffusers does
        return {"latents": np.asarray(vae.encode(inputs["video"])), "video": video}


class _Text:
    @staticmethod
    def inputs(config: Config) -> Arrays:
        sizes = config["text_encoder"]
        tokens = np.random.default_rng(0).integers(2, sizes["vocab_size"], (2, 24))
        mask = np.arange(24)[None] < np.array([[24], [9]])
        return {"tokens": np.where(mask, tokens, 0).astype(np.int32), "mask": mask}

    @staticmethod
    def theirs(config: Config, state: State, inputs: Arrays) -> Arrays:
        import torch
        from transformers import T5Config, T5EncoderModel

        model = T5EncoderModel(T5Config(**TEXT.published(config)))
        model.load_state_dict({**state, "encoder.embed_tokens.weight": state["shared.weight"]})
        tokens, mask = (torch.from_numpy(inputs[n]) for n in ("tokens", "mask"))
        with torch.no_grad():
            output = model.eval()(input_ids=tokens.long(), attention_mask=mask.long())
        return {"embedding": (output.last_hidden_state * mask[..., None]).numpy()}

    @staticmethod
    def ours(network: Network, params: Any, inputs: Arrays) -> Arrays:
        embed = jax.jit(lambda p, tokens, mask: network.bind(p)(tokens, mask))
        return {"embedding": np.asarray(embed(params, **inputs))}


_REFERENCES = {"video": _Video, "vae": _VAE, "text": _Text}
