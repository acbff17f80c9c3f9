"""Generating video: observed frames and a text in, the whole clip out.

The policy samples inside one compiled program and needs few steps of it. A person who waits for a
video wants to see how far it is, so here a Python loop calls one compiled step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from data_pipelines.clip import Clip
from data_pipelines.frames import cover
from mvjax.experiment import Experiment
from mvjax.flow import (
    Sampling,
    Trajectory,
    advance,
    condition_mask,
    denoise,
    published_noise,
    schedule,
    start,
)
from mvjax.models.layers import rounded
from mvjax.models.network import Network, Params
from mvjax.models.presets import video_network
from mvjax.parallel import DEFAULT_RULES, Rules, make_mesh, use_rules
from mvjax.policy.load import check_identity, load_text_encoder, load_video_tokenizer
from mvjax.training.bridge import load_backbone, read_meta
from mvjax.training.checkpoint import CheckpointMismatch

Array = jax.Array


class Conditions(NamedTuple):
    """What a video is generated from.

    Attributes:
        clean: latents that begin with the observed frames [1, t, h, w, c]; the others are zeros.
        mask: 1 for the observed latent frames [1, t].
        text: embedding [1, l, dim]; with guidance [2, l, dim], the negative text second.
        guidance: g of x0 = x0_c + g (x0_c - x0_u), a scalar, where x0_u is predicted for the
            negative text.
    """

    clean: Array
    mask: Array
    text: Array
    guidance: Array


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: `self` is static under jit
class VideoModel:
    """A video DiT on the devices of a mesh.

    Attributes:
        network, params: the video DiT, LoRA merged.
        mesh, rules: where its parameters and its computation lie.
    """

    network: Network
    params: Params
    mesh: Mesh
    rules: Rules

    def sample(
        self,
        noise: np.ndarray,
        conditions: Conditions,
        sampling: Sampling,
        progress: Callable[[int], None] = lambda evaluations: None,
    ) -> np.ndarray:
        """Clean latents float32 [1, t, h, w, c], from standard normal noise of that shape.

        Args:
            noise: where to start.
            conditions: from what.
            sampling: how; of it the noise levels.
            progress: called with the number of evaluations that are done, after each.
        """
        whole = NamedSharding(self.mesh, PartitionSpec())
        here = start(noise, sampling.sigmas)
        here, conditions = jax.device_put((here, conditions), whole)
        with jax.set_mesh(self.mesh), use_rules(self.rules):
            # `flow.sample_video` in Python: inside a compiled loop there is nothing to see.
            for done, numbers in enumerate(zip(*schedule(sampling.sigmas)), 1):
                here = self._step(self.params, here, conditions, *numbers)
                here.x.block_until_ready()  # what is not yet computed is no progress
                progress(done)
        return np.asarray(here.x)

    @partial(jax.jit, static_argnums=0, donate_argnums=2)
    def _step(self, params, here: Trajectory, conditions, sigma, coefficients) -> Trajectory:
        """The trajectory one evaluation later; σ is an input, so that one compilation serves."""
        x0 = self._clean_prediction(params, here.x, conditions, sigma)
        whole = PartitionSpec()  # as it came in, so that the next step is the same program
        return jax.lax.with_sharding_constraint(advance(here, x0, coefficients), whole)

    def _clean_prediction(self, params, x, conditions, sigma) -> Array:
        clean, mask, text, guidance = conditions
        copies = len(text)
        x, clean, mask = (jnp.repeat(array, copies, axis=0) for array in (x, clean, mask))
        net = self.network.bind(params)
        clean = rounded(clean, self.network.config.precision)
        velocity = lambda i: net(i.latents, i.timesteps, text, i.condition_mask)  # noqa: E731
        x0 = denoise(velocity, x, clean, jnp.full((copies, 1), sigma), mask)
        return x0 if copies == 1 else x0[:1] + guidance * (x0[:1] - x0[1:])


def generate(
    model: VideoModel,
    tokenizer: Any,
    clip: Clip,
    frames: np.ndarray,
    text: np.ndarray,
    sampling: Sampling,
    *,
    guidance: float = 0.0,
    negative: np.ndarray | None = None,
    progress: Callable[[int], None] = lambda evaluations: None,
) -> np.ndarray:
    """Generates a video that begins with what was observed.

    Equal arguments give the same video, on the same kind of device.

    Args:
        model: the video DiT.
        tokenizer: the video tokenizer whose latents it was trained on.
        clip: how long and large the video is.
        frames: the observed ones, uint8 [clip.observed_frames, any h, any w, 3]; they are scaled
            to cover the clip's size, and their centre is taken.
        text: embedding of the prompt, float32 [l, dim].
        sampling: how it is sampled; of it the noise levels and the seed.
        guidance: see `Conditions`; 0 (mimic-video; Cosmos-Predict2 has 7) runs the network once per
            evaluation, not twice.
        negative: embedding of the text to move away from; needed with guidance.
        progress: called with the number of evaluations that are done, after each.

    Returns:
        uint8 [clip.frames, clip.height, clip.width, 3]; the observed frames have passed through
        the tokenizer as the others have.

    Raises:
        ValueError: if frames or texts do not fit.
    """
    if len(frames) != clip.observed_frames:
        raise ValueError(
            f"There are {len(frames)} frames to begin with, but clip.observed_frames is "
            f"{clip.observed_frames}."
        )
    if guidance < 0:
        raise ValueError(f"guidance must be 0 (none) or more, got {guidance}.")
    texts = [text]
    if guidance:
        if negative is None or negative.shape != text.shape:
            raise ValueError(
                f"Guidance needs the embedding of a negative text of the shape {text.shape}, got "
                f"{None if negative is None else negative.shape}."
            )
        texts.append(negative)
    video = cover(frames, clip.height, clip.width)[None].astype(np.float32) / 127.5 - 1
    clean = np.zeros((1, *clip.latent_shape), np.float32)
    clean[:, : clip.condition_latents] = np.asarray(tokenizer.encode(video))
    conditions = Conditions(
        clean=clean,
        mask=np.asarray(condition_mask(np.full(1, clip.condition_latents), clip.latent_frames)),
        text=np.stack(texts),
        guidance=np.float32(guidance),
    )
    noise = published_noise(sampling.seed, clean.shape)
    latents = model.sample(noise, conditions, sampling, progress)
    decoded = np.asarray(tokenizer.decode(latents))[0]
    return np.clip(np.round((decoded + 1) * 127.5), 0, 255).astype(np.uint8)


# What generating a video needs, from a checkpoint and from what a person adds to it.
#
# A stage-1 training directory knows its clip, sampler, tokenizer and text encoder; a converted
# checkpoint knows the sizes of its network only, and is completed by the released lengths.


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

    Parameters are split over them, and so is the sequence of tokens.

    Args:
        checkpoint: a stage-1 training directory or a converted checkpoint.
        precision: in which it is computed, see `mvjax.models.layers`.
    """
    config = ConfigDict(read_meta(checkpoint)["config"])
    config.backbone = dict(checkpoint=str(checkpoint), precision=precision)
    # There is one sample only, so the devices share its tokens.
    config.rules = {**DEFAULT_RULES, "batch": None, "length": "fsdp"}
    experiment = Experiment.from_config(config)
    devices = jax.local_devices()
    # As many as divide the widths, which parameters are split by.
    text_dim = config.video_model.get("text_dim", config.text.dim)
    count = math.gcd(len(devices), config.video_model.width, text_dim)
    mesh = make_mesh({"fsdp": count}, devices[:count])
    with jax.set_mesh(mesh):
        model, params = load_backbone(experiment, mesh)
    return VideoModel(video_network(model), params, mesh, experiment.rules)


def _described(found: Any) -> str:
    return f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else "an archive"
