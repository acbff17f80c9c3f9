"""Putting a policy together from what the phases of a run left on disk."""

from pathlib import Path
from typing import Any

import jax

from data_pipelines.normalizer import Normalizer, load_normalizer
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
from mvjax.parallel.rules import make_rules
from mvjax.policy.policy import Policy, Sampling


def load_policy(
    config: Any, decoder_directory: Path, sampling: Sampling, batch_size: int
) -> Policy:
    """Loads tokenizer, backbone, decoder and normalizer of a stage-2 configuration.

    Args:
        config: the configuration of the stage-2 run.
        decoder_directory: its training directory.
        sampling: how queries are answered.
        batch_size: queries per compiled batch.
    """
    decoder_directory = Path(decoder_directory)
    latest_step(decoder_directory)  # a wrong directory is said before anything large is read
    normalizer = _normalizer(decoder_directory)
    tokenizer, tokenizer_identity = load_video_tokenizer(config.tokenizer)
    text_encoder, text_identity = load_text_encoder(config)
    identity = {"tokenizer": tokenizer_identity, "text_encoder": text_identity}
    check_identity(identity, decoder_directory)
    mesh, rules = make_mesh(config.mesh), make_rules(config.rules)
    with jax.set_mesh(mesh):
        model, backbone_params = load_backbone(config, mesh, rules)
        decoder = decoder_network(action_decoder_config(config))
        decoder_params = load_decoder(config, decoder_directory, decoder, mesh, rules)
    return Policy(
        clip=Clip(**config.clip),
        layer=config.context_layer,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        backbone=video_network(model),
        backbone_params=backbone_params,
        decoder=decoder,
        decoder_params=decoder_params,
        normalizer=normalizer,
        sampling=sampling,
        batch_size=batch_size,
    )


def _normalizer(decoder_directory: Path) -> Normalizer:
    path = decoder_directory / "normalizer.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: training writes it, and for a converted decoder `python -m "
            f"launch.convert STATISTICS.json {decoder_directory}` does."
        )
    normalizer = load_normalizer(path)
    trained = read_meta(decoder_directory).get("normalizer_fingerprint")  # converted: any
    if trained not in (None, normalizer.fingerprint):
        raise CheckpointMismatch(
            f"{path} holds the statistics {normalizer.fingerprint[:12]}, but the decoder beside it "
            f"was trained with {trained[:12]}; bring the file of that run back."
        )
    return normalizer
