"""The range of every setting that is a number, and the words that a setting may be.

`RULES` is the one place for what can be said of a setting alone; `Experiment` checks it before
anything else. What several settings must have in common is checked where they meet.
"""

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from mvjax.chunking import CHUNKING
from mvjax.models.attention import KERNELS
from mvjax.models.layers import POLICIES, PRECISIONS
from mvjax.models.video_dit import ATTENTION_TO, BACKBONE_PRECISIONS


@dataclass(frozen=True)
class Number:
    """A finite number in a range; booleans are none.

    Attributes:
        low, high: The bounds, which belong to the range.
        whole: Only integers.
        above, below: The bound is excluded, "above 0", "below 1".
        also: Values outside of the range that mean something else; None for an unset one.
    """

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    above: bool = False
    below: bool = False
    also: tuple[Any, ...] = ()

    def holds(self, value: Any) -> bool:
        """Whether a value is in the range."""
        if isinstance(value, bool):
            return False
        if value is None or isinstance(value, str):
            return value in self.also
        if not isinstance(value, int if self.whole else int | float) or not math.isfinite(value):
            return False
        low = value > self.low if self.above else value >= self.low
        high = value < self.high if self.below else value <= self.high
        return (low and high) or value in self.also

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if not self.above and not self.below and math.isfinite(self.low + self.high):
            kind += f" between {self.low:g} and {self.high:.10g}"
        else:
            bounds = []
            if math.isfinite(self.low):
                bounds.append(f"above {self.low:g}" if self.above else f"at least {self.low:g}")
            if math.isfinite(self.high):
                bounds.append(f"below {self.high:g}" if self.below else f"at most {self.high:g}")
            joined = " and ".join(bounds)
            kind += f" of {joined}" if joined.startswith("at") else f" {joined}" if joined else ""
        return " or ".join([kind, *("unset" if v is None else repr(v) for v in self.also)])


@dataclass(frozen=True)
class Numbers:
    """A list of numbers, each in the same range; `count` of them, or one or more for 0."""

    each: Number
    count: int = 0

    def holds(self, value: Any) -> bool:
        """Whether a value is such a list."""
        if not isinstance(value, tuple | list) or len(value) != (self.count or len(value) or 1):
            return False
        return all(map(self.each.holds, value))

    def __str__(self) -> str:
        return f"{self.count or 'one or more'} values, each {self.each}"


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]

    def holds(self, value: Any) -> bool:
        """Whether a value is one of them; 0 and 1 are not False and True."""
        return any(value == v and type(value) is type(v) for v in self.values)

    def __str__(self) -> str:
        return f"one of {', '.join(map(repr, self.values))}"


Rule = Number | Numbers | Choice

COUNT = Number(1, whole=True)
COUNT_OR_NONE = Number(0, whole=True)
POSITIVE = Number(0, above=True)
SHARE = Number(0, 1)
DECAY = Number(0, 1, below=True)
SEED = Number(0, 2**32 - 1, whole=True)  # beyond, jax and numpy would take another one's place
AXIS = Number(1, whole=True, also=(-1,))
SWITCH = Choice((False, True))

_NETWORK = {
    "width": COUNT,
    "num_blocks": COUNT,
    "num_heads": COUNT,
    "adaln_rank": COUNT,
    "mlp_ratio": COUNT,
    "precision": Choice(tuple(PRECISIONS)),
    "attention": Choice(tuple(KERNELS)),
    "remat": Choice(tuple(POLICIES)),
}

