"""The video DiT: Cosmos-Predict2 and 2.5, and the fine-tuned backbones of mimic-video."""

import dataclasses

from ml_collections import ConfigDict

from mvjax.checkpoints.torch_weights.kind import Config, Hints, Kind
from mvjax.checkpoints.torch_weights.match import match
from mvjax.checkpoints.torch_weights.names_dit import (
    video_dit,
    video_dit_diffusers,
    with_adapters,
)
from mvjax.checkpoints.torch_weights.peft import adapted_layers, adapter_rank
from mvjax.checkpoints.torch_weights.rules import Rules
from mvjax.checkpoints.torch_weights.tensors import Tensors, WeightsError
from mvjax.clip import PATCH
from mvjax.models.build import video_dit_config, video_network, video_section
from mvjax.models.parameters import Network
from mvjax.models.presets import VIDEO_DITS
from mvjax.models.video_dit import VideoDiTConfig

_TABLES = {"nvidia": video_dit, "diffusers": video_dit_diffusers}
_MASKS = 2  # condition and padding mask, beside the latents
_PROJECTION = "crossattn_proj.0.weight"


def _infer(layout: str, tensors: Tensors, hints: Hints) -> Config:
    projected = _PROJECTION in tensors
    found = match(tensors, _TABLES[layout](projected))
    features, width = found.shape("x_embedder.kernel")
    channels = features // PATCH**2 - _MASKS
    if channels != 16:
        raise WeightsError(
            f"the patch embedding reads {features} features per patch; a video model of 16 latent "
            "channels, a condition mask and a padding mask reads 72. Text-to-image models have no "
            "condition mask and cannot be converted."
        )
    text_dim, _ = found.shape("blocks.cross_attn.k_proj.kernel")
    sizes = dict(
        width=width,
        num_blocks=found.blocks,
        num_heads=width // found.shape("blocks.self_attn.q_norm.scale")[0],
        text_dim=text_dim,
        adaln_rank=found.shape("blocks.adaln_mlp.down.kernel")[1],
        mlp_ratio=found.shape("blocks.mlp.layer1.kernel")[1] // width,
        text_projection_dim=found.shape("text_projection.kernel")[0] if projected else 0,
    )
    return video_sections(_complete(sizes, hints))


def _complete(sizes: dict, hints: Hints) -> VideoDiTConfig:
    """Adds what the tensors cannot tell: the rotary ratios."""
    released = (
        preset.rope_ratio_thw
        for preset in VIDEO_DITS.values()
        if all(getattr(preset, name) == value for name, value in sizes.items())
    )
    said = hints.rope_ratio_thw or tuple((hints.published or {}).get("rope_scale", ()))
    ratios = said or next(released, None)
    if ratios is None:
        raise WeightsError(
            f"a video DiT of width {sizes['width']} with {sizes['num_blocks']} blocks is no "
            "released size, and its weights do not tell the rotary extrapolation ratios; give "
            "--rope_ratio_thw, e.g. 1,3,3 (as Cosmos-Predict2 2B)."
        )
    return VideoDiTConfig(**sizes, rope_ratio_thw=ratios, precision=hints.precision)


def video_sections(model: VideoDiTConfig) -> Config:
    """The sections of a configuration that describe a video DiT without adapters."""
    # Training and the policy call the network with τ itself, whatever its release counts to.
    return {
        "video_model": video_section(dataclasses.replace(model, timestep_scale=1.0)),
        "text": {"dim": model.text_input_dim},
        "lora": {"rank": 0, "alpha": 0.0, "targets": []},
    }


def with_adapters_config(config: Config, tensors: Tensors, alpha: float) -> Config:
    """The configuration of a network that keeps the adapters of `tensors` beside its kernels."""
    targets = ["x_embedder" if n == "x_embedder.proj.1" else n for n in adapted_layers(tensors)]
    lora = {"rank": adapter_rank(tensors), "alpha": alpha, "targets": targets}
    return {**config, "lora": lora}


def _rules(layout: str, config: Config) -> Rules:
    rules = _TABLES[layout](bool(config["video_model"].get("text_projection_dim")))
    return with_adapters(rules, targets) if (targets := _targets(config)) else rules


def _targets(config: Config) -> tuple[str, ...]:
    return tuple(config["lora"]["targets"]) if config["lora"]["rank"] else ()


def _network(config: Config) -> Network:
    return video_network(video_dit_config(ConfigDict(config)))


def _published(config: Config) -> Config:
    model = video_dit_config(ConfigDict(config))
    published = {
        "_class_name": "CosmosTransformer3DModel",
        "in_channels": model.latent_channels + 1,
        "out_channels": model.latent_channels,
        "num_attention_heads": model.num_heads,
        "attention_head_dim": model.head_dim,
        "num_layers": model.num_blocks,
        "mlp_ratio": float(model.mlp_ratio),
        "text_embed_dim": model.text_dim,
        "adaln_lora_dim": model.adaln_rank,
        "max_size": [128, 240, 240],
        "patch_size": [1, PATCH, PATCH],
        "rope_scale": list(model.rope_ratio_thw),
        "concat_padding_mask": True,
        "extra_pos_embed_type": None,
    }
    if model.text_projection_dim:
        published |= {
            "use_crossattn_projection": True,
            "crossattn_proj_in_channels": model.text_projection_dim,
            "encoder_hidden_states_channels": model.text_dim,
        }
    return published


VIDEO = Kind(
    stage="video",
    title="video DiT",
    signatures={
        "nvidia": r"^x_embedder\.|^t_embedder\.1\.",
        "diffusers": r"^transformer_blocks\.|^patch_embed\.proj\.",
    },
    prefixed=("nvidia",),
    dropped=r"(^|\.)_extra_state$|^accum_|^pos_embedder\.",
    aliases={},
    infer=_infer,
    rules=_rules,
    network=_network,
    exports={"nvidia": "nvidia", "mimic-video": "nvidia", "diffusers": "diffusers"},
    published=_published,
)
