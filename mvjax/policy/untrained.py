"""A policy of a configuration's sizes without weights or data, for measuring its speed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from data_pipelines.normalization.normalizer import Mode, Normalizer
from mvjax.checkpoints.backbone import load_backbone
from mvjax.clip import CHANNELS, SPATIAL, TEMPORAL, Clip
from mvjax.models.build import action_decoder_config, decoder_network, video_network
from mvjax.models.linear_tokenizer import LinearTokenizer, Projection
from mvjax.models.parameters import Network
from mvjax.models.presets import WAN_VAES
from mvjax.models.wan_vae import WanVAE
from mvjax.parallel.mesh import make_mesh
from mvjax.parallel.rules import make_rules, sharding_tree, split_ways
from mvjax.policy.model import VideoActionModel
from mvjax.policy.observation import Observation
from mvjax.policy.policy import Policy
from mvjax.policy.sampling import Sampling


@dataclass(frozen=True)
class NoiseTextEncoder:
    """Gives every text its own noise, float32 [n, length, dim]."""

    length: int
    dim: int

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Equal texts, equal embeddings."""
        generators = (np.random.default_rng(list(text.encode())) for text in texts)
        size = (self.length, self.dim)
        return np.stack([rng.standard_normal(size, np.float32) for rng in generators])


def untrained_policy(config: Any, sampling: Sampling, batch_size: int = 1) -> Policy:
    """The policy that `load_policy` would give, its weights drawn at random.

    The tokenizer is linear where the configuration names an .npz file, else a Wan VAE of the
    released sizes. Texts are embedded as noise: a policy keeps embeddings, so the text encoder has
    no part in the time of a query.

    Args:
        config: of a stage-2 run; its checkpoints and data are not read.
        sampling: how queries are answered.
        batch_size: queries per compiled batch; rounded up to what the devices can share.

    Raises:
        ValueError: if the configuration is not one of stage 2.
    """
    if config.stage != "action":
        raise ValueError(
            f"A policy is configured by a stage-2 file of configs/, whose stage is 'action'; this "
            f"one's is {config.stage!r}."
        )
    config = config.copy_and_resolve_references()
    config.backbone.checkpoint = ""
    mesh, rules = make_mesh(config.mesh, jax.local_devices()), make_rules(config.rules)
    decoder = decoder_network(action_decoder_config(config))
    shardings = sharding_tree(decoder.axes, mesh, rules, decoder.abstract)
    with jax.set_mesh(mesh):
        video_dit, backbone_params = load_backbone(config, mesh, rules)
        decoder_params = jax.jit(decoder.init, out_shardings=shardings)(jax.random.key(1))
        whole = NamedSharding(mesh, PartitionSpec())
        tokenizer = jax.device_put(_tokenizer(Path(config.tokenizer)), whole)
    ways = split_ways("batch", mesh, rules)
    return Policy(
        model=VideoActionModel(
            Clip(**config.clip), config.context_layer, video_network(video_dit), decoder, sampling
        ),
        weights=(tokenizer, backbone_params, decoder_params),
        text_encoder=NoiseTextEncoder(config.text.length, config.text.dim),
        normalizer=Normalizer({}, {"proprio": Mode.NONE, "actions": Mode.NONE}),
        batch_size=-(-batch_size // ways) * ways,
        mesh=mesh,
        rules=rules,
    )


def random_observations(policy: Policy, count: int) -> list[Observation]:
    """Queries of noise, with different pictures and texts."""
    rng, clip, sizes = np.random.default_rng(0), policy.model.clip, policy.model.decoder.config
    frames = (clip.observed_frames, clip.height, clip.width, 3)
    proprio = (sizes.proprio_horizon, sizes.proprio_dim)
    return [
        Observation(
            frames=rng.integers(0, 256, frames, np.uint8),
            proprio=rng.standard_normal(proprio, np.float32),
            instruction=f"put object {i} on the shelf",
        )
        for i in range(count)
    ]


def _tokenizer(path: Path) -> LinearTokenizer | WanVAE:
    if path.suffix != ".npz":
        network = Network(lambda key: WanVAE(WAN_VAES["wan21"], key))
        return network.bind(jax.jit(network.init)(jax.random.key(2)))
    rng = np.random.default_rng(2)

    def projection(features: int) -> Projection:
        maps = rng.standard_normal((features, CHANNELS), np.float32) / np.sqrt(features)
        return Projection(np.zeros(features, np.float32), 3 * maps, maps.T)

    pixels = 3 * SPATIAL**2
    return LinearTokenizer(projection(pixels), projection(TEMPORAL * pixels))
