"""A policy as a server: what its clients are told, and in which batches they are answered."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from mvjax.parallel.rules import split_ways
from mvjax.policy.observation import Observation
from mvjax.policy.policy import Policy
from mvjax.policy.serving.adapters.adapter import Adapter
from mvjax.policy.serving.batcher import Batcher, Plan
from mvjax.policy.serving.server import PolicyServer, Serving
from mvjax.policy.serving.sessions import Senses


@dataclass(frozen=True)
class Batching:
    """How queries are put together.

    Attributes:
        sizes: of the batches that are compiled; a batch is padded to the smallest that holds it.
        window: seconds that a query waits for others while fewer than all clients have asked.
    """

    sizes: Sequence[int] = (1, 8)
    window: float = 0.005

    def __post_init__(self):
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"Batch sizes are at least 1, got {list(self.sizes)}.")


def make_server(
    policy: Policy,
    config: Any,
    adapter: Adapter,
    serving: Serving,
    *,
    batching: Batching = Batching(),
    prompt: str = "",
) -> PolicyServer:
    """Compiles the policy for every batch size, and puts it behind a server.

    Args:
        policy: a trained one.
        config: the stage-2 configuration it was trained with.
        adapter: the kind of client.
        serving: address and limits.
        batching: how queries are put together.
        prompt: the instruction of clients that send none.
    """
    sizes, clip, io = policy.model.decoder.config, policy.model.clip, config.policy_io
    plan = plan_in_sizes(policy, batching.sizes)
    metadata = {
        "model": "mimic-video",
        "client": adapter.name,
        "observed_frames": clip.observed_frames,
        "fps": clip.fps,
        "height": clip.height,
        "width": clip.width,
        "proprio_horizon": sizes.proprio_horizon,
        "proprio_fps": io.proprio.fps,
        "state_size": adapter.state_size,
        "action_horizon": sizes.action_horizon,
        "action_fps": io.action.fps,
    }
    batcher = partial(Batcher, plan, max(batching.sizes), batching.window)
    senses = Senses(clip.observed_frames, sizes.proprio_horizon, prompt)
    return PolicyServer(serving, adapter, senses, batcher, metadata)


def plan_in_sizes(policy: Policy, sizes: Sequence[int]) -> Plan:
    """`policy.plan` in the smallest of these batch sizes that holds the queries, all compiled.

    The variants share parameters and remembered instructions. A lone query then costs a batch of
    one, and nothing is compiled however many come together.
    """
    ways = split_ways("batch", policy.mesh, policy.rules)  # a batch is shared by so many devices
    sizes = sorted({-(-size // ways) * ways for size in sizes})
    variants = [replace(policy, batch_size=size) for size in sizes]
    for variant in variants:
        variant.warm_up()

    def plan(observations: Sequence[Observation]) -> np.ndarray:
        fitting = (v for v in variants if v.batch_size >= len(observations))
        return next(fitting, variants[-1]).plan(observations)

    return plan
