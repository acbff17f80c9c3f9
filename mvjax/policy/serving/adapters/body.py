"""A policy's vectors in the words of its configuration, and a client's numbers turned into them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data_pipelines.vectors.parts import bases, parse, streams
from data_pipelines.vectors.representations import Part
from data_pipelines.vectors.vector import restore, vector
from mvjax.policy.serving.adapters.adapter import Adapter

Split = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""A client's state [..., state_size] as streams by name, [..., any]."""


@dataclass(frozen=True)
class Body:
    """What a policy takes and gives.

    Attributes:
        action, proprio: what its vectors are made of (`data_pipelines.vectors.parts`).
        action_dim, proprio_dim: their widths.
    """

    action: tuple[Part, ...]
    proprio: tuple[Part, ...]
    action_dim: int
    proprio_dim: int


def body_of(config: Any) -> Body:
    """The body that a policy acts with: `config.embodiment`, or the only one it has learned from.

    Args:
        config: the configuration of a stage-2 run.
    """
    io, wanted = config.policy_io, config.get("embodiment", "")
    acting = [
        dataset
        for dataset in config.datasets.values()
        if dataset.action and wanted in ("", dataset.embodiment)
    ]
    described = (acting[0].action, acting[0].proprio) if acting else ("", "")
    action, proprio = map(parse, described, ("action", "proprio"))
    return Body(action, proprio, io.action.dim, io.proprio.dim)


def converted(adapter: Adapter, body: Body, split: Split) -> Adapter:
    """An adapter whose client speaks in the streams that a body is described by.

    Args:
        adapter: of the client, in its own numbers.
        body: the policy's vectors; their streams and bases must be among those of `split`.
        split: the streams in the client's state.
    """

    def proprio(states: np.ndarray) -> np.ndarray:
        return vector(body.proprio, split(states), split(states[-1]), body.proprio_dim)

    def actions(chunk: np.ndarray, state: np.ndarray) -> np.ndarray:
        restored = restore(body.action, chunk, split(state))
        flat = [restored[name].reshape(len(chunk), -1) for name in streams(body.action)]
        return np.concatenate(flat, axis=1).astype(np.float32)

    return replace(adapter, proprio=proprio, actions=actions)


def is_described_by(body: Body, names: set[str]) -> bool:
    """Whether these streams are all that a body's vectors need of a client's state."""
    needed = {*streams(body.proprio), *bases(body.proprio), *bases(body.action)}
    return bool(body.action and body.proprio) and needed <= names
