"""Named sizes: the released models, and the tiny ones that train on a laptop."""

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mvjax.models.action_decoder import ActionDecoder, ActionDecoderConfig
from mvjax.models.network import Network
from mvjax.models.t5 import T5Encoder, T5EncoderConfig
from mvjax.models.video_dit import VideoDiT, VideoDiTConfig
from mvjax.models.wan_vae import WanVAE, WanVAEConfig

# Published LoRA targets (release, `configs/experiment/video2world.py`); `x_embedder` is
# `x_embedder.proj.1` there. The adaLN weights are trained in full beside them.
PUBLISHED_LORA_TARGETS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "output_proj",
    "x_embedder",
    "linear_1",
    "linear_2",
    "layer1",
    "layer2",
)

VIDEO_DITS = {
    "tiny": VideoDiTConfig(
        width=128,
        num_blocks=4,
        num_heads=4,
        text_dim=64,
        adaln_rank=16,
        rope_ratio_thw=(1.0, 3.0, 3.0),
    ),
    "cosmos2b": VideoDiTConfig(
        width=2048,
        num_blocks=28,
        num_heads=16,
        text_dim=1024,
        adaln_rank=256,
        rope_ratio_thw=(1.0, 3.0, 3.0),
        precision="bfloat16",
    ),
    "cosmos14b": VideoDiTConfig(
        width=5120,
        num_blocks=36,
        num_heads=40,
        text_dim=1024,
        adaln_rank=256,
        rope_ratio_thw=(20 / 24, 2.0, 2.0),
        precision="bfloat16",
    ),
}
# Predict2.5: another text encoder, and times up to 1000; one rotary stretch for both sizes.
_PREDICT25 = dict(text_projection_dim=100_352, timestep_scale=0.001, rope_ratio_thw=(1.0, 3.0, 3.0))
VIDEO_DITS |= {
    f"cosmos25_{size}": replace(VIDEO_DITS[f"cosmos{size}"], **_PREDICT25) for size in ("2b", "14b")
}

_RELEASED_DECODER = dict(
    width=1024,
    num_blocks=24,
    num_heads=8,
    context_dim=2048,
    adaln_rank=128,
    time_rank=1024,
    action_dim=10,
    proprio_dim=10,
    precision="bfloat16",
)

ACTION_DECODERS = {
    "tiny": ActionDecoderConfig(
        width=128,
        num_blocks=3,
        num_heads=4,
        context_dim=128,
        adaln_rank=16,
        time_rank=128,
        action_dim=4,
        action_horizon=16,
        proprio_dim=4,
    ),
    "bridge": ActionDecoderConfig(action_horizon=15, **_RELEASED_DECODER),
    "libero": ActionDecoderConfig(action_horizon=60, **_RELEASED_DECODER),
}

T5_ENCODERS = {
    "tiny": T5EncoderConfig(
        vocab_size=512, width=64, num_blocks=2, num_heads=4, head_dim=16, mlp_dim=256
    ),
    "t5_11b": T5EncoderConfig(precision="bfloat16"),
}

WAN_VAES = {
    "tiny": WanVAEConfig(dim=8, num_res_blocks=1),
    "wan21": WanVAEConfig(precision="bfloat16"),
}


# The sections of a configuration that describe these networks, and the networks themselves.


def video_section(model: VideoDiTConfig) -> dict[str, Any]:
    """The section `video_model` of a configuration that describes this video DiT."""
    elsewhere = {"latent_channels", "lora", "views", "observed_latents"}
    if not model.text_projection_dim:
        elsewhere.add("text_dim")  # then it is `text.dim`
    return _fields(model, elsewhere)


def decoder_section(decoder: ActionDecoderConfig) -> dict[str, Any]:
    """The section `decoder` of a configuration that describes this action decoder."""
    vectors = {"action_dim", "action_horizon", "proprio_dim", "proprio_horizon"}
    return _fields(decoder, vectors | {"context_dim"})


def video_network(config: VideoDiTConfig) -> Network:
    """A video DiT without weights."""
    return Network(lambda key: VideoDiT(config, key))


def decoder_network(config: ActionDecoderConfig) -> Network:
    """An action decoder without weights."""
    return Network(lambda key: ActionDecoder(config, key))


def vae_config(section: Mapping[str, Any]) -> WanVAEConfig:
    """The Wan VAE of a converted checkpoint's section `tokenizer`, where JSON has made lists."""
    return WanVAEConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in section.items()})


def vae_network(config: WanVAEConfig) -> Network:
    """A Wan VAE without weights."""
    return Network(lambda key: WanVAE(config, key))


def text_network(config: T5EncoderConfig) -> Network:
    """A T5 encoder without weights."""
    return Network(lambda key: T5Encoder(config, key))


def _fields(sizes: VideoDiTConfig | ActionDecoderConfig, elsewhere: set[str]) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(sizes).items() if k not in elsewhere}
