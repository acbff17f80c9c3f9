"""Loads a policy, or its video tokenizer and text encoder, from the files of a run."""

import hashlib
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from data_pipelines.normalize import VECTORS, Normalizer, load_normalizers, strange_streams
from data_pipelines.settings import other_networks, plain
from data_pipelines.vectors import parse, streams
from mvjax.experiment import Experiment
from mvjax.flow import Sampling
from mvjax.identity import digest_of_json, here
from mvjax.models.network import Network, Params
from mvjax.models.presets import text_network, vae_config, vae_network, video_network
from mvjax.models.stand_ins import LinearTokenizer, NgramTextEncoder, load_linear_tokenizer
from mvjax.models.t5 import FILES as TOKENIZER_FILES
from mvjax.models.t5 import T5EncoderConfig, T5TextEncoder, load_t5_tokenizer
from mvjax.models.wan_vae import WanVAE
from mvjax.parallel import split_ways
from mvjax.policy.policy import Policy, VideoActionModel
from mvjax.policy.robot import check_trained, trained_robot
from mvjax.training.bridge import (
    backbone_checkpoint,
    backbone_identity,
    load_backbone,
    load_decoder,
)
from mvjax.training.checkpoint import leaf_paths
from mvjax.training.damage import CheckpointMismatch
from mvjax.training.directory import (
    Checkpoint,
    abstract_params,
    checkpoint_steps,
    find_checkpoint,
    restore_params,
    trained_config,
)

log = logging.getLogger(__name__)

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
    return _video_tokenizer(path)[:2]


def load_text_encoder(config: Any) -> tuple[NgramTextEncoder | T5TextEncoder, str]:
    """Returns the text encoder (`text.length` tokens of `text.dim`), and its identity.

    Raises:
        FileNotFoundError: if `config.text_encoder` holds no checkpoint or no tokenizer.
        CheckpointMismatch: if it holds another network, or one of another width.
    """
    return _text_encoder(config)[:2]


def _video_tokenizer(path: Path) -> tuple[LinearTokenizer | WanVAE, str, dict[str, Any]]:
    """The tokenizer, its identity in records, and its identity in results."""
    path = Path(path)
    if not path.is_dir():
        identity = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""
        return load_linear_tokenizer(path), identity, {"digest": identity[:16]}
    network, params, weights = _load(path, "vae")
    name = f"wan vae {_fingerprint(params)} {weights['digest']}"
    return network.bind(params), name, weights


def _text_encoder(config: Any) -> tuple[NgramTextEncoder | T5TextEncoder, str, dict[str, Any]]:
    """The text encoder, its identity in records, and its identity in results."""
    length, dim = config.text.length, config.text.dim
    if not config.text_encoder:
        name = f"ngram {length}x{dim}"
        return NgramTextEncoder(length, dim), name, {"name": name}
    if config.text_encoder == "stored":
        raise ValueError(
            "config.text_encoder is 'stored': the data hold the embeddings of their own "
            "instructions. For others, name the network that made them (docs/weights.md)."
        )
    directory = Path(config.text_encoder)
    network, params, weights = _load(directory, "text")
    if network.config.width != dim:
        raise CheckpointMismatch(
            f"{directory} embeds texts in {network.config.width} dimensions, but text.dim is {dim}."
        )
    encoder = T5TextEncoder(network, params, load_t5_tokenizer(directory, length))
    files = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    vocabulary = hashlib.sha256(files[0].read_bytes()).hexdigest()[:16]
    name = f"t5 {length}x{dim} {_fingerprint(params)} {weights['digest']} {vocabulary}"
    return encoder, name, {**weights, "vocabulary": vocabulary}


def check_identity(identity: dict[str, str], checkpoint: Checkpoint) -> None:
    """Raises CheckpointMismatch if a run was trained with another tokenizer or text encoder.

    Args:
        identity: "tokenizer" or "text_encoder", or both -> the identity in use.
        checkpoint: of the run; converted weights have no identity and pass.
    """
    trained = checkpoint.meta.get("identity", {})
    # It is unknown which network made the embeddings that a dataset stores.
    known = {name for name, what in trained.items() if not what.startswith("stored ")}
    expected = {name: trained[name] for name in identity if name in known}
    if different := other_networks(expected, {name: identity[name] for name in expected}):
        raise CheckpointMismatch(
            f"{checkpoint.directory} was trained with another video tokenizer or text encoder: "
            f"{'; '.join(different)}. Use the one of training, or train again."
        )


# Title and network of a converted checkpoint, by stage.
_ENCODERS = {
    "vae": ("Wan VAE", lambda config: vae_network(vae_config(config["tokenizer"]))),
    "text": ("T5 encoder", lambda config: text_network(T5EncoderConfig(**config["text_encoder"]))),
}