# By dotted name; * is any name, of a dataset or a stream.
RULES: dict[str, Rule] = {
    "max_bad_share": SHARE,
    "validation_share": SHARE,
    "context_layer": COUNT_OR_NONE,
    "context_frames": Choice(("all", "observed")),
    "lora.rank": COUNT_OR_NONE,  # 0: everything learns
    "lora.alpha": Number(0),
    "sampler.video_steps": COUNT,
    "sampler.action_steps": COUNT,
    "sampler.sigma_max": POSITIVE,
    "sampler.sigma_min": POSITIVE,
    "sampler.seed": SEED,
    "sampler.draws": COUNT,
    "sampler.fresh_noise": SWITCH,
    "sampler.chunking": Choice(CHUNKING),
    "mesh.data": AXIS,
    "mesh.fsdp": AXIS,
    "mesh.context": AXIS,
    "mesh.tensor": AXIS,
    "optimizer.learning_rate": SHARE,
    "optimizer.schedule": Choice(("constant", "linear", "cosine")),
    "optimizer.backbone_rate": POSITIVE,
    "optimizer.warmup_steps": COUNT_OR_NONE,
    "optimizer.decay_steps": COUNT_OR_NONE,
    "optimizer.final_fraction": SHARE,
    "optimizer.b1": DECAY,
    "optimizer.b2": DECAY,
    "optimizer.eps": POSITIVE,
    "optimizer.weight_decay": Number(0),
    "optimizer.clip_norm": Number(0),  # 0: no clipping
    "optimizer.mu_dtype": Choice(("", "float32", "bfloat16")),  # "": float32
    "training.steps": COUNT,
    "training.batch_size": COUNT,
    "training.accumulate": COUNT,
    "training.seed": SEED,
    "training.ema_decay": DECAY,  # 0: no average
    "training.log_every": COUNT,
    "training.checkpoint_every": COUNT,
    "training.keep": COUNT,
    "training.keep_every": COUNT_OR_NONE,
    "training.sample_every": COUNT_OR_NONE,
    "training.sample_count": COUNT_OR_NONE,
    "training.episodes_per_task": Number(
        1, whole=True, also=("one", "tenth", "half", "full", None)
    ),
    "flow.sigma_scale": POSITIVE,
    "flow.sigma_tail": SHARE,
    "flow.min_condition_latents": COUNT,
    "flow.loss_scale": POSITIVE,
    "flow.action_time_alpha": POSITIVE,
    "flow.action_time_beta": POSITIVE,
    "flow.proprio_dropout": SHARE,
    "flow.sampling_sigma_share": SHARE,
    "flow.action_draws": COUNT,
    "flow.video_weight": POSITIVE,
    "flow.action_weight": POSITIVE,
    "flow.action_gradient": SWITCH,
    "flow.prefix": COUNT_OR_NONE,  # 0: no action of a chunk is given
    "flow.prefix_share": SHARE,
    "clip.height": COUNT,
    "clip.width": COUNT,
    "clip.observed_frames": COUNT,
    "clip.future_frames": COUNT,
    "clip.fps": POSITIVE,
    "clip.views.*.height": COUNT,
    "clip.views.*.width": COUNT,
    "policy_io.*.horizon": COUNT,
    "policy_io.*.dim": COUNT,
    "policy_io.*.fps": POSITIVE,
    "policy_io.*.shift": Number(),
    "policy_io.*.mask_padding": SWITCH,
    "text.length": COUNT,
    "text.dim": COUNT,
    **{f"video_model.{name}": rule for name, rule in _NETWORK.items()},
    "video_model.attention_to": Choice(ATTENTION_TO),
    "video_model.text_dim": COUNT,
    "video_model.rope_ratio_thw": Numbers(POSITIVE, 3),
    "video_model.text_projection_dim": COUNT_OR_NONE,
    "video_model.timestep_scale": POSITIVE,
    **{f"decoder.{name}": rule for name, rule in _NETWORK.items()},
    "decoder.time_rank": COUNT,
    "backbone.precision": Choice(BACKBONE_PRECISIONS),
    "datasets.*.weight": Number(0),  # those that a stage reads need more
    "datasets.*.anchor_fps": Number(0, above=True, also=(None,)),
    "datasets.*.augment.variants": COUNT,  # 1: off
    "datasets.*.augment.crop": Number(0, 1, above=True),
    "datasets.*.augment.rotation": Number(0, 45),
    "datasets.*.augment.brightness": SHARE,
    "datasets.*.augment.contrast": SHARE,
    "datasets.*.augment.saturation": SHARE,
    "datasets.*.augment.hue": Number(0, 0.5),
    "evaluation.episodes_per_task": COUNT,
    "evaluation.first_seed": SEED,
    "evaluation.execute": COUNT,
    "evaluation.max_steps": Number(1, whole=True, also=(None,)),
    "evaluation.workers": COUNT,
    "evaluation.videos_per_task": COUNT_OR_NONE,
    "evaluation.sweep_episodes": COUNT,
    "evaluation.oracle_step": COUNT_OR_NONE,
    "recording.*.episodes": COUNT,
    "recording.*.seed": SEED,
    "recording.*.kind": Choice(("robot", "video")),
    "study.video_steps": COUNT,
    "study.demonstrations": Numbers(COUNT),
    "study.seeds": COUNT,
    "study.steps": COUNT,
    "study.episodes_per_task": COUNT,
}


# Other settings of the sections above; those of `options` belong to the format.
_NAMES = {
    "lora.targets",
    "backbone.checkpoint",
    "evaluation.suite",
    "evaluation.tasks",
    "recording.*.tasks",
    "recording.*.cameras",
    *(
        f"datasets.*.{name}"
        for name in ("name", "records", "format", "path", "options", "embodiment", "video")
    ),
    *("datasets.*.action", "datasets.*.proprio", "datasets.*.views.*"),
}
_KNOWN = {*RULES, *_NAMES}
_SECTIONS = {name.partition(".")[0] for name in _KNOWN if "." in name}


def check_ranges(config: Mapping[str, Any]) -> None:
    """Raises ValueError for the first setting out of its range, naming it, its value and the range.

    A setting that no one reads is most likely misspelt, so it is refused, too; sections of one's
    own are not.

    Args:
        config: Whole or in part, with every reference resolved.
    """
    for name, value in settings(config):
        rule = rule_of(name)
        if rule is None:
            _check_name(name)
        if rule is not None and not rule.holds(value):
            raise ValueError(f"{name} must be {rule}, got {value!r}.")


def rule_of(name: str) -> Rule | None:
    """The rule of a setting by its dotted name, or None."""
    return RULES.get(name) or RULES.get(_general(name))


def _general(name: str) -> str:
    """datasets.robot.weight -> datasets.*.weight; clip.views.wrist.width -> clip.views.*.width."""
    parts = name.split(".")
    for places in ((1,), (2,), (1, 3)):
        general = ".".join("*" if i in places else part for i, part in enumerate(parts))
        if general in _KNOWN:
            return general
    return ".".join([parts[0], "*", *parts[2:]]) if len(parts) > 2 else name


def _check_name(name: str) -> None:
    """Raises ValueError for a setting that is unknown in a section that is known."""
    general, section = _general(name), name.partition(".")[0]
    known = {other for other in _KNOWN if other.startswith(f"{section}.")}
    if section not in _SECTIONS or general in known or general.startswith("datasets.*.options."):
        return
    close = difflib.get_close_matches(general, known, 1)
    meant = f"; did you mean {close[0].rpartition('.')[2]!r}?" if close else "."
    raise ValueError(f"the configuration has no setting {name!r}{meant}")


def settings(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a configuration by their dotted names."""
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            yield from settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
