"""A policy of random networks, small enough to answer in milliseconds; run as a program, it serves.

python tests/tiny_policy.py [client=plain] [max_clients=8] [ping=20] ...
"""

import asyncio
import sys

import jax
import numpy as np
from ml_collections import ConfigDict
from tiny_stages import quick_compiles, tiny_batch, tiny_config

from data_pipelines.normalization.normalizer import Mode, Normalizer, compute_statistics
from mvjax.clip import Clip
from mvjax.models.build import (
    action_decoder_config,
    decoder_network,
    video_dit_config,
    video_network,
)
from mvjax.models.linear_tokenizer import LinearTokenizer, Projection
from mvjax.models.ngram_text import NgramTextEncoder
from mvjax.policy.model import VideoActionModel
from mvjax.policy.observation import Observation
from mvjax.policy.policy import Policy
from mvjax.policy.sampling import Sampling
from mvjax.policy.serving.adapters.body import body_of
from mvjax.policy.serving.adapters.clients import make_adapter
from mvjax.policy.serving.server import Serving
from mvjax.policy.serving.start import Batching, make_server
from mvjax.policy.serving.wire import WireLimits

DIMS = {"plain": (4, 4), "libero": (10, 10)}
SIZE = (48, 32)


def tiny_policy(client: str = "plain", batch_size: int = 1) -> tuple[Policy, ConfigDict]:
    """The policy that a kind of client needs, and its configuration; equal calls, equal ones."""
    config = tiny_config("action")
    config.clip.height, config.clip.width = SIZE
    config.policy_io.proprio.dim, config.policy_io.action.dim = DIMS[client]
    rng = np.random.default_rng(0)
    batch = tiny_batch(config)
    backbone = video_network(video_dit_config(config))
    decoder = decoder_network(action_decoder_config(config))
    statistics = {name: compute_statistics(batch[name]) for name in ("actions", "proprio")}
    tokenizer = LinearTokenizer(*(_random_projection(rng, 8 * 8 * 3 * t) for t in (1, 4)))
    sampling = Sampling(video_steps=3, action_steps=2)
    policy = Policy(
        model=VideoActionModel(
            Clip(**config.clip), config.context_layer, backbone, decoder, sampling
        ),
        weights=(tokenizer, random_params(backbone, 1), random_params(decoder, 2)),
        text_encoder=NgramTextEncoder(config.text.length, config.text.dim),
        normalizer=Normalizer(statistics, dict.fromkeys(statistics, Mode.VARIANCE)),
        batch_size=batch_size,
    )
    return policy, config


def random_observation(seed: int, client: str = "plain") -> Observation:
    """Five pictures, a state and an instruction of noise."""
    rng = np.random.default_rng(seed)
    return Observation(
        frames=rng.integers(0, 256, (5, *SIZE, 3), np.uint8),
        proprio=rng.normal(size=(1, DIMS[client][0])).astype(np.float32),
        instruction=f"open drawer {seed % 7}",
    )


def _random_projection(rng, size):
    """In place of a fit, which takes seconds."""
    shapes = ((size,), (size, 16), (16, size))
    return Projection(*(rng.normal(scale=size**-0.5, size=s).astype(np.float32) for s in shapes))


def random_params(network, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: rng.normal(
            scale=p.shape[-2] ** -0.5 if len(p.shape) > 1 else 1, size=p.shape
        ).astype(np.float32),
        network.abstract,
    )


def main(client: str = "plain", api_key: str = "", sizes: str = "1,4", **numbers: str) -> None:
    """Serves until it is killed; prints the port when clients can connect."""
    limits = {name: float(value) for name, value in numbers.items()}
    wire = WireLimits(message_bytes=int(limits.pop("message_bytes", 2**20)))
    window = limits.pop("window", 0.005)
    limits["max_clients"] = int(limits.get("max_clients", 16))
    serving = Serving(host="127.0.0.1", port=0, api_key=api_key, wire=wire, **limits)
    batching = Batching(tuple(int(size) for size in sizes.split(",")), window)
    policy, config = tiny_policy(client)
    with quick_compiles():
        adapter = make_adapter(client, body_of(config))
        server = make_server(policy, config, adapter, serving, batching=batching)
        asyncio.run(server.run(lambda host, port: print(port, flush=True)))


if __name__ == "__main__":
    main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
