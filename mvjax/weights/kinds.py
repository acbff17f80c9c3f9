"""What the converter has to know about a network; one instance per kind of network.

VIDEO is the video DiT, ACTION the action decoder, VAE the Wan VAE and TEXT the T5 encoder.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from data_pipelines.clip import CHANNELS, PATCH
from mvjax.experiment import Experiment
from mvjax.models.action_decoder import ActionDecoderConfig, embedder_widths
from mvjax.models.network import Network
from mvjax.models.presets import (
    VIDEO_DITS,
    decoder_network,
    decoder_section,
    text_network,
    vae_config,
    vae_network,
    video_section,
)
from mvjax.models.t5 import T5EncoderConfig
from mvjax.models.video_dit import VideoDiTConfig
from mvjax.models.wan_vae import WanVAEConfig
from mvjax.weights.files import Tensors, WeightsError
from mvjax.weights.match import match
from mvjax.weights.names import (
    IGNORED,
    T5,
    TIED,
    Rules,
    action_decoder,
    adapted_layers,
    adapter_rank,
    video_dit,
    video_dit_diffusers,
    wan_vae,
    wan_vae_diffusers,
    with_adapters,
)

Config = dict[str, Any]  # sections of a configuration, as stored beside a checkpoint


@dataclass(frozen=True)
class Hints:
    """What a file of weights does not say, and a person may.

    Attributes:
        rope_ratio_thw: rotary extrapolation ratios of a video DiT; None for what its configuration
            says, or else a released model of its size has.
        proprio_horizon: of an action decoder's positions, how many are proprioception.
        precision: in which the network is computed by default (`mvjax.models.layers`).
        published: the configuration that came with the weights (`config.json` of a Hugging Face
            folder), or nothing.
    """

    rope_ratio_thw: tuple[float, float, float] | None = None
    proprio_horizon: int = 1
    precision: str = "bfloat16"
    published: Mapping[str, Any] | None = None


class Kind:
    """A kind of network, in every layout it is published in.

    Attributes:
        stage: what a converted checkpoint calls itself, e.g. "video".
        title: for messages, e.g. "video DiT".
        signatures: layout -> pattern of names that only this kind in this layout has.
        prefixed: layouts whose names start with "net." (and "net_ema." for the moving average).
        dropped: pattern of names that hold nothing of the network.
        aliases: name -> the name under which the same tensor is known here.
        exports: for whom it can be written -> the layout.
    """

    stage: str
    title: str
    signatures: ClassVar[Mapping[str, str]]
    prefixed: tuple[str, ...] = ()
    dropped: str = r"^$"
    aliases: ClassVar[Mapping[str, str]] = {}
    exports: ClassVar[Mapping[str, str]] = {
        "nvidia": "nvidia",
        "mimic-video": "nvidia",
        "diffusers": "diffusers",
    }

    def infer(self, layout: str, tensors: Tensors, hints: Hints) -> Config:
        """The configuration, from names and shapes; raises WeightsError if they do not tell."""
        raise NotImplementedError

    def rules(self, layout: str, config: Config) -> Rules:
        """The table of names."""
        raise NotImplementedError

    def network(self, config: Config) -> Network:
        """The network without weights."""
        raise NotImplementedError

    def published(self, config: Config) -> Config:
        """The `config.json` of the layout "diffusers", where the kind has that layout."""
        raise NotImplementedError


# State of Transformer Engine, counters and buffers in files of NVIDIA and mimic-video.
_NO_WEIGHTS = r"(^|\.)_extra_state$|^accum_|^pos_embedder\."


class _Video(Kind):
    """Cosmos-Predict2 and 2.5, and the fine-tuned backbones of mimic-video."""

    stage, title = "video", "video DiT"
    signatures: ClassVar = {
        "nvidia": r"^x_embedder\.|^t_embedder\.1\.",
        "diffusers": r"^transformer_blocks\.|^patch_embed\.proj\.",
    }
    prefixed, dropped = ("nvidia",), _NO_WEIGHTS
    _tables: ClassVar = {"nvidia": video_dit, "diffusers": video_dit_diffusers}

    def infer(self, layout: str, tensors: Tensors, hints: Hints) -> Config:
        projected = "crossattn_proj.0.weight" in tensors
        found = match(tensors, self._tables[layout](projected))
        features, width = found.shape("x_embedder.kernel")
        masks = 2  # condition and padding mask, beside the latents
        if features != (CHANNELS + masks) * PATCH**2:
            raise WeightsError(
                f"the patch embedding reads {features} features per patch; a video model of "
                f"{CHANNELS} latent channels, a condition mask and a padding mask reads "
                f"{(CHANNELS + masks) * PATCH**2}. Text-to-image models have no condition mask "
                "and cannot be converted."
            )
        sizes = dict(
            width=width,
            num_blocks=found.blocks,
            num_heads=width // found.shape("blocks.self_attn.q_norm.scale")[0],
            text_dim=found.shape("blocks.cross_attn.k_proj.kernel")[0],
            adaln_rank=found.shape("blocks.adaln_mlp.down.kernel")[1],
            mlp_ratio=found.shape("blocks.mlp.layer1.kernel")[1] // width,
            text_projection_dim=found.shape("text_projection.kernel")[0] if projected else 0,
        )
        # The tensors cannot tell the rotary ratios.
        released = (
            preset.rope_ratio_thw
            for preset in VIDEO_DITS.values()
            if all(getattr(preset, name) == value for name, value in sizes.items())
        )
        said = hints.rope_ratio_thw or tuple((hints.published or {}).get("rope_scale", ()))
        ratios = said or next(released, None)
        if ratios is None:
            raise WeightsError(
                f"a video DiT of width {width} with {found.blocks} blocks is no released size, "
                "and its weights do not tell the rotary extrapolation ratios; give "
                "--rope_ratio_thw, e.g. 1,3,3 (as Cosmos-Predict2 2B)."
            )
        model = VideoDiTConfig(**sizes, rope_ratio_thw=ratios, precision=hints.precision)
        return video_sections(model)

    def rules(self, layout: str, config: Config) -> Rules:
        rules = self._tables[layout](bool(config["video_model"].get("text_projection_dim")))
        lora = config["lora"]
        return with_adapters(rules, tuple(lora["targets"])) if lora["rank"] else rules

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


class _Action(Kind):
    """The action decoder of mimic-video."""

    stage, title = "action", "action decoder"
    signatures: ClassVar = {"mimic-video": r"^t_embedder\.pair\.|^obs_embedder\."}
    prefixed, dropped = ("mimic-video",), _NO_WEIGHTS
    exports: ClassVar = {"mimic-video": "mimic-video"}

    def infer(self, layout: str, tensors: Tensors, hints: Hints) -> Config:
        # Linear layers of the embedders; at least one, which is then said to be missing.
        depths = (
            max(sum(n.startswith(name) and n.endswith(".weight") for n in tensors), 1)
            for name in ("obs_embedder", "action_embedder")
        )
        found = match(tensors, action_decoder(*depths))
        _, positions, width = found.shape("position")
        p = hints.proprio_horizon
        if not 1 <= p < positions:
            raise WeightsError(
                f"the decoder has {positions} positions, of which --proprio_horizon={p} cannot be "
                "proprioception; use a number from 1 (the releases) to less than that."
            )
        decoder = ActionDecoderConfig(
            width=width,
            num_blocks=found.blocks,
            num_heads=width // found.shape("blocks.self_attn.q_norm.scale")[0],
            context_dim=found.shape("context_norm.scale")[0],
            adaln_rank=found.shape("blocks.adaln_mlp.down.kernel")[1],
            time_rank=found.shape("t_embedding_norm.scale")[0],
            action_dim=found.shape("final_layer.linear.kernel")[1],
            action_horizon=positions - p,
            proprio_dim=found.shape("proprio_embedder.layer0.kernel")[0],
            proprio_horizon=p,
            mlp_ratio=found.shape("blocks.mlp.layer1.kernel")[1] // width,
            precision=hints.precision,
        )
        return {
            "video_model": {"width": decoder.context_dim},
            "policy_io": {
                "action": {"horizon": decoder.action_horizon, "dim": decoder.action_dim},
                "proprio": {"horizon": p, "dim": decoder.proprio_dim},
            },
            "decoder": decoder_section(decoder),
        }

    def rules(self, layout: str, config: Config) -> Rules:
        decoder = self._sizes(config)
        dims = decoder.proprio_dim, decoder.action_dim
        return action_decoder(*(len(embedder_widths(dim, decoder.width)) - 1 for dim in dims))

    def network(self, config: Config) -> Network:
        return decoder_network(self._sizes(config))

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


class _VAE(Kind):
    """The Wan 2.1 VAE, tokenizer of Cosmos-Predict2."""

    stage, title = "vae", "Wan VAE"
    signatures: ClassVar = {
        "nvidia": r"^encoder\.downsamples\.",
        "diffusers": r"^encoder\.down_blocks\.",
    }
    # diffusers' names of what the configuration holds.
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
            sizes = self._from_published(hints.published or {})
        else:
            sizes = self._from_names(tensors)
        # Latent frames at a time: 16 frames, as the release streams them. Decoding 61 frames of
        # 480x640 takes a third of the memory that the whole clip would.
        config = vae_config({**sizes, "precision": hints.precision, "chunk": 4})
        return {"tokenizer": dataclasses.asdict(config)}

    def _from_published(self, published: Mapping[str, Any]) -> dict:
        absent = [name for name in self._fields.values() if name not in published]
        if absent:
            problem = f"which lacks {', '.join(absent)}" if published else "which is not there"
            raise WeightsError(
                "a diffusers VAE is described by the config.json beside its weights, "
                f"{problem}; copy the whole folder."
            )
        return {ours: published[name] for ours, name in self._fields.items()}

    @staticmethod
    def _from_names(tensors: Tensors) -> dict:
        """Sizes from the encoder's list of residual blocks and downsamplings."""

        def channels(name: str) -> int:
            if name not in tensors:
                problem = f"the tensor {name}, which tells the sizes of the VAE, is missing."
                raise WeightsError(problem)
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
        table = wan_vae if layout == "nvidia" else wan_vae_diffusers
        return table(self._sizes(config))

    def network(self, config: Config) -> Network:
        return vae_network(self._sizes(config))

    def published(self, config: Config) -> Config:
        sizes = dataclasses.asdict(self._sizes(config))
        fields = {
            theirs: list(sizes[ours]) if isinstance(sizes[ours], tuple) else sizes[ours]
            for ours, theirs in self._fields.items()
        }
        return {"_class_name": "AutoencoderKLWan", "attn_scales": [], "dropout": 0.0, **fields}

    @staticmethod
    def _sizes(config: Config) -> WanVAEConfig:
        return vae_config(config["tokenizer"])


class _Text(Kind):
    """T5's encoder, text encoder of Cosmos-Predict2, in the layout of Hugging Face."""

    stage, title = "text", "T5 encoder"
    signatures: ClassVar = {"diffusers": r"^encoder\.block\.|^shared\."}
    dropped = "|".join("^" + re.escape(prefix) for prefix in IGNORED)
    aliases: ClassVar = TIED
    exports: ClassVar = dict.fromkeys(("nvidia", "mimic-video", "diffusers"), "diffusers")

    def infer(self, layout: str, tensors: Tensors, hints: Hints) -> Config:
        published = hints.published or {}
        activation = published.get("feed_forward_proj", "relu")
        if activation != "relu":
            raise WeightsError(
                f"this T5 has feed_forward_proj={activation!r}; the encoder of Cosmos-Predict2 "
                "(t5-11b) has 'relu', and no other is known here."
            )
        found = match(tensors, T5)
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
        return T5

    def network(self, config: Config) -> Network:
        return text_network(T5EncoderConfig(**config["text_encoder"]))

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
