"""From a configuration to networks, and back.

Lengths and widths that follow from other sections of the configuration are filled in, and left out.
"""

import dataclasses
from typing import Any

from mvjax.clip import CHANNELS
from mvjax.models.action_decoder import ActionDecoder, ActionDecoderConfig
from mvjax.models.lora import LoRA
from mvjax.models.parameters import Network
from mvjax.models.video_dit import VideoDiT, VideoDiTConfig


def video_dit_config(config: Any) -> VideoDiTConfig:
    """The video DiT of a configuration.

    Args:
        config: with `video_model` (fields of VideoDiTConfig; text_dim only where a projection
            makes it differ from `text.dim`), `text.dim`, and `lora` (fields of LoRA; rank 0 means
            none).
    """
    rank, alpha, targets = config.lora.rank, config.lora.alpha, tuple(config.lora.targets)
    if rank < 0:
        raise ValueError(f"lora.rank must be 0 (full training) or more, got {rank}.")
    fields = {"text_dim": config.text.dim, **config.video_model}
    fields["rope_ratio_thw"] = tuple(fields["rope_ratio_thw"])
    model = VideoDiTConfig(
        **fields, latent_channels=CHANNELS, lora=LoRA(rank, alpha, targets) if rank else None
    )
    if model.text_input_dim != config.text.dim:
        raise ValueError(
            f"The video model takes text of width {model.text_input_dim} (video_model.text_dim, "
            f"text_projection_dim), but text.dim is {config.text.dim}."
        )
    if model.timestep_scale != 1:
        raise ValueError(
            f"video_model.timestep_scale is {model.timestep_scale}, but training and the policy "
            "call the network with τ itself: use 1.0."
        )
    return model


def video_section(model: VideoDiTConfig) -> dict[str, Any]:
    """The section `video_model` of a configuration that describes this video DiT."""
    elsewhere = {"latent_channels", "lora"}
    if not model.text_projection_dim:
        elsewhere.add("text_dim")  # then it is `text.dim`
    return _fields(model, elsewhere)


def action_decoder_config(config: Any) -> ActionDecoderConfig:
    """The action decoder of a configuration.

    Args:
        config: with `decoder` (fields of ActionDecoderConfig), `policy_io`, `video_model` and
            `context_layer`, the block of the video DiT after which the decoder reads.
    """
    layer, blocks = config.context_layer, config.video_model.num_blocks
    if not 0 <= layer <= blocks:
        raise ValueError(
            f"context_layer is {layer}, but the video model has blocks 1 to {blocks} (0 is the "
            "patch embedding)."
        )
    action, proprio = config.policy_io.action, config.policy_io.proprio
    return ActionDecoderConfig(
        **config.decoder,
        context_dim=config.video_model.width,
        action_dim=action.dim,
        action_horizon=action.horizon,
        proprio_dim=proprio.dim,
        proprio_horizon=proprio.horizon,
    )


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


def _fields(sizes: VideoDiTConfig | ActionDecoderConfig, elsewhere: set[str]) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(sizes).items() if k not in elsewhere}
