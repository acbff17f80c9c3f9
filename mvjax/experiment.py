"""What a configuration means, worked out and cross-checked once.

A configuration is a document (configs/). An `Experiment` is everything that follows from it: the
clip, the networks, the sharding rules, the sampling, the datasets of a stage. Training, encoding,
the policy, evaluation, benchmarks and estimates take an experiment or a part of it, and do not
interpret sections of the configuration themselves.

    experiment = Experiment.from_config(config)     # raises for mistakes that need no data to see
    mesh = experiment.mesh()                        # the devices of this job
    experiment.clip.tokens, experiment.video.width, experiment.video_network.abstract
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data_pipelines.augment import Augment
from data_pipelines.clip import CHANNELS, Clip, tokens
from data_pipelines.records import entry
from mvjax.flow import Sampling
from mvjax.models.action_decoder import ActionDecoderConfig
from mvjax.models.lora import LoRA
from mvjax.models.network import Network
from mvjax.models.presets import PUBLISHED_LORA_TARGETS, decoder_network, video_network
from mvjax.models.video_dit import VideoDiTConfig
from mvjax.parallel import Rules, make_mesh, make_rules, split_ways
from mvjax.ranges import check_ranges

STAGES = ("video", "action", "joint")
# Settings of joint training alone, and those of the other stages that it does not read.
JOINT_SETTINGS = (
    "flow.video_weight",
    "flow.action_weight",
    "flow.action_gradient",
    "optimizer.backbone_rate",
)
_ELSEWHERE = {
    "flow.loss_scale": "flow.video_weight and flow.action_weight scale the two losses",
    "flow.min_condition_latents": "all observed latents are clean, as the policy has them",
    "backbone.checkpoint": "it trains its own backbone, which init_from may name the start of",
}


@dataclass(frozen=True, eq=False)
class Experiment:
    """A configuration and what follows from it; make it with `from_config`.

    The configuration may be partial (converted weights have only `video_model` and `text`): each
    property needs the sections that it follows from, and no others.

    Attributes:
        config: A copy with every reference resolved, so that a later change of the original cannot
            disagree with the properties. Read it directly for settings used in one place only.
    """

    config: ConfigDict

    @classmethod
    def from_config(cls, config: Any) -> "Experiment":
        """Resolves and cross-checks a configuration, as far as its sections go.

        Args:
            config: A ConfigDict or nested mapping, from configs/ or from a checkpoint.

        Raises:
            ValueError: If a setting is impossible or two disagree; the message names them.
        """
        experiment = cls(ConfigDict(config).copy_and_resolve_references())
        experiment._check()
        return experiment

    def changed(self, settings: Mapping[str, Any]) -> "Experiment":
        """A copy with other settings, given by their dotted names."""
        config = self.config.copy_and_resolve_references()
        config.update_from_flattened_dict(settings)
        return Experiment.from_config(config)

    @property
    def stage(self) -> str:
        """What is trained: "video" or "action", one network, or "joint", both."""
        if self.config.stage not in STAGES:
            *others, last = map(repr, STAGES)
            raise ValueError(
                f"config.stage must be {', '.join(others)} or {last}, got {self.config.stage!r}."
            )
        return self.config.stage

    @property
    def learns_video(self) -> bool:
        """Whether the stage trains the video DiT."""
        return self.stage in ("video", "joint")

    @property
    def learns_actions(self) -> bool:
        """Whether the stage trains the action decoder."""
        return self.stage in ("action", "joint")

    @cached_property
    def clip(self) -> Clip:
        """The sizes of the video, in frames, latents and tokens."""
        return Clip(**self.config.clip)

    @property
    def context_frames(self) -> str:
        """What the decoder reads of the video: "all" of it, or the "observed" frames alone."""
        return self.config.get("context_frames", "all")

    @property
    def read_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Latents (frames, height, width, channels) in the video DiT: the video's, every view's.

        Stage 2 gives it the observed frames alone where `context_frames` is "observed".
        """
        reads = self.config.get("stage") == "action" and self.context_frames == "observed"
        return self.clip.read_shapes(observed_only=reads)

    @property
    def tokens(self) -> int:
        """Length of the video DiT's sequence: the video and all views."""
        return sum(map(tokens, self.read_shapes))

    @property
    def context_tokens(self) -> int:
        """Tokens of the video DiT that the decoder reads."""
        shapes = self.clip.read_shapes(observed_only=self.context_frames == "observed")
        return sum(map(tokens, shapes))

    @cached_property
    def video(self) -> VideoDiTConfig:
        """The video DiT, with LoRA where `lora.rank` is not 0."""
        config = self.config
        rank, alpha = config.lora.rank, config.lora.alpha
        if rank and not alpha:
            raise ValueError("lora.alpha is 0: the adapters would change nothing.")
        targets = config.lora.targets
        if rank and not (targets and set(targets) <= set(PUBLISHED_LORA_TARGETS)):
            raise ValueError(
                f"lora.targets must be one or more of {', '.join(PUBLISHED_LORA_TARGETS)}, the "
                f"layers that can have adapters; got {targets!r}."
            )
        # A text projection lets the network's text width differ from text.dim.
        fields = {"text_dim": config.text.dim, **config.video_model}
        fields["rope_ratio_thw"] = tuple(fields["rope_ratio_thw"])
        first = fields.get("attention_to", "all") == "observed_first"
        model = VideoDiTConfig(
            **fields,
            latent_channels=CHANNELS,
            observed_latents=self.clip.condition_latents if first else 0,
            views=tuple(sorted(config.get("clip", {}).get("views") or ())),
            lora=LoRA(rank, alpha, tuple(targets)) if rank else None,
        )
        if model.text_input_dim != config.text.dim:
            raise ValueError(
                f"The video model takes text of width {model.text_input_dim} "
                f"(video_model.text_dim, text_projection_dim), but text.dim is {config.text.dim}."
            )
        if model.timestep_scale != 1:
            raise ValueError(
                f"video_model.timestep_scale is {model.timestep_scale}, but training and the "
                "policy call the network with τ itself: use 1.0."
            )
        return model

    @cached_property
    def video_network(self) -> Network:
        """The video DiT without weights."""
        return video_network(self.video)

    @cached_property
    def decoder(self) -> ActionDecoderConfig:
        """The action decoder, which reads the residual stream after block `context_layer`."""
        config = self.config
        layer, blocks = config.context_layer, config.video_model.num_blocks
        if not 0 <= layer <= blocks:
            raise ValueError(
                f"context_layer is {layer}, but the video model has blocks 1 to {blocks} (0 is "
                "the patch embedding)."
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

    @cached_property
    def decoder_network(self) -> Network:
        """The action decoder without weights."""
        return decoder_network(self.decoder)

    @cached_property
    def rules(self) -> Rules:
        """Logical axis of an array -> the axes of the mesh that split it."""
        return make_rules(self.config.rules)

    def mesh(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh of `config.mesh` over the given devices, or over all devices of the job."""
        return make_mesh(self.config.mesh, devices)

    def check_batch(self, mesh: Any) -> None:
        """Raises ValueError unless every device gets whole samples in every micro-batch."""
        training, rules = self.config.training, self.rules
        ways = split_ways("batch", mesh, rules)
        if training.batch_size % (training.accumulate * ways):
            axes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in rules["batch"]) or "1"
            raise ValueError(
                f"training.batch_size is {training.batch_size}; it must be a multiple of "
                f"{training.accumulate * ways}, training.accumulate = {training.accumulate} times "
                f"the mesh axes of the batch, {axes} (fewer samples than devices need "
                "config.mesh.context or .tensor)."
            )

    def sampling(self, **changes: Any) -> Sampling:
        """The sampling of `config.sampler`, with changes such as `stop_step=5`.

        Raises:
            ValueError: If it denoises a video, or takes a true one, that the decoder does not read.
        """
        sampling = Sampling(**{**self.config.sampler, **changes})
        if self.context_frames == "observed" and (sampling.stop_step or sampling.oracle):
            wanted = "the true future" if sampling.oracle else f"stop step {sampling.stop_step}"
            raise ValueError(
                f"This policy reads the observed frames alone (context_frames='observed'), so "
                f"{wanted} would change nothing: evaluate it with mode policy at stop step 0."
            )
        return sampling

    @property
    def datasets(self) -> list[ConfigDict]:
        """The sections of the datasets that the stage learns from.

        Stage 2 reads those with actions: its video model is frozen, so a window without actions
        would teach nothing.
        """
        every = self.config.datasets.values()
        return [d for d in every if d.action or self.learns_video]

    @property
    def batch_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each entry of a sample, as the loader gives it (float32), without the batch."""
        text = self.config.text
        shapes = {"latents": self.clip.latent_shape, "text": (text.length, text.dim)}
        shapes |= {entry(name): shape for name, shape in self.clip.view_shapes.items()}
        if self.learns_actions:
            io = self.config.policy_io
            action = (io.action.horizon, io.action.dim)
            proprio = (io.proprio.horizon, io.proprio.dim)
            shapes |= {"actions": action, "action_mask": action, "proprio": proprio}
        return shapes

    def _check(self) -> None:
        """Every check that needs neither data nor devices."""
        config = self.config
        check_ranges(config)
        self._check_crops()
        if "clip" in config:
            _ = self.clip
        if {"video_model", "lora", "text"} <= set(config):
            _ = self.video
        if "stage" in config:
            self._check_stage()
        if "rules" in config:
            _ = self.rules
        if "sampler" in config:
            self.sampling()
        if "stage" in config and "flow" in config:
            self._check_flow()

    def _check_stage(self) -> None:
        """Refuses settings that would have no effect in this stage."""
        config, joint = self.config, self.stage == "joint"
        if self.learns_actions:
            _ = self.decoder
        if not joint:
            for name in ("decoder_init_from", *JOINT_SETTINGS):
                if named := _setting(config, name):
                    raise ValueError(
                        f"{name} is {named[0]!r}, but config.stage is {self.stage!r}: only joint "
                        "training (stage 'joint') has it, so remove it."
                    )
            return
        for name, instead in _ELSEWHERE.items():
            if named := _setting(config, name):
                raise ValueError(
                    f"{name} is {named[0]!r}, but joint training does not read it: {instead}."
                )
        if "datasets" in config and not any(d.action for d in config.datasets.values()):
            raise ValueError(
                "None of config.datasets has actions, so there is nothing for the decoder to "
                "learn: add one that has, or train stage 1 (config.stage='video')."
            )
        first = config.video_model.get("attention_to", "all") == "observed_first"
        if self.context_frames == "observed" and not first:
            raise ValueError(
                "context_frames is 'observed', but in joint training the observed frames attend to "
                "the noisy future, which the policy will not have: set "
                "video_model.attention_to='observed_first', or context_frames='all'."
            )

    def _check_crops(self) -> None:
        """Every `augment` is possible, and those of one robot show a policy the same crop."""
        first: dict[str, str] = {}
        datasets = self.config.get("datasets") or {}
        crops = {key: Augment.of(dataset).crop for key, dataset in datasets.items()}
        for key, dataset in datasets.items():
            if not dataset.get("action"):
                continue
            other = first.setdefault(dataset.get("embodiment") or "", key)
            if crops[key] != crops[other]:
                raise ValueError(
                    f"datasets.{other} and datasets.{key} are of the same robot, but a policy would"
                    f" see {crops[other]} of the pictures of one and {crops[key]} of the other "
                    "(augment.crop; 1 without augment): give both the same crop."
                )

    def _check_flow(self) -> None:
        flow = self.config.flow
        if self.learns_actions and (longest := flow.get("prefix", 0)):
            horizon = self.config.policy_io.action.horizon
            if longest >= horizon:
                raise ValueError(
                    f"flow.prefix is {longest}, but a chunk has {horizon} actions "
                    "(policy_io.action.horizon): it must be less, or nothing is left to learn."
                )
            if not flow.prefix_share:
                raise ValueError(
                    f"flow.prefix is {longest}, but flow.prefix_share is 0, so no draw would have "
                    "given actions: raise the share, or set flow.prefix to 0."
                )
        if self.stage == "video" and not (
            1 <= flow.min_condition_latents <= self.clip.condition_latents
        ):
            raise ValueError(
                f"flow.min_condition_latents is {flow.min_condition_latents}; with "
                f"{self.clip.observed_frames} observed frames it must be between 1 and "
                f"{self.clip.condition_latents}."
            )


def _setting(config: ConfigDict, name: str) -> tuple[Any, ...]:
    """The value of a setting by its dotted name; () where it is missing or empty."""
    section, _, last = name.rpartition(".")
    value = (config.get(section, {}) if section else config).get(last, "")
    return () if value == "" else (value,)
