"""Loads a policy, or its video tokenizer and text encoder, from the files of a run."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from data_pipelines.normalize import Normalizer, load_normalizers
from data_pipelines.settings import differences
from mvjax.experiment import Experiment
from mvjax.flow import Sampling
from mvjax.models.network import Network, Params
from mvjax.models.presets import text_network, vae_config, vae_network, video_network
from mvjax.models.stand_ins import LinearTokenizer, NgramTextEncoder, load_linear_tokenizer
from mvjax.models.t5 import T5EncoderConfig, T5TextEncoder, load_t5_tokenizer
from mvjax.models.wan_vae import WanVAE
from mvjax.parallel import split_ways
from mvjax.policy.policy import Policy, VideoActionModel
from mvjax.training.bridge import (
    abstract_params,
    latest_step,
    load_backbone,
    load_decoder,
    read_meta,
    restore_params,
)
from mvjax.training.checkpoint import CheckpointMismatch, leaf_paths

# The video tokenizer and the text encoder of a configuration, with their identities.
#
# Both are either a built-in stand-in or converted weights: `config.tokenizer` is the file of a
# fitted linear tokenizer or the directory of a converted Wan VAE; `config.text_encoder` is "" for
# character n-grams or the directory of a converted T5. Records and training runs store the
# identities, so that nothing is decoded with another network than it was encoded with.

_SMALL = 1 << 20  # bytes; smaller leaves (norms, biases) identify a training and hash fast


def load_video_tokenizer(path: Path) -> tuple[LinearTokenizer | WanVAE, str]:
    """Returns the tokenizer at `config.tokenizer`, and its identity.

    Raises:
        FileNotFoundError: if there is no such file or checkpoint.
        CheckpointMismatch: if the directory holds another network.
    """
    path = Path(path)
    if not path.is_dir():
        return load_linear_tokenizer(path), hashlib.sha256(path.read_bytes()).hexdigest()
    network, params = _load(path, "vae")
    return network.bind(params), f"wan vae {_fingerprint(params)}"


def load_text_encoder(config: Any) -> tuple[NgramTextEncoder | T5TextEncoder, str]:
    """Returns the text encoder (`text.length` tokens of `text.dim`), and its identity.

    Raises:
        FileNotFoundError: if `config.text_encoder` holds no checkpoint or no tokenizer.
        CheckpointMismatch: if it holds another network, or one of another width.
    """
    length, dim = config.text.length, config.text.dim
    if not config.text_encoder:
        return NgramTextEncoder(length, dim), f"ngram {length}x{dim}"
    if config.text_encoder == "stored":
        raise ValueError(
            "config.text_encoder is 'stored': the data hold the embeddings of their own "
            "instructions. For others, name the network that made them (docs/weights.md)."
        )
    directory = Path(config.text_encoder)
    network, params = _load(directory, "text")
    if network.config.width != dim:
        raise CheckpointMismatch(
            f"{directory} embeds texts in {network.config.width} dimensions, but text.dim is {dim}."
        )
    tokenizer = load_t5_tokenizer(directory, length)
    encoder = T5TextEncoder(network, params, tokenizer)
    return encoder, f"t5 {length}x{dim} {_fingerprint(params)}"


def check_identity(identity: dict[str, str], directory: Path) -> None:
    """Raises CheckpointMismatch if a run was trained with another tokenizer or text encoder.

    Args:
        identity: "tokenizer" or "text_encoder", or both -> the identity in use.
        directory: a training directory; converted weights have no identity and pass.
    """
    trained = read_meta(directory).get("identity", {})
    # It is unknown which network made the embeddings that a dataset stores.
    known = {name for name, what in trained.items() if not what.startswith("stored ")}
    expected = {name: trained[name] for name in identity if name in known}
    different = differences(expected, identity, "identity") if expected else ()
    if different:
        raise CheckpointMismatch(
            f"{directory} was trained with another video tokenizer or text encoder: "
            f"{'; '.join(different)}. Restore that one, or train again."
        )


# Title and network of a converted checkpoint, by stage.
_ENCODERS = {
    "vae": ("Wan VAE", lambda config: vae_network(vae_config(config["tokenizer"]))),
    "text": ("T5 encoder", lambda config: text_network(T5EncoderConfig(**config["text_encoder"]))),
}


def _load(directory: Path, stage: str) -> tuple[Network, Params]:
    meta, (title, build) = read_meta(directory), _ENCODERS[stage]
    if meta["stage"] != stage:
        raise CheckpointMismatch(
            f"{directory} holds a checkpoint of stage {meta['stage']!r}, expected a converted "
            f"{title}."
        )
    network = build(meta["config"])
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    # A network that computes in bfloat16 needs no float32 parameters: half the memory.
    lower = "bfloat16" if network.config.precision == "bfloat16" else None
    placed = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, lower or p.dtype, sharding=device),
        abstract_params(directory),
    )
    return network, restore_params(directory, placed)


def _fingerprint(params: Params) -> str:
    digest = hashlib.sha256()
    for name, leaf in sorted(leaf_paths(params).items()):
        if leaf.nbytes <= _SMALL:
            digest.update(name.encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def load_policy(
    experiment: Experiment, decoder_directory: Path, sampling: Sampling, batch_size: int
) -> Policy:
    """Loads the policy of a stage-2 run.

    Args:
        experiment: of the run; `config.embodiment` selects the robot if it was trained on several.
        decoder_directory: its training directory.
        sampling: how queries are answered.
        batch_size: queries per compiled batch; rounded up to what the devices can share.
    """
    config, rules, decoder_directory = experiment.config, experiment.rules, Path(decoder_directory)
    latest_step(decoder_directory)  # names a wrong directory before anything large is read
    normalizer = _normalizer(decoder_directory, config.get("embodiment", ""))
    tokenizer, tokenizer_identity = load_video_tokenizer(config.tokenizer)
    text_encoder, text_identity = load_text_encoder(config)
    identity = {"tokenizer": tokenizer_identity, "text_encoder": text_identity}
    check_identity(identity, decoder_directory)
    # Every process answers its own queries on its own devices.
    mesh = experiment.mesh(jax.local_devices())
    with jax.set_mesh(mesh):
        video_dit, backbone_params = load_backbone(experiment, mesh)
        decoder_params = load_decoder(experiment, decoder_directory, mesh)
        tokenizer = jax.device_put(tokenizer, NamedSharding(mesh, PartitionSpec()))
    ways = split_ways("batch", mesh, rules)
    return Policy(
        model=VideoActionModel(
            experiment.clip,
            config.context_layer,
            video_network(video_dit),
            experiment.decoder_network,
            sampling,
        ),
        weights=(tokenizer, backbone_params, decoder_params),
        text_encoder=text_encoder,
        normalizer=normalizer,
        batch_size=-(-batch_size // ways) * ways,
        mesh=mesh,
        rules=rules,
    )


def policy_identity(config: Any, decoder_directory: Path) -> str:
    """Returns a text that identifies a trained policy, and its step if training continues."""
    parts = [decoder_directory, *filter(None, [config.backbone.checkpoint])]
    return "".join(f"{latest_step(Path(p))} {read_meta(Path(p))}" for p in parts)


def _normalizer(decoder_directory: Path, embodiment: str) -> Normalizer:
    path = decoder_directory / "normalizer.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: training writes it; for a converted decoder run `python -m "
            f"launch.convert STATISTICS.json {decoder_directory}`."
        )
    normalizers = load_normalizers(path)
    trained = read_meta(decoder_directory).get("normalizer_fingerprint")  # converted: any
    if trained not in (None, normalizers.fingerprint):
        raise CheckpointMismatch(
            f"{path} has fingerprint {normalizers.fingerprint[:12]}, but its decoder was trained "
            f"with statistics {trained[:12]}: restore the file of that run."
        )
    return normalizers.of(embodiment)
