"""The PyTorch implementations that converted networks are compared with.

torch, diffusers and transformers (`requirements-torch.txt`) are imported when they are used.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np

from mvjax.checkpoints.torch_weights.kind import Config
from mvjax.checkpoints.torch_weights.kind_text import TEXT
from mvjax.checkpoints.torch_weights.kind_vae import VAE
from mvjax.checkpoints.torch_weights.kind_video import VIDEO
from mvjax.models.parameters import Network

Arrays = dict[str, np.ndarray]
State = dict[str, Any]  # name -> torch.Tensor, float32


class Reference(NamedTuple):
    """How one kind of network is compared.

    Attributes:
        inputs: configuration -> random inputs.
        theirs: (configuration, tensors under the names of diffusers, inputs) -> outputs.
        ours: (network, parameters, inputs) -> the same outputs.
    """

    inputs: Callable[[Config], Arrays]
    theirs: Callable[[Config, State, Arrays], Arrays]
    ours: Callable[[Network, Any, Arrays], Arrays]


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _video_inputs(config: Config) -> Arrays:
    mask = np.zeros((1, 3, 8, 8), np.float32)
    mask[:, 0] = 1.0
    return {
        "latents": _random(1, 3, 8, 8, 16),
        "timesteps": np.array([[1e-4, 0.7, 0.7]], np.float32),
        "text": _random(1, 16, config["text"]["dim"]),
        "condition_mask": mask,
    }


def cosmos_transformer(settings: Config) -> Any:
    """diffusers' `CosmosTransformer3DModel`, made to run without torchvision."""
    import torch
    from diffusers import CosmosTransformer3DModel
    from diffusers.models.transformers import transformer_cosmos

    def resize(x, size, interpolation=None):
        return torch.nn.functional.interpolate(x, size=size, mode="nearest")

    # diffusers takes this one function from torchvision, which has no build for every torch.
    functional = SimpleNamespace(resize=resize)
    transformer_cosmos.transforms = SimpleNamespace(
        functional=functional, InterpolationMode=SimpleNamespace(NEAREST=None)
    )
    return CosmosTransformer3DModel(**{k: v for k, v in settings.items() if k[0] != "_"})


def _video_torch(config: Config, state: State, inputs: Arrays) -> Arrays:
    import torch

    model = _with_weights(cosmos_transformer(VIDEO.published(config)), state)
    latents, mask = (torch.from_numpy(inputs[n]) for n in ("latents", "condition_mask"))
    with torch.no_grad():
        (velocity,) = model(
            hidden_states=latents.movedim(-1, 1),
            timestep=torch.from_numpy(inputs["timesteps"])[:, None, :, None, None],
            encoder_hidden_states=torch.from_numpy(inputs["text"]),
            condition_mask=mask[:, None],
            padding_mask=torch.zeros(1, 1, *mask.shape[-2:]),
            fps=None,  # a number would scale the rotary positions; NVIDIA's network does not
            return_dict=False,
        )
    return {"velocity": velocity.movedim(1, -1).numpy()}


def _video_ours(network: Network, params: Any, inputs: Arrays) -> Arrays:
    velocity = jax.jit(lambda p, i: network.bind(p)(**i))(params, inputs)
    return {"velocity": np.asarray(velocity)}


def _vae_inputs(config: Config) -> Arrays:
    channels = config["tokenizer"]["latent_channels"]
    return {"video": np.tanh(_random(1, 5, 32, 48, 3)), "latents": _random(1, 2, 4, 6, channels)}


def _vae_torch(config: Config, state: State, inputs: Arrays) -> Arrays:
    import torch
    from diffusers import AutoencoderKLWan

    settings = {k: v for k, v in VAE.published(config).items() if k[0] != "_"}
    model = _with_weights(AutoencoderKLWan(**settings), state)
    mean, std = (
        torch.tensor(config["tokenizer"][f"latent_{n}"])[:, None, None, None]
        for n in ("mean", "std")
    )
    video, latents = (torch.from_numpy(inputs[n]).movedim(-1, 1) for n in ("video", "latents"))
    with torch.no_grad():
        encoded = (model.encode(video).latent_dist.mode() - mean) / std
        decoded = model.decode(latents * std + mean).sample
    return {"latents": encoded.movedim(1, -1).numpy(), "video": decoded.movedim(1, -1).numpy()}


def _vae_ours(network: Network, params: Any, inputs: Arrays) -> Arrays:
    vae = network.bind(params)
    video = np.asarray(vae.decode(inputs["latents"]))
    return {
        "latents": np.asarray(vae.encode(inputs["video"])),
        "video": np.clip(video, -1, 1),  # as diffusers does
    }


def _text_inputs(config: Config) -> Arrays:
    sizes = config["text_encoder"]
    tokens = np.random.default_rng(0).integers(2, sizes["vocab_size"], (2, 24))
    mask = np.arange(24)[None] < np.array([[24], [9]])
    return {"tokens": np.where(mask, tokens, 0).astype(np.int32), "mask": mask}


def _text_torch(config: Config, state: State, inputs: Arrays) -> Arrays:
    import torch
    from transformers import T5Config, T5EncoderModel

    state = {**state, "encoder.embed_tokens.weight": state["shared.weight"]}
    model = T5EncoderModel(T5Config(**TEXT.published(config)))
    model.load_state_dict(state, strict=True)
    model.eval()
    tokens, mask = (torch.from_numpy(inputs[n]) for n in ("tokens", "mask"))
    with torch.no_grad():
        hidden = model(input_ids=tokens.long(), attention_mask=mask.long()).last_hidden_state
    return {"embedding": (hidden * mask[..., None]).numpy()}


def _text_ours(network: Network, params: Any, inputs: Arrays) -> Arrays:
    embed = jax.jit(lambda p, tokens, mask: network.bind(p)(tokens, mask))
    return {"embedding": np.asarray(embed(params, **inputs))}


def _with_weights(model: Any, state: State) -> Any:
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


REFERENCES = {
    "video": Reference(_video_inputs, _video_torch, _video_ours),
    "vae": Reference(_vae_inputs, _vae_torch, _vae_ours),
    "text": Reference(_text_inputs, _text_torch, _text_ours),
}
