"""Video generation: observed frames and a text in, the whole clip out.

The policy samples in one compiled program. Generating a long video takes minutes and shows its
progress, so here a Python loop calls one compiled step.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from data_pipelines.augment import Augment, Variation
from data_pipelines.cameras import dataset_views
from data_pipelines.clip import VIDEO, Clip
from data_pipelines.frames import cover
from mvjax.experiment import Experiment
from mvjax.flow import (
    Sampling,
    Trajectory,
    advance,
    condition_mask,
    denoise,
    network_input,
    published_noise,
    schedule,
    start,
)
from mvjax.models.layers import rounded
from mvjax.models.network import Network, Params
from mvjax.models.presets import video_network
from mvjax.models.video_dit import Memory
from mvjax.parallel import DEFAULT_RULES, Rules, make_mesh, use_rules
from mvjax.policy.load import check_identity, load_text_encoder, load_video_tokenizer
from mvjax.training.bridge import load_backbone
from mvjax.training.damage import CheckpointMismatch
from mvjax.training.directory import find_checkpoint, read_meta

Array = jax.Array

log = logging.getLogger(__name__)


class Conditions(NamedTuple):
    """The conditions of a video.

    Attributes:
        clean: latents of the observed frames, then zeros [1, t, h, w, c].
        mask: 1 for the observed latent frames [1, t].
        text: embedding [1, l, dim]; with guidance [2, l, dim], the negative text second.
        guidance: g of x0 = x0_c + g (x0_c - x0_u), a scalar, where x0_u is predicted for the
            negative text.
        views: latents of every other view [1, condition_latents, its h, its w, c].
    """

    clean: Array
    mask: Array
    text: Array
    guidance: Array
    views: Mapping[str, Array]


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: `self` is static under jit
class VideoModel:
    """A video DiT on the devices of a mesh."""

    network: Network
    params: Params  # LoRA merged
    mesh: Mesh
    rules: Rules

    def sample(
        self,
        noise: np.ndarray,
        conditions: Conditions,
        sampling: Sampling,
        progress: Callable[[int], None] = lambda evaluations: None,
    ) -> np.ndarray:
        """Samples clean latents, float32 [1, t, h, w, c], from standard normal noise of that shape.

        `progress` is called after each evaluation with the number of finished ones.
        """
        whole = NamedSharding(self.mesh, PartitionSpec())
        here = start(noise, sampling.sigmas)
        here, conditions = jax.device_put((here, conditions), whole)
        with jax.set_mesh(self.mesh), use_rules(self.rules):
            # `flow.sample_video` in Python: a compiled loop cannot report progress.
            memory = self._remember(self.params, conditions)
            for done, numbers in enumerate(zip(*schedule(sampling.sigmas)), 1):
                here = self._step(self.params, here, conditions, memory, *numbers)
                here.x.block_until_ready()  # dispatch is asynchronous
                progress(done)
        return np.asarray(here.x)

    @partial(jax.jit, static_argnums=0, donate_argnums=2)
    def _step(
        self, params, here: Trajectory, conditions, memory, sigma, coefficients
    ) -> Trajectory:
        """One evaluation; σ is an input, so that all steps share a compilation."""
        x0 = self._clean_prediction(params, here.x, conditions, memory, sigma)
        whole = PartitionSpec()  # the input's sharding, or the next step would be compiled anew
        return jax.lax.with_sharding_constraint(advance(here, x0, coefficients), whole)

    @partial(jax.jit, static_argnums=0)
    def _remember(self, params, conditions) -> Memory | None:
        """What all evaluations share (`VideoDiT.remember`)."""
        clean, mask, views = self._for_each_text(conditions)
        level = jnp.ones((len(clean), 1))  # of the future, which is not remembered
        i = network_input(clean, clean, level, mask, views)
        return self.network.bind(params).remember(i, conditions.text)

    def _clean_prediction(self, params, x, conditions, memory, sigma) -> Array:
        text, copies = conditions.text, len(conditions.text)
        clean, mask, views = self._for_each_text(conditions)
        velocity = partial(self.network.bind(params).velocity, text=text, memory=memory)
        x, level = jnp.repeat(x, copies, axis=0), jnp.full((copies, 1), sigma)
        x0 = denoise(velocity, x, clean, level, mask, views)
        return x0 if copies == 1 else x0[:1] + conditions.guidance * (x0[:1] - x0[1:])

    def _for_each_text(self, conditions) -> tuple[Array, Array, dict[str, Array]]:
        """Clean latents, mask and views, once for the text and once for the negative one."""
        copies = len(conditions.text)

        def repeated(latents: Array) -> Array:
            return jnp.repeat(rounded(latents, self.network.config.precision), copies, axis=0)

        clean, views = jax.tree.map(repeated, (conditions.clean, conditions.views))
        return clean, jnp.repeat(conditions.mask, copies, axis=0), views


def generate(
    model: VideoModel,
    tokenizer: Any,
    clip: Clip,
    frames: np.ndarray,
    text: np.ndarray,
    sampling: Sampling,
    *,
    views: Mapping[str, np.ndarray] = MappingProxyType({}),
    guidance: float = 0.0,
    negative: np.ndarray | None = None,
    progress: Callable[[int], None] = lambda evaluations: None,
) -> np.ndarray:
    """Generates a video that begins with the observed frames.

    Equal arguments give equal videos on the same kind of device.

    Args:
        model: the video DiT.
        tokenizer: the video tokenizer whose latents it was trained on.
        clip: length and size of the video.
        frames: observed frames, uint8 [clip.observed_frames, any h, any w, 3]; they are scaled to
            cover the clip's size, and cropped to their centre.
        text: embedding of the prompt, float32 [l, dim].
        sampling: sets the noise levels and the seed.
        views: of every other view (`clip.views`) its observed frames, as `frames`.
        guidance: see `Conditions`; 0 (mimic-video's; Cosmos-Predict2's is 7) runs the network once
            per evaluation instead of twice.
        negative: embedding of the negative text, needed with guidance.
        progress: called after each evaluation with the number of finished ones.

    Returns:
        uint8 [clip.frames, clip.height, clip.width, 3]; the observed frames, too, are decoded from
        latents.
    """
    if len(frames) != clip.observed_frames:
        raise ValueError(
            f"got {len(frames)} observed frames, but clip.observed_frames is {clip.observed_frames}"
        )
    check_views(clip.views, frames, views)
    if guidance < 0:
        raise ValueError(f"guidance must be 0 (none) or more, got {guidance}")
    texts = [text]
    if guidance:
        if negative is None or negative.shape != text.shape:
            raise ValueError(
                f"Guidance needs the embedding of a negative text of the shape {text.shape}, got "
                f"{None if negative is None else negative.shape}."
            )
        texts.append(negative)

    def latents(pictures: np.ndarray, height: int, width: int) -> np.ndarray:
        video = cover(pictures, height, width)[None].astype(np.float32) / 127.5 - 1
        return np.asarray(tokenizer.encode(video))

    clean = np.zeros((1, *clip.latent_shape), np.float32)
    clean[:, : clip.condition_latents] = latents(frames, clip.height, clip.width)
    conditions = Conditions(
        clean=clean,
        mask=np.asarray(condition_mask(np.full(1, clip.condition_latents), clip.latent_frames)),
        text=np.stack(texts),
        guidance=np.float32(guidance),
        views={name: latents(views[name], **size) for name, size in clip.views.items()},
    )
    noise = published_noise(sampling.seed, clean.shape)
    made = model.sample(noise, conditions, sampling, progress)
    decoded = np.asarray(tokenizer.decode(made))[0]
    return np.clip(np.round((decoded + 1) * 127.5), 0, 255).astype(np.uint8)


# Configuration and networks of a checkpoint. A stage-1 training directory stores its clip, sampler,
# tokenizer and text encoder; a converted checkpoint only the sizes of its network, and is completed
# by the released values.

# Cosmos-Predict2 480p-10fps; mimic-video has the same lengths at 5 frames per second.
RELEASED = {
    "clip": dict(height=480, width=640, observed_frames=5, future_frames=56, fps=10.0),
    "sampler": dict(video_steps=35, sigma_max=80.0, sigma_min=0.002, seed=0),
    "text": dict(length=512),
    "tokenizer": "",
    "text_encoder": None,
}


def generation_config(checkpoint: Path, given: ConfigDict | None = None) -> ConfigDict:
    """Returns the configuration stored with a video model, completed for a converted one.

    Args:
        checkpoint: a training directory of stage 1 or of a joint run, or a converted video DiT.
        given: a stage-1 configuration, which replaces all but the sizes of the network.

    Returns:
        A configuration with `clip`, `sampler`, `text`, `video_model`, `tokenizer` ("" if unknown)
        and `text_encoder` (None if unknown).

    Raises:
        FileNotFoundError: if the directory holds no checkpoint.
        CheckpointMismatch: if the checkpoint is not one of a video model, or of another text width
            than the given configuration.
    """
    meta = read_meta(checkpoint)
    if meta["stage"] not in ("video", "joint"):
        raise CheckpointMismatch(
            f"{checkpoint} holds a checkpoint of stage {meta['stage']!r}, expected a video model: "
            "give a training directory of stage 1 or of a joint run, or a converted video DiT."
        )
    config = ConfigDict(meta["config"])
    if given is not None:
        if given.text.dim != config.text.dim:
            raise CheckpointMismatch(
                f"{checkpoint} reads texts of width {config.text.dim}, but text.dim of the given "
                f"configuration is {given.text.dim}."
            )
        for name in (*RELEASED, "datasets"):  # the datasets say which cameras were tiled
            config[name] = given[name]
        config.video_model.precision = given.video_model.precision
    elif "converted" in meta:
        for name, value in RELEASED.items():
            config[name] = {**value, **config.get(name, {})} if isinstance(value, dict) else value
    return config


def check_views(wanted: Iterable[str], frames: np.ndarray, views: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError unless `views` are those of a model, with as many frames as the video."""
    if set(views) != set(wanted):
        raise ValueError(
            f"Beside the video this model sees the views {', '.join(wanted) or '(none)'}, but got "
            f"pictures of {', '.join(views) or 'none'}: give --view=NAME=FILE for each view of the "
            "model, and for no other."
        )
    for name, pictures in views.items():
        if len(pictures) != len(frames):
            raise ValueError(
                f"The view {name!r} has {len(pictures)} observed frames, but the video has "
                f"{len(frames)}: give equally many."
            )


