"""A policy of random networks, small enough to answer in milliseconds; run as a program, it serves.

python tests/tiny_policy.py [client=plain] [cameras=tiled] [max_clients=8] [ping=20] ...
"""

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from tiny_stages import quick_compiles, save_untrained, tiny_batch, tiny_config

from data_pipelines.clip import Clip
from data_pipelines.embodiments import libero_panda
from data_pipelines.normalize import Normalizer
from data_pipelines.representations import Mode
from data_pipelines.statistics import compute_statistics
from mvjax.experiment import Experiment
from mvjax.flow import Sampling
from mvjax.models.stand_ins import (
    LinearTokenizer,
    NgramTextEncoder,
    Projection,
    save_linear_tokenizer,
)
from mvjax.policy.observation import Observation
from mvjax.policy.policy import Policy, VideoActionModel
from mvjax.policy.robot import trained_robot
from mvjax.serving.adapters import make_adapter
from mvjax.serving.batching import Batching
from mvjax.serving.server import Serving, make_server

DIMS = {"plain": (4, 4), "libero": (10, 10)}
SIZE = (48, 32)
VIEW_SIZE = (32, 32)
# The first is that of a single camera. Of two, the second is tiled beside it or observed.
CAMERAS = {
    "plain": ("observation.images.corner", "observation.images.gripper"),
    "libero": ("observation.images.agentview", "observation.images.wrist"),
}


def tiny_policy(
    client: str = "plain", batch_size: int = 1, cameras: str = "single"
) -> tuple[Policy, ConfigDict]:
    """Returns a policy for a kind of client, and its configuration; equal for equal arguments.

    Its cameras are single, tiled or observed, as in the quickstart's configurations.
    """
    config = tiny_config("action")
    config.clip.height, config.clip.width = SIZE
    config.policy_io.proprio.dim, config.policy_io.action.dim = DIMS[client]
    if client == "libero":
        config.datasets.robot.update(
            embodiment="libero_panda",
            action=libero_panda.LEROBOT_ACTION,
            proprio=libero_panda.LEROBOT_PROPRIO,
        )
    config.datasets.robot.video = CAMERAS[client][0]
    if cameras == "tiled":
        with config.ignore_type():  # one camera is a text, several are a tuple
            config.datasets.robot.video = CAMERAS[client]
    elif cameras == "observed":
        config.clip.views = dict(hand=dict(height=VIEW_SIZE[0], width=VIEW_SIZE[1]))
        config.datasets.robot.views = dict(hand=CAMERAS[client][1])
    rng = np.random.default_rng(0)
    batch = tiny_batch(config)
    backbone = Experiment.from_config(config).video_network
    decoder = Experiment.from_config(config).decoder_network
    sampling = Sampling(video_steps=3, action_steps=2)
    policy = Policy(
        model=VideoActionModel(
            Clip(**config.clip), config.context_layer, backbone, decoder, sampling
        ),
        weights=(_random_tokenizer(rng), random_params(backbone, 1), random_params(decoder, 2)),
        text_encoder=NgramTextEncoder(config.text.length, config.text.dim),
        normalizer=_normalizer(batch),
        batch_size=batch_size,
        views=trained_robot(config).views,
    )
    return policy, config


def random_observation(seed: int, client: str = "plain", cameras: int = 1) -> Observation:
    """Five pictures (of each camera, if there are several), a state and an instruction of noise."""
    rng = np.random.default_rng(seed)
    frames = {
        name: rng.integers(0, 256, (5, *SIZE, 3), np.uint8) for name in CAMERAS[client][:cameras]
    }
    return Observation(
        frames=frames if cameras > 1 else frames[CAMERAS[client][0]],
        proprio=rng.normal(size=(1, DIMS[client][0])).astype(np.float32),
        instruction=f"open drawer {seed % 7}",
    )


def save_run(folder: Path) -> None:
    """Writes an untrained run of both stages: `video`, `action`, and the tokenizer."""
    save_linear_tokenizer(folder / "tokenizer.npz", _random_tokenizer(np.random.default_rng(0)))
    with quick_compiles():
        save_untrained(tiny_config("video"), folder / "video")
        save_untrained(run_config(folder), folder / "action")
    _normalizer(tiny_batch(run_config(folder))).save(folder / "action" / "normalizer.json")


def run_config(folder: Path | str) -> ConfigDict:
    """The configuration of the stage 2 of `save_run`."""
    config = tiny_config("action")
    config.tokenizer = f"{folder}/tokenizer.npz"
    config.backbone.checkpoint = f"{folder}/video"
    return config


def _normalizer(batch: dict[str, np.ndarray]) -> Normalizer:
    statistics = {name: compute_statistics(batch[name]) for name in ("actions", "proprio")}
    return Normalizer(statistics, dict.fromkeys(statistics, Mode.VARIANCE))


def _random_tokenizer(rng: np.random.Generator) -> LinearTokenizer:
    """A random tokenizer: fitting one takes seconds."""

    def projection(size: int) -> Projection:
        shapes = ((size,), (size, 16), (16, size))
        scaled = (rng.normal(scale=size**-0.5, size=shape) for shape in shapes)
        return Projection(*(array.astype(np.float32) for array in scaled))

    return LinearTokenizer(*(projection(8 * 8 * 3 * frames) for frames in (1, 4)))


def random_params(network, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: rng.normal(
            scale=p.shape[-2] ** -0.5 if len(p.shape) > 1 else 1, size=p.shape
        ).astype(np.float32),
        network.abstract,
    )


def main(
    client: str = "plain",
    api_key: str = "",
    sizes: str = "1,4",
    cameras: str = "single",
    chunking: str = "none",
    **numbers: str,
) -> None:
    """Serves until it is killed; prints the port when clients can connect."""
    limits = {name: float(value) for name, value in numbers.items()}
    limits["message_bytes"] = int(limits.get("message_bytes", 2**20))
    window = limits.pop("window", 0.005)
    limits["max_clients"] = int(limits.get("max_clients", 16))
    serving = Serving(host="127.0.0.1", port=0, api_key=api_key, **limits)
    batching = Batching(tuple(int(size) for size in sizes.split(",")), window)
    policy, config = tiny_policy(client, cameras=cameras)
    policy = policy.sampled(replace(policy.model.sampling, chunking=chunking))
    with quick_compiles():
        adapter = make_adapter(client, trained_robot(config))
        server = make_server(policy, config, adapter, serving, batching=batching)
        asyncio.run(server.run(lambda host, port: print(port, flush=True)))


if __name__ == "__main__":
    main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
