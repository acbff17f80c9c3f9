"""What the converter has to know about a network; one instance per kind of network."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mvjax.checkpoints.torch_weights.rules import Rules
from mvjax.checkpoints.torch_weights.tensors import Tensors
from mvjax.models.parameters import Network

Config = dict[str, Any]  # sections of a configuration, as stored beside a checkpoint


@dataclass(frozen=True)
class Hints:
    """What a file of weights does not say, and a person may.

    Attributes:
        rope_ratio_thw: rotary extrapolation ratios of a video DiT; None for what its configuration
            says, or else a released model of its size has.
        proprio_horizon: of an action decoder's positions, how many are proprioception.
        precision: in which the network is computed by default (`mvjax.models.precision`).
        published: the configuration that came with the weights (`config.json` of a Hugging Face
            folder), or nothing.
    """

    rope_ratio_thw: tuple[float, float, float] | None = None
    proprio_horizon: int = 1
    precision: str = "bfloat16"
    published: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Kind:
    """A kind of network, in every layout it is published in.

    Attributes:
        stage: what a converted checkpoint calls itself, e.g. "video".
        title: for messages, e.g. "video DiT".
        signatures: layout -> pattern of names that only this kind in this layout has.
        prefixed: layouts whose names start with "net." (and "net_ema." for the moving average).
        dropped: pattern of names that hold nothing of the network.
        aliases: name -> the name under which the same tensor is known here.
        infer: (layout, tensors, hints) -> configuration, from names and shapes.
        rules: (layout, configuration) -> the table of names.
        network: configuration -> the network.
        exports: for whom it can be written -> the layout.
        published: configuration -> `config.json` of the layout "diffusers".
    """

    stage: str
    title: str
    signatures: Mapping[str, str]
    prefixed: tuple[str, ...]
    dropped: str
    aliases: Mapping[str, str]
    infer: Callable[[str, Tensors, Hints], Config]
    rules: Callable[[str, Config], Rules]
    network: Callable[[Config], Network]
    exports: Mapping[str, str]
    published: Callable[[Config], Config] | None