def check_tiled(
    config: ConfigDict,
    frames: np.ndarray,
    tiled: bool,
    views: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> None:
    """Raises ValueError unless observed frames are tiled from cameras where those of training were.

    Args:
        config: of `generation_config`; converted weights do not know their cameras and pass.
        frames: the observed frames [n, h, w, 3].
        tiled: whether they are said to be tiled.
        views: those of the model's views.
    """
    trained = [dataset_views(d, config.clip) for d in config.get("datasets", {}).values()]
    for datasets in zip(*trained):  # a view in all of them
        first, pictures = datasets[0], {VIDEO: frames, **views}[datasets[0].name]
        if any(sum(map(len, view.rows)) < 2 for view in datasets):
            continue
        size, (h, w) = (first.height, first.width), pictures.shape[1:3]
        if not tiled or (h, w) != size:
            raise ValueError(
                f"This model was trained on pictures tiled from {first.rows}, but got "
                f"{f'a tiled one of {h}x{w}' if tiled else 'the picture of one camera'}: give a "
                f"picture tiled in the same way, of {size[0]}x{size[1]}, with --tiled."
            )


def cropped(config: ConfigDict, frames: np.ndarray, tiled: bool = False) -> np.ndarray:
    """The part of observed frames that the pictures of training show (`augment.crop`).

    Args:
        config: of `generation_config`; converted weights do not know their datasets.
        frames: of one camera or tiled, uint8 [n, h, w, 3].
        tiled: whether they are tiled; then they are left as they are.
    """
    datasets = (config.get("datasets") or {}).values()
    crops = {Augment.of(dataset).crop for dataset in datasets}
    if crops <= {1.0}:
        return frames
    if tiled or len(crops) > 1:
        log.warning(
            "this model was trained on cropped pictures (augment.crop is %s), but %s: give what "
            "training kept of each camera's picture, its centre.",
            " or ".join(map(str, sorted(crops))),
            "a tiled picture is not cropped" if tiled else "which one is meant is not known",
        )
        return frames
    (crop,) = crops
    height, width = (round(crop * side) for side in frames.shape[1:3])
    return Variation(crop).picture(frames, height, width)


def load_matching_tokenizer(path: str | Path, checkpoint: Path) -> Any:
    """Loads the video tokenizer at `path`, which `checkpoint` must have been trained with."""
    if path == "":
        raise ValueError(
            f"{checkpoint} does not name its video tokenizer; give --config, the configuration of "
            "its training, or --tokenizer=DIR with a converted Wan VAE."
        )
    if not Path(path).exists():
        raise FileNotFoundError(
            f"There is no video tokenizer at {path}; give its path with --tokenizer."
        )
    tokenizer, identity = load_video_tokenizer(Path(path))
    check_identity({"tokenizer": identity}, find_checkpoint(checkpoint))
    return tokenizer


def embed_texts(config: ConfigDict, texts: list[str], checkpoint: Path) -> np.ndarray:
    """Embeds texts [n, text.length, text.dim] with the encoder of `checkpoint`."""
    if config.text_encoder is None:
        raise ValueError(
            f"{checkpoint} does not name its text encoder; give --text_encoder=DIR with a "
            "converted T5, or --text_embedding=FILE.npy in place of the prompt."
        )
    encoder, identity = load_text_encoder(config)
    check_identity({"text_encoder": identity}, find_checkpoint(checkpoint))
    return encoder.encode(texts)


def read_embedding(path: Path, length: int, dim: int) -> np.ndarray:
    """Reads a text embedding [length, dim] from a .npy file of float [l, dim] or [1, l, dim].

    A shorter one is padded with zeros, which the video model attends to, as published.
    """
    try:
        found = np.lib.format.open_memmap(path, mode="r")
    except ValueError as error:  # which does not name the file
        raise ValueError(f"{path} is not a .npy file of numbers: {error}") from error
    array = found[0] if found.ndim == 3 and len(found) == 1 else found
    fits = array.ndim == 2 and array.shape[1] == dim and 1 <= len(array) <= length
    if not fits or array.dtype.kind != "f":
        raise ValueError(
            f"{path} holds {found.dtype} {list(found.shape)}, expected a text embedding of 1 to "
            f"{length} float tokens of width {dim}."
        )
    out = np.zeros((length, dim), np.float32)
    out[: len(array)] = array
    return out


def load_video_model(checkpoint: Path, precision: str) -> VideoModel:
    """Loads a video DiT, its parameters and tokens split over all devices of this process."""
    # Without its stage: what is asked here is how a backbone is read.
    stored = read_meta(checkpoint)["config"]
    config = ConfigDict({name: value for name, value in stored.items() if name != "stage"})
    config.backbone = dict(checkpoint=str(checkpoint), precision=precision)
    # There is only one sample, so the devices share its tokens.
    config.rules = {**DEFAULT_RULES, "batch": None, "length": "fsdp"}
    experiment = Experiment.from_config(config)
    devices = jax.local_devices()
    # Their number must divide the widths, by which parameters are split.
    text_dim = config.video_model.get("text_dim", config.text.dim)
    count = math.gcd(len(devices), config.video_model.width, text_dim)
    mesh = make_mesh({"fsdp": count}, devices[:count])
    with jax.set_mesh(mesh):
        model, params = load_backbone(experiment, mesh)
    return VideoModel(video_network(model), params, mesh, experiment.rules)
