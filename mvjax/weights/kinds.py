"""What the converter knows about each kind of network.

VIDEO is the video DiT, ACTION the action decoder, VAE the Wan VAE and TEXT the T5 encoder.
"""

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from data_pipelines.clip import CHANNELS, PATCH
from mvjax.experiment import Experiment
from mvjax.models import presets
from mvjax.models.action_decoder import ActionDecoderConfig, embedder_widths
from mvjax.models.network import Network
from mvjax.models.t5 import T5EncoderConfig
from mvjax.models.video_dit import VideoDiTConfig
from mvjax.weights import names
from mvjax.weights.files import Tensors, WeightsError
from mvjax.weights.match import Match, match
from mvjax.weights.names import Rules

Config = dict[str, Any]  # sections of a configuration, as stored beside a checkpoint
NO_LORA: Config = {"rank": 0, "alpha": 0.0, "targets": []}


@dataclass(frozen=True)
class Hints:
    """Settings that the weights themselves do not determine."""

    # Rotary extrapolation ratios of a video DiT; None takes those of its `config.json`, or else of
    # the released model of its size.
    rope_ratio_thw: tuple[float, float, float] | None = None
    proprio_horizon: int = 1  # positions of an action decoder that are proprioception
    precision: str = "bfloat16"  # default precision of the network's arithmetic
    published: Mapping[str, Any] | None = None  # the `config.json` of a Hugging Face folder


class Kind(ABC):
    """A kind of network, in every layout in which it is published."""

    stage: str  # of a converted checkpoint, e.g. "video"
    title: str  # name in messages, e.g. "video DiT"
    # Layout -> pattern of names that only this kind in this layout has.
    signatures: ClassVar[Mapping[str, str]]
    prefixed: tuple[str, ...] = ()  # layouts whose names start with "net." or "net_ema."
    dropped: str = r"^$"  # pattern of names that are not part of the network
    aliases: ClassVar[Mapping[str, str]] = {}  # second names of tensors -> the names used here
    # Target of an export -> the layout.
    exports: ClassVar = {"nvidia": "nvidia", "mimic-video": "nvidia", "diffusers": "diffusers"}

    @abstractmethod
    def infer(self, layout: str, tensors: Tensors, hints: Hints) -> Config:
        """Returns the configuration; raises WeightsError if the tensors do not determine it."""

    @abstractmethod
    def rules(self, layout: str, config: Config) -> Rules:
        """Returns the table of names."""

    @abstractmethod
    def network(self, config: Config) -> Network:
        """Returns the network without weights."""

    def published(self, config: Config) -> Config:
        """Returns the `config.json` of the layout "diffusers"; WeightsError without that layout."""
        raise WeightsError(
            f"no {self.title} is published in the layout 'diffusers'; this kind can be written as "
            f"{', '.join(self.exports)}."
        )


# State of Transformer Engine, counters and buffers in files of NVIDIA and mimic-video.
_NO_WEIGHTS = r"(^|\.)_extra_state$|^accum_|^pos_embedder\."


def _block_sizes(found: Match, width: int) -> dict[str, int]:
    return dict(
        width=width,
        num_blocks=found.blocks,
        num_heads=width // found.shape("blocks.self_attn.q_norm.scale")[0],
        adaln_rank=found.shape("blocks.adaln_mlp.down.kernel")[1],
        mlp_ratio=found.shape("blocks.mlp.layer1.kernel")[1] // width,
    )


class _Video(Kind):
    """Cosmos-Predict2 and 2.5, and the fine-tuned backbones of mimic-video."""

    stage, title = "video", "video DiT"
    signatures: ClassVar = {
        "nvidia": r"^x_embedder\.|^t_embedder\.1\.",
        "diffusers": r"^transformer_blocks\.|^patch_embed\.proj\.",
    }
    prefixed, dropped = ("nvidia",), _NO_WEIGHTS
    _tables: ClassVar = {"nvidia": names.video_dit, "diffusers": names.video_dit_diffusers}

    def infer(self, layout: str, tensors: Tensors, hints: Hints) -> Config:
        projected = "crossattn_proj.0.weight" in tensors
        found = match(tensors, self._tables[layout](projected))
        features, width = found.shape("x_embedder.kernel")
        expected = (CHANNELS + 2) * PATCH**2  # latents, condition mask and padding mask
        if features != expected:
            raise WeightsError(
                f"the patch embedding reads {features} features per patch instead of {expected}. "
                "Text-to-image models have no condition mask and cannot be converted."
            )
        sizes = dict(
            **_block_sizes(found, width),
            text_dim=found.shape("blocks.cross_attn.k_proj.kernel")[0],
            text_projection_dim=found.shape("text_projection.kernel")[0] if projected else 0,
        )
        # The shapes do not depend on the rotary ratios.
        released = (
            preset.rope_ratio_thw
            for preset in presets.VIDEO_DITS.values()
            if all(getattr(preset, name) == value for name, value in sizes.items())
        )
        given = hints.rope_ratio_thw or tuple((hints.published or {}).get("rope_scale", ()))
        ratios = given or next(released, None)
        if ratios is None:
            raise WeightsError(
                f"width {width} with {found.blocks} blocks is not a released size, so its rotary "
                "extrapolation ratios are unknown; give --rope_ratio_thw, e.g. 1,3,3."
            )
        model = VideoDiTConfig(**sizes, rope_ratio_thw=ratios, precision=hints.precision)
        return video_sections(model)

    def rules(self, layout: str, config: Config) -> Rules:
        rules = self._tables[layout](bool(config["video_model"].get("text_projection_dim")))
        lora = config["lora"]
        return names.with_adapters(rules, tuple(lora["targets"])) if lora["rank"] else rules

    def network(self, config: Config) -> Network:
        return Experiment.from_config(config).video_network

    def published(self, config: Config) -> Config:
        model = Experiment.from_config(config).video
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


