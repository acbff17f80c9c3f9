"""Putting a policy together from what the phases of a run left on disk."""

from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from data_pipelines.normalization.normalizer import Normalizer
from data_pipelines.normalization.per_embodiment import load_normalizers
from mvjax.checkpoints.backbone import load_backbone, load_decoder
from mvjax.checkpoints.bridge import latest_step, read_meta
from mvjax.checkpoints.encoders import (
    check_identity,
    load_text_encoder,
    load_video_tokenizer,
)
from mvjax.checkpoints.tree_match import CheckpointMismatch
from mvjax.clip import Clip
from mvjax.models.build import action_decoder_config, decoder_network, video_network
from mvjax.parallel.mesh import make_mesh
from mvjax.parallel.rules import make_rules, split_ways
from mvjax.policy.model import VideoActionModel
from mvjax.policy.policy import Policy
from mvjax.policy.sampling import Sampling


def load_policy(
    config: Any, decoder_directory: Path, sampling: Sampling, batch_size: int
) -> Policy:
    """Loads tokenizer, backbone, decoder and normalizer of a stage-2 configuration.

    Args:
        config: the configuration of the stage-2 run; `embodiment` names the body that acts, where
            the run has learned from several.
        decoder_directory: its training directory.
        sampling: how queries are answered.
        batch_size: queries per compiled batch; rounded up to what the devices can share.
    """
    decoder_directory = Path(decoder_directory)
    latest_step(decoder_directory)  # a wrong directory is said before anything large is read
    normalizer = _normalizer(decoder_directory, config.get("embodiment", ""))
    tokenizer, tokenizer_identity = load_video_tokenizer(config.tokenizer)
    text_encoder, text_identity = load_text_encoder(config)
    identity = {"tokenizer": tokenizer_identity, "text_encoder": text_identity}
    check_identity(identity, decoder_directory)
    # Every process answers queries of its own, with its own devices.
    mesh, rules = make_mesh(config.mesh, jax.local_devices()), make_rules(config.rules)
    with jax.set_mesh(mesh):
        video_dit, backbone_params = load_backbone(config, mesh, rules)
        decoder = decoder_network(action_decoder_config(config))
        decoder_params = load_decoder(config, decoder_directory, decoder, mesh, rules)
        tokenizer = jax.device_put(tokenizer, NamedSharding(mesh, PartitionSpec()))
    backbone = video_network(video_dit)
    ways = split_ways("batch", mesh, rules)
    return Policy(
        model=VideoActionModel(
            Clip(**config.clip), config.context_layer, backbone, decoder, sampling
        ),
        weights=(tokenizer, backbone_params, decoder_params),
        text_encoder=text_encoder,
        normalizer=normalizer,
        batch_size=-(-batch_size // ways) * ways,
        mesh=mesh,
        rules=rules,
    )


def policy_identity(config: Any, decoder_directory: Path) -> str:
    """Tells one trained policy from another, also when a folder is trained further."""
    parts = [decoder_directory, *filter(None, [config.backbone.checkpoint])]
    return "".join(f"{latest_step(Path(p))} {read_meta(Path(p))}" for p in parts)


def _normalizer(decoder_directory: Path, embodiment: str) -> Normalizer:
    path = decoder_directory / "normalizer.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: training writes it, and for a converted decoder `python -m "
            f"launch.convert STATISTICS.json {decoder_directory}` does."
        )
    normalizers = load_normalizers(path)
    trained = read_meta(decoder_directory).get("normalizer_fingerprint")  # converted: any
    if trained not in (None, normalizers.fingerprint):
        raise CheckpointMismatch(
            f"{path} holds the statistics {normalizers.fingerprint[:12]}, but the decoder beside "
            f"it was trained with {trained[:12]}; bring the file of that run back."
        )
    return normalizers.of(embodiment)
