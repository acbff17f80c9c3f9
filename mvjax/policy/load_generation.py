"""What generating a video needs, from a checkpoint and from what a person adds to it.

A stage-1 training directory knows its clip, sampler, tokenizer and text encoder; a converted
checkpoint knows the sizes of its network only, and is completed by the released lengths.
"""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mvjax.checkpoints.backbone import load_backbone
from mvjax.checkpoints.bridge import read_meta
from mvjax.checkpoints.encoders import (
    check_identity,
    load_text_encoder,
    load_video_tokenizer,
)
from mvjax.checkpoints.tree_match import CheckpointMismatch
from mvjax.models.build import video_network
from mvjax.parallel.mesh import make_mesh
from mvjax.parallel.rules import make_rules
from mvjax.policy.generation import VideoModel

# Cosmos-Predict2 480p-10fps; mimic-video has the same lengths at 5 frames per second.
RELEASED = {
    "clip": dict(height=480, width=640, observed_frames=5, future_frames=56, fps=10.0),
    "sampler": dict(video_steps=35, sigma_max=80.0, sigma_min=0.002, seed=0),
    "text": dict(length=512),
    "tokenizer": "",
    "text_encoder": None,
}


def generation_config(checkpoint: Path) -> ConfigDict:
    """The configuration stored with a video model, completed where it is a converted one.

    Returns:
        With `clip`, `sampler`, `text`, `video_model`, `tokenizer` ("" where unknown) and
        `text_encoder` (None where unknown).

    Raises:
        FileNotFoundError: if the directory holds no checkpoint.
        CheckpointMismatch: if the checkpoint is not one of a video model.
    """
    meta = read_meta(checkpoint)
    if meta["stage"] != "video":
        raise CheckpointMismatch(
            f"{checkpoint} holds a checkpoint of stage {meta['stage']!r}, but videos are generated "
            "by a video model: give a stage-1 training directory or a converted video DiT."
        )
    config = ConfigDict(meta["config"])
    if "converted" in meta:
        for name, value in RELEASED.items():
            config[name] = {**value, **config.get(name, {})} if isinstance(value, dict) else value
    return config


def load_matching_tokenizer(path: str | Path, checkpoint: Path) -> Any:
    """The video tokenizer at `path`, which must be the one `checkpoint` was trained with."""
    if path == "":
        raise ValueError(
            f"{checkpoint} does not say which video tokenizer belongs to it; give "
            "--tokenizer=DIR with a converted Wan VAE."
        )
    if not Path(path).exists():
        raise FileNotFoundError(
            f"There is no video tokenizer at {path}; give --tokenizer with its new place."
        )
    tokenizer, identity = load_video_tokenizer(Path(path))
    check_identity({"tokenizer": identity}, checkpoint)
    return tokenizer


def embed_texts(config: ConfigDict, texts: list[str], checkpoint: Path) -> np.ndarray:
    """Embeddings [n, text.length, text.dim] by the encoder that `checkpoint` was trained with."""
    if config.text_encoder is None:
        raise ValueError(
            f"{checkpoint} does not say which text encoder belongs to it; give --text_encoder=DIR "
            "with a converted T5, or --text_embedding=FILE.npy in place of the prompt."
        )
    encoder, identity = load_text_encoder(config)
    check_identity({"text_encoder": identity}, checkpoint)
    return encoder.encode(texts)


def read_embedding(path: Path, length: int, dim: int) -> np.ndarray:
    """A text embedding [length, dim] from a .npy file of float [l, dim] or [1, l, dim].

    Shorter ones are filled up with zeros, which the video model attends to, as published.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no text embedding at {path}.")
    try:
        found = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a .npy file of numbers: {error}") from error
    array = found[0] if getattr(found, "ndim", 0) == 3 and len(found) == 1 else found
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim != 2:
        raise ValueError(
            f"{path} holds {_described(found)}; a text embedding is float [tokens, {dim}]."
        )
    if array.shape[1] != dim or not 1 <= len(array) <= length:
        raise ValueError(
            f"{path} holds {_described(found)}; this video model reads 1 to {length} tokens of "
            f"width {dim}."
        )
    out = np.zeros((length, dim), np.float32)
    out[: len(array)] = array
    return out


def load_video_model(checkpoint: Path, precision: str) -> VideoModel:
    """The video DiT of a checkpoint, on all devices of this process.

    Parameters are split over them, and so is the sequence of tokens: there is one sample only.

    Args:
        checkpoint: a stage-1 training directory or a converted checkpoint.
        precision: in which it is computed, see `mvjax.models.precision`.
    """
    config = ConfigDict(read_meta(checkpoint)["config"])
    config.backbone = dict(checkpoint=str(checkpoint), precision=precision)
    devices = jax.local_devices()
    # As many as divide the widths, which parameters are split by.
    text_dim = config.video_model.get("text_dim", config.text.dim)
    count = math.gcd(len(devices), config.video_model.width, text_dim)
    mesh = make_mesh({"fsdp": count}, devices[:count])
    rules = make_rules({"batch": None, "length": "fsdp"})
    with jax.set_mesh(mesh):
        model, params = load_backbone(config, mesh, rules)
    return VideoModel(video_network(model), params, mesh, rules)


def _described(found: Any) -> str:
    return f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else "an archive"
