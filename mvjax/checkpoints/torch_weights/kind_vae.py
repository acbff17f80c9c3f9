"""The Wan 2.1 VAE, tokenizer of Cosmos-Predict2."""

import dataclasses
import re
from collections.abc import Sequence

from mvjax.checkpoints.torch_weights.kind import Config, Hints, Kind
from mvjax.checkpoints.torch_weights.names_wan_vae import wan_vae, wan_vae_diffusers
from mvjax.checkpoints.torch_weights.rules import Rules
from mvjax.checkpoints.torch_weights.tensors import Tensors, WeightsError
from mvjax.models.parameters import Network
from mvjax.models.wan_vae import WanVAE
from mvjax.models.wan_vae_config import WanVAEConfig

# Latent frames at a time: 16 frames, as the release streams them. Decoding 61 frames of 480x640
# takes a third of the memory that the whole clip would.
CHUNK = 4
_TABLES = {"nvidia": wan_vae, "diffusers": wan_vae_diffusers}
# diffusers' names of what the configuration holds.
_DIFFUSERS = {
    "dim": "base_dim",
    "channel_multipliers": "dim_mult",
    "num_res_blocks": "num_res_blocks",
    "latent_channels": "z_dim",
    "temporal_downsample": "temperal_downsample",
    "latent_mean": "latents_mean",
    "latent_std": "latents_std",
}


def _infer(layout: str, tensors: Tensors, hints: Hints) -> Config:
    sizes = _from_config(hints) if layout == "diffusers" else _from_names(tensors)
    config = WanVAEConfig(**sizes, precision=hints.precision, chunk=CHUNK)
    return {"tokenizer": dataclasses.asdict(config)}


def _from_config(hints: Hints) -> dict:
    published = hints.published or {}
    absent = [name for name in _DIFFUSERS.values() if name not in published]
    if absent:
        problem = f"which lacks {', '.join(absent)}" if published else "which is not there"
        raise WeightsError(
            f"a diffusers VAE is described by the config.json beside its weights, {problem}; copy "
            "the whole folder."
        )
    return {
        ours: tuple(published[name]) if isinstance(published[name], list) else published[name]
        for ours, name in _DIFFUSERS.items()
    }


def _from_names(tensors: Tensors) -> dict:
    """Sizes from the encoder's list of residual blocks and downsamplings."""
    blocks: dict[int, set[str]] = {}
    for name in tensors:
        if found := re.match(r"encoder\.downsamples\.(\d+)\.(.*)", name):
            blocks.setdefault(int(found[1]), set()).add(found[2])
    levels, temporal = [[]], []
    for index in sorted(blocks):
        if "resample.1.weight" in blocks[index]:
            levels.append([])
            temporal.append("time_conv.weight" in blocks[index])
        else:
            levels[-1].append(_channels(tensors, f"encoder.downsamples.{index}.residual.2.weight"))
    dim = _channels(tensors, "encoder.conv1.weight")
    if not all(levels):
        raise WeightsError(f"the encoder's blocks {sorted(blocks)} are incomplete.")
    return {
        "dim": dim,
        "channel_multipliers": tuple(level[-1] // dim for level in levels),
        "num_res_blocks": len(levels[0]),
        "latent_channels": _channels(tensors, "conv2.weight"),
        "temporal_downsample": tuple(temporal),
    }


def _channels(tensors: Tensors, name: str) -> int:
    if name not in tensors:
        raise WeightsError(f"the tensor {name}, which tells the sizes of the VAE, is missing.")
    return tensors[name].shape[0]


def _config(config: Config) -> WanVAEConfig:
    return WanVAEConfig(**{name: _tuple(value) for name, value in config["tokenizer"].items()})


def _tuple(value: object) -> object:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _rules(layout: str, config: Config) -> Rules:
    return _TABLES[layout](_config(config))


def _network(config: Config) -> Network:
    sizes = _config(config)
    return Network(lambda key: WanVAE(sizes, key))


def _published(config: Config) -> Config:
    sizes = _config(config)
    fields = {theirs: _plain(getattr(sizes, ours)) for ours, theirs in _DIFFUSERS.items()}
    return {"_class_name": "AutoencoderKLWan", "attn_scales": [], "dropout": 0.0, **fields}


VAE = Kind(
    stage="vae",
    title="Wan VAE",
    signatures={
        "nvidia": r"^encoder\.downsamples\.",
        "diffusers": r"^encoder\.down_blocks\.",
    },
    prefixed=(),
    dropped=r"^$",
    aliases={},
    infer=_infer,
    rules=_rules,
    network=_network,
    exports={"nvidia": "nvidia", "mimic-video": "nvidia", "diffusers": "diffusers"},
    published=_published,
)