def video_sections(model: VideoDiTConfig) -> Config:
    """Returns the sections of a configuration that describe a video DiT without adapters."""
    # Training and the policy call the network with τ itself, whatever the release's time scale.
    return {
        "video_model": presets.video_section(dataclasses.replace(model, timestep_scale=1.0)),
        "text": {"dim": model.text_input_dim},
        "lora": NO_LORA,
    }


def with_adapters_config(config: Config, tensors: Tensors, alpha: float) -> Config:
    """Returns the configuration of a network that keeps the adapters in `tensors`."""
    rank, layers = names.adapters(tensors)
    targets = ["x_embedder" if n == "x_embedder.proj.1" else n for n in layers]
    return {**config, "lora": {"rank": rank, "alpha": alpha, "targets": targets}}


class _Action(Kind):
    """The action decoder of mimic-video."""

    stage, title = "action", "action decoder"
    signatures: ClassVar = {"mimic-video": r"^t_embedder\.pair\.|^obs_embedder\."}
    prefixed, dropped = ("mimic-video",), _NO_WEIGHTS
    exports: ClassVar = {"mimic-video": "mimic-video"}

    def infer(self, layout: str, tensors: Tensors, hints: Hints) -> Config:
        # Linear layers of the embedders; at least one, which is then reported as missing.
        depths = (
            max(sum(n.startswith(name) and n.endswith(".weight") for n in tensors), 1)
            for name in ("obs_embedder", "action_embedder")
        )
        found = match(tensors, names.action_decoder(*depths))
        _, positions, width = found.shape("position")
        p = hints.proprio_horizon
        if not 1 <= p < positions:
            raise WeightsError(
                f"--proprio_horizon={p} must be at least 1 (the releases) and less than the "
                f"decoder's {positions} positions."
            )
        decoder = ActionDecoderConfig(
            **_block_sizes(found, width),
            context_dim=found.shape("context_norm.scale")[0],
            time_rank=found.shape("t_embedding_norm.scale")[0],
            action_dim=found.shape("final_layer.linear.kernel")[1],
            action_horizon=positions - p,
            proprio_dim=found.shape("proprio_embedder.layer0.kernel")[0],
            proprio_horizon=p,
            precision=hints.precision,
        )
        return {
            "video_model": {"width": decoder.context_dim},
            "policy_io": {
                "action": {"horizon": decoder.action_horizon, "dim": decoder.action_dim},
                "proprio": {"horizon": p, "dim": decoder.proprio_dim},
            },
            "decoder": presets.decoder_section(decoder),
        }

    def rules(self, layout: str, config: Config) -> Rules:
        return decoder_rules(self._sizes(config))

    def network(self, config: Config) -> Network:
        return presets.decoder_network(self._sizes(config))

    @staticmethod
    def _sizes(config: Config) -> ActionDecoderConfig:
        # Not `Experiment.decoder`: a converted decoder does not know which block it reads.
        action, proprio = config["policy_io"]["action"], config["policy_io"]["proprio"]
        return ActionDecoderConfig(
            **config["decoder"],
            context_dim=config["video_model"]["width"],
            action_dim=action["dim"],
            action_horizon=action["horizon"],
            proprio_dim=proprio["dim"],
            proprio_horizon=proprio["horizon"],
        )


def decoder_rules(config: ActionDecoderConfig) -> Rules:
    """Returns the table of names of an action decoder of these sizes."""
    dims = config.proprio_dim, config.action_dim
    return names.action_decoder(*(len(embedder_widths(dim, config.width)) - 1 for dim in dims))