def _load(directory: Path, stage: str) -> tuple[Network, Params, dict[str, Any]]:
    found, (title, build) = find_checkpoint(directory), _ENCODERS[stage]
    meta = found.meta
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
        abstract_params(directory, step=found.step),
    )
    params = restore_params(directory, placed, step=found.step)
    return network, params, {**found.identity, "settings": plain(asdict(network.config))}


def _fingerprint(params: Params) -> str:
    digest = hashlib.sha256()
    for name, leaf in sorted(leaf_paths(params).items()):
        if leaf.nbytes <= _SMALL:  # all that earlier versions compared; the digest is of all
            digest.update(name.encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def load_trained(directory: str | Path, stop_step: int = 0, batch_size: int = 1) -> Policy:
    """Loads the policy of a stage-2 or joint run with the configuration it was trained with.

    Relative paths in that configuration (backbone, tokenizer) belong to the folder in which the run
    was trained: call this from there.

    Args:
        directory: its training directory, such as "runs/quickstart/action".
        stop_step: K, denoising steps of the video before the policy acts on it.
        batch_size: queries per compiled batch.

    Raises:
        ValueError: it holds converted weights; give `load_policy` a configuration.
        CheckpointMismatch: something does not belong to the decoder; the message names it.
        OSError: a file is missing or damaged.
    """
    experiment = Experiment.from_config(trained_config(Path(directory)))
    return load_policy(
        experiment, Path(directory), experiment.sampling(stop_step=stop_step), batch_size
    )


def load_policy(
    experiment: Experiment, decoder_directory: Path, sampling: Sampling, batch_size: int
) -> Policy:
    """Loads the policy of a stage-2 or joint run, and fixes what it is (`Policy.identity`).

    The decoder's newest step is chosen once, and of the backbone the step that it was trained on.
    In a joint run that is the same one, which holds both.

    Args:
        experiment: of the run; `config.embodiment` selects the robot if it was trained on several.
        decoder_directory: its training directory.
        sampling: how queries are answered.
        batch_size: queries per compiled batch; rounded up to what the devices can share.

    Raises:
        CheckpointMismatch: something does not belong to the decoder; the message names it.
        OSError: a file is missing or damaged.
    """
    for again in (False, True):
        chosen: list[Checkpoint] = []
        try:
            return _load_policy(experiment, Path(decoder_directory), sampling, batch_size, chosen)
        except OSError:
            gone = [c for c in chosen if c.step not in checkpoint_steps(c.directory)]
            if again or not gone:
                raise
            log.warning(
                "step %d of %s was deleted while it was being read, because a training that is "
                "still running deletes old checkpoints: reading its newest one instead.",
                gone[0].step,
                gone[0].directory,
            )
    raise AssertionError("unreachable")


def _load_policy(
    experiment: Experiment,
    decoder_directory: Path,
    sampling: Sampling,
    batch_size: int,
    chosen: list[Checkpoint],
) -> Policy:
    """Appends what it reads to `chosen`."""
    config, rules = experiment.config, experiment.rules
    # Chosen before anything large is read, which also names a wrong directory.
    held = find_checkpoint(decoder_directory)
    chosen.append(held)
    decoder = held.network("action")
    if (config.stage == "joint") != bool(decoder.part):
        raise CheckpointMismatch(
            f"{decoder_directory} is a run of stage {held.meta['stage']!r}, but this configuration "
            f"is of stage {config.stage!r}: take its own (without --config)."
        )
    # Converted weights do not know their backbone: any will do.
    trained = None if "converted" in decoder.meta else decoder.meta.get("backbone", {})
    if decoder.part:
        backbone = held.network("video")
    else:
        backbone = backbone_checkpoint(experiment, trained, str(decoder_directory))
    chosen += [backbone] if backbone else []
    check_trained(config, decoder.meta, decoder_directory)
    robot = trained_robot(config)
    normalizer = _normalizer(decoder, config)
    tokenizer, tokenizer_identity, tokenizer_weights = _video_tokenizer(config.tokenizer)
    text_encoder, text_identity, text_weights = _text_encoder(config)
    identity = {"tokenizer": tokenizer_identity, "text_encoder": text_identity}
    check_identity(identity, decoder)
    # Every process answers its own queries on its own devices.
    mesh = experiment.mesh(jax.local_devices())
    with jax.set_mesh(mesh):
        of = {} if backbone is None else dict(step=backbone.step, directory=backbone.directory)
        video_dit, backbone_params = load_backbone(experiment, mesh, **of)
        decoder_params = load_decoder(experiment, decoder_directory, mesh, step=decoder.step)
        tokenizer = jax.device_put(tokenizer, NamedSharding(mesh, PartitionSpec()))
    ways = split_ways("batch", mesh, rules)
    weights = backbone_identity(experiment, backbone)
    crop = min((view.crop for view in robot.views), default=1.0)
    what = {
        "decoder": decoder.identity,
        "backbone": {k: v for k, v in weights.items() if k != "directory"},
        "tokenizer": tokenizer_weights,
        "text_encoder": text_weights,
        "normalizer": {
            "digest": digest_of_json(decoder_directory / "normalizer.json"),
            "embodiment": robot.embodiment,
        },
        "settings": {
            **{name: config[name] for name in ("clip", "policy_io", "text", "context_layer")},
            # Earlier versions knew no other, and results of theirs go on.
            **(
                {"context_frames": frames} if (frames := experiment.context_frames) != "all" else {}
            ),
            "backbone": _decisive(video_dit),
            "decoder": _decisive(experiment.decoder),
            **({"crop": crop} if crop < 1 else {}),  # results of earlier versions go on
        },
    }
    read = {
        "decoder": str(decoder_directory),
        "backbone": str(decoder_directory) if decoder.part else config.backbone.checkpoint,
        "tokenizer": str(config.tokenizer),
        "text_encoder": str(config.text_encoder),
    }
    return Policy(
        model=VideoActionModel(
            experiment.clip,
            config.context_layer,
            video_network(video_dit),
            experiment.decoder_network,
            sampling,
            experiment.context_frames,
            # Of the training and not of `config`, which may be another one; earlier runs had none.
            prefix=decoder.meta.get("config", {}).get("flow", {}).get("prefix", 0),
        ),
        weights=(tokenizer, backbone_params, decoder_params),
        text_encoder=text_encoder,
        normalizer=normalizer,
        batch_size=-(-batch_size // ways) * ways,
        mesh=mesh,
        rules=rules,
        views=robot.views,
        identity={"what": plain(what), "where": {**here(), "read": read}},
    )


def _decisive(network: Any) -> dict[str, Any]:
    """The settings of a network that change what it answers by more than a rounding."""
    settings = {k: v for k, v in asdict(network).items() if k not in ("attention", "remat")}
    # Earlier versions had none of these, and results of theirs go on.
    later = {"views": (), "attention_to": "all", "observed_latents": 0}
    return {k: v for k, v in settings.items() if k not in later or v != later[k]}


def _normalizer(decoder: Checkpoint, config: Any) -> Normalizer:
    path = decoder.directory / "normalizer.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: training writes it; for a converted decoder run `python -m "
            f"launch.convert STATISTICS.json {decoder.directory}`."
        )
    normalizers = load_normalizers(path)
    trained = decoder.meta.get("normalizer_fingerprint")  # converted: any
    if trained not in (None, normalizers.fingerprint):
        raise CheckpointMismatch(
            f"{path} has fingerprint {normalizers.fingerprint[:12]}, but its decoder was trained "
            f"with statistics {trained[:12]}: restore the file of that run."
        )
    if decoder.meta.get("normalizer_digest") not in (None, digest_of_json(path)):
        raise CheckpointMismatch(
            f"{path} has been changed since its decoder was trained with it: restore the file of "
            "that run."
        )
    normalizer = normalizers.of(config.get("embodiment") or "")
    for key, io in (("actions", config.policy_io.action), ("proprio", config.policy_io.proprio)):
        try:
            normalizer.normalize(key, np.zeros((io.horizon, io.dim), np.float32))
        except (KeyError, ValueError) as error:
            raise CheckpointMismatch(
                f"{path} does not fit policy_io of this configuration: {error.args[0]} Take the "
                "statistics of the robot that the decoder was trained on."
            ) from error
    if "converted" in decoder.meta:
        _check_given(normalizer, path, decoder, config)
    return normalizer


def _check_given(normalizer: Normalizer, path: Path, decoder: Checkpoint, config: Any) -> None:
    """Raises CheckpointMismatch for statistics of another decoder than this converted one."""
    again = f"`python -m launch.convert STATISTICS.json {decoder.directory}`"
    if not normalizer.decoder:
        log.warning(
            "%s does not name its decoder, as in earlier versions, so it may belong to another "
            "robot. Remove it and run %s.",
            path,
            again,
        )
    elif normalizer.decoder != decoder.identity["digest"]:
        raise CheckpointMismatch(
            f"{path} belongs to another decoder than the one beside it: remove it and run {again}."
        )
    for dataset in config.datasets.values():
        asked = (config.get("embodiment") or "") in ("", dataset.embodiment)
        # Only in the release's own format do names of streams and of statistics compare.
        if not asked or not dataset.action or dataset.format != "mimic_episodes":
            continue
        for key, setting in VECTORS.items():
            names = streams(parse(dataset[setting], setting))
            if strange := strange_streams(normalizer, key, names):
                raise CheckpointMismatch(
                    f"{path} holds statistics of {', '.join(strange)}, but the {setting} of this "
                    f"configuration is {', '.join(names)}: they are of another robot."
                )
