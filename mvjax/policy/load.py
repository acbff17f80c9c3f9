"""Putting a policy together from what the phases of a run left on disk."""

from hashlib import sha256
from pathlib import Path
from typing import Any

import jax

from data_pipelines.normalizer import load_normalizer
from mvjax.checkpoints.backbone import load_backbone, load_decoder
from mvjax.checkpoints.bridge import read_meta
from mvjax.clip import Clip
from mvjax.models.build import action_decoder_config, decoder_network, text_encoder, video_network
from mvjax.models.linear_tokenizer import load_tokenizer
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
    tokenizer = Path(config.tokenizer)
    _check_tokenizer(tokenizer, Path(decoder_directory))
    mesh, rules = make_mesh(config.mesh), make_rules(config.rules)
    with jax.set_mesh(mesh):
        model, backbone_params = load_backbone(config, mesh, rules)
        decoder = decoder_network(action_decoder_config(config))
        decoder_params = load_decoder(config, decoder_directory, decoder, mesh, rules)
    return Policy(
        clip=Clip(**config.clip),
        layer=config.context_layer,
        tokenizer=load_tokenizer(tokenizer),
        text_encoder=text_encoder(config),
        backbone=video_network(model),
        backbone_params=backbone_params,
        decoder=decoder,
        decoder_params=decoder_params,
        normalizer=load_normalizer(Path(decoder_directory) / "normalizer.json"),
        sampling=sampling,
        batch_size=batch_size,
    )


def _check_tokenizer(path: Path, decoder_directory: Path) -> None:
    trained = read_meta(decoder_directory)["identity"]["tokenizer"]
    if path.exists() and sha256(path.read_bytes()).hexdigest() != trained:
        raise ValueError(
            f"The tokenizer {path} is not the one the policy in {decoder_directory} was trained "
            "with; bring that file back, or train again."
        )