class _VAE(Kind):
    """The Wan 2.1 VAE, the tokenizer of Cosmos-Predict2."""

    stage, title = "vae", "Wan VAE"
    signatures: ClassVar = {
        "nvidia": r"^encoder\.downsamples\.",
        "diffusers": r"^encoder\.down_blocks\.",
    }
    # Our names of the settings -> those of diffusers.
    _fields: ClassVar = {
        "dim": "base_dim",
        "channel_multipliers": "dim_mult",
        "num_res_blocks": "num_res_blocks",
        "latent_channels": "z_dim",
        "temporal_downsample": "temperal_downsample",
        "latent_mean": "latents_mean",
        "latent_std": "latents_std",
    }

    def infer(self, layout: str, tensors: Tensors, hints: Hints) -> Config:
        if layout == "diffusers":
            published = hints.published or {}
            absent = [name for name in self._fields.values() if name not in published]
            if absent:
                raise WeightsError(
                    "the sizes of a diffusers VAE are in the config.json beside its weights, which "
                    f"lacks {', '.join(absent)}; copy the whole folder."
                )
            sizes = {ours: published[name] for ours, name in self._fields.items()}
        else:
            sizes = self._from_names(tensors)
        # The chunk is in latent frames: 16 frames, as the release streams them. Decoding 61 frames
        # of 480x640 takes a third of the memory of the whole clip.
        config = presets.vae_config({**sizes, "precision": hints.precision, "chunk": 4})
        return {"tokenizer": dataclasses.asdict(config)}

    @staticmethod
    def _from_names(tensors: Tensors) -> dict:
        """Determines the sizes from the encoder's list of residual blocks and downsamplings."""

        def channels(name: str) -> int:
            if name not in tensors:
                raise WeightsError(f"the tensor {name}, which sets the VAE's sizes, is missing.")
            return tensors[name].shape[0]

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
                levels[-1].append(channels(f"encoder.downsamples.{index}.residual.2.weight"))
        dim = channels("encoder.conv1.weight")
        if not all(levels):
            raise WeightsError(f"the encoder's blocks {sorted(blocks)} are incomplete.")
        return {
            "dim": dim,
            "channel_multipliers": tuple(level[-1] // dim for level in levels),
            "num_res_blocks": len(levels[0]),
            "latent_channels": channels("conv2.weight"),
            "temporal_downsample": tuple(temporal),
        }

    def rules(self, layout: str, config: Config) -> Rules:
        table = names.wan_vae if layout == "nvidia" else names.wan_vae_diffusers
        return table(presets.vae_config(config["tokenizer"]))

    def network(self, config: Config) -> Network:
        return presets.vae_network(presets.vae_config(config["tokenizer"]))

    def published(self, config: Config) -> Config:
        sizes = dataclasses.asdict(presets.vae_config(config["tokenizer"]))
        fields = {
            theirs: list(sizes[ours]) if isinstance(sizes[ours], tuple) else sizes[ours]
            for ours, theirs in self._fields.items()
        }
        return {"_class_name": "AutoencoderKLWan", "attn_scales": [], "dropout": 0.0, **fields}


class _Text(Kind):
    """The encoder of T5, which encodes text for Cosmos-Predict2, in Hugging Face's layout."""

    stage, title = "text", "T5 encoder"
    signatures: ClassVar = {"diffusers": r"^encoder\.block\.|^shared\."}
    dropped = "|".join("^" + re.escape(prefix) for prefix in names.IGNORED)
    aliases: ClassVar = names.TIED
    exports: ClassVar = dict.fromkeys(("nvidia", "mimic-video", "diffusers"), "diffusers")

    def infer(self, layout: str, tensors: Tensors, hints: Hints) -> Config:
        published = hints.published or {}
        activation = published.get("feed_forward_proj", "relu")
        if activation != "relu":
            raise WeightsError(
                f"feed_forward_proj={activation!r} is not supported; t5-11b, the text encoder of "
                "Cosmos-Predict2, has 'relu'."
            )
        found = match(tensors, names.T5)
        vocab_size, width = found.shape("token_embedding")
        buckets, heads = found.shape("relative_bias")
        encoder = T5EncoderConfig(
            vocab_size=vocab_size,
            width=width,
            num_blocks=found.blocks,
            num_heads=heads,
            head_dim=found.shape("blocks.q_proj.kernel")[1] // heads,
            mlp_dim=found.shape("blocks.layer1.kernel")[1],
            relative_buckets=buckets,
            max_distance=published.get("relative_attention_max_distance", 128),
            precision=hints.precision,
        )
        return {"text": {"dim": width}, "text_encoder": dataclasses.asdict(encoder)}

    def rules(self, layout: str, config: Config) -> Rules:
        return names.T5

    def network(self, config: Config) -> Network:
        return presets.text_network(T5EncoderConfig(**config["text_encoder"]))

    def published(self, config: Config) -> Config:
        sizes = T5EncoderConfig(**config["text_encoder"])
        return {
            "architectures": ["T5EncoderModel"],
            "model_type": "t5",
            "vocab_size": sizes.vocab_size,
            "d_model": sizes.width,
            "num_layers": sizes.num_blocks,
            "num_heads": sizes.num_heads,
            "d_kv": sizes.head_dim,
            "d_ff": sizes.mlp_dim,
            "relative_attention_num_buckets": sizes.relative_buckets,
            "relative_attention_max_distance": sizes.max_distance,
            "feed_forward_proj": "relu",
            "layer_norm_epsilon": 1e-6,
            "is_encoder_decoder": False,
            "pad_token_id": 0,
            "eos_token_id": 1,
        }


VIDEO, ACTION, VAE, TEXT = _Video(), _Action(), _VAE(), _Text()
KINDS = (ACTION, VIDEO, VAE, TEXT)  # the order in which a file's names are compared
