"""Validation while training: the loss of held-out windows, and generated video if it is learned.

All randomness comes from fixed keys and nothing of the run is changed: with and without
validation, a run gives the same losses.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data_pipelines.settings import other_networks
from data_pipelines.video import write_video
from mvjax.experiment import Experiment
from mvjax.flow import condition_mask, denoise, network_input, sample_video, start
from mvjax.models.network import Params
from mvjax.parallel import sharding_tree, split_ways, use_rules
from mvjax.policy.load import load_video_tokenizer
from mvjax.training.channels import BestEffort
from mvjax.training.directory import BACKBONE
from mvjax.training.objectives import Batch, Stage, batch_views, named_levels
from mvjax.training.prefetch import device_batches

STRIP = 6  # frames of a video in its picture

Pictures = Mapping[str, np.ndarray]

# Called by the loop as validation(step, params) -> ("validation/..." metrics, pictures).
Validation = Callable[[int, Params], tuple[dict[str, float], Pictures]]


def make_validation(
    experiment: Experiment,
    stage: Stage,
    mesh: Mesh,
    batches: Callable[..., Iterator[Any]],
    identity: Mapping[str, str],
    workdir: Path,
) -> Validation | None:
    """The validation that a run makes every `training.sample_every` steps; None for 0.

    The loss is measured on one micro-batch of windows, which fits the devices. Where the video DiT
    learns, `training.sample_count` videos are generated.

    Args:
        experiment, stage, mesh, workdir: Of the run.
        batches: (split, batch size, **reading) -> the loader's iterator.
        identity: The networks that made the records.

    Raises:
        ValueError: If a dataset has no held-out windows, or the tokenizer is not the one that made
            the records.
    """
    config, settings, rules = experiment.config, experiment.config.training, experiment.rules
    if not settings.sample_every:
        return None
    shardings = sharding_tree(stage.batch_axes, mesh, rules)

    def windows(count: int) -> Batch:
        loader = batches("validation", count, num_threads=1, prefetch_batches=1)
        return next(device_batches(loader, shardings, ahead=0))[0]

    batch, videos = windows(settings.batch_size // settings.accumulate), None
    if experiment.learns_video and settings.sample_count > 0:
        tokenizer = None
        if jax.process_index() == 0:
            tokenizer, ours = load_video_tokenizer(config.tokenizer)
            if other_networks({"tokenizer": identity["tokenizer"]}, {"tokenizer": ours}):
                raise ValueError(
                    f"The records were encoded with another tokenizer than {config.tokenizer}; "
                    "set config.tokenizer to that one, or set config.training.sample_count=0."
                )
        # As many as the devices generate together, although fewer may be written.
        ways = split_ways("batch", mesh, rules)
        begun = windows(-(-settings.sample_count // ways) * ways)
        count = settings.sample_count
        videos = ValidationVideos(experiment, mesh, begun, count, tokenizer, workdir)

    # Whole on every device, so that every process can read it.
    @partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
    def loss(params: Params, frozen: Params, batch: Batch) -> Any:
        with use_rules(rules):
            return stage.loss(params, frozen, batch, jax.random.key(0))

    def validation(step: int, params: Params) -> tuple[dict[str, float], Pictures]:
        value, metrics = jax.device_get(loss(params, stage.frozen, batch))
        levels = metrics.pop("by_level", None)
        numbers = {"loss": value, **metrics, **named_levels([] if levels is None else [levels])}
        numbers = {f"validation/{name}": float(number) for name, number in numbers.items()}
        return numbers, videos(step, params[BACKBONE] if stage.parts else params) if videos else {}

    return validation


class ValidationVideos:
    """Generates the future of held-out windows and writes it beside the recorded one."""

    def __init__(
        self,
        experiment: Experiment,
        mesh: Mesh,
        batch: Batch,
        count: int,
        tokenizer: Any,
        workdir: Path,
    ):
        """Takes the windows.

        Args:
            experiment, mesh: Of the run.
            batch: Windows of the validation split on the devices, a batch that the mesh can split.
            count: How many of them are written.
            tokenizer: Decodes latents; needed on process 0 only.
            workdir: The videos are samples/step_<n>/<i>.mp4 there: left the recorded one, right
                the generated one. Both have passed through the tokenizer.
        """
        self._experiment = experiment
        self._clip, self._network = experiment.clip, experiment.video_network
        self._sigmas = experiment.sampling().sigmas
        self._rules, self._batch, self._count = experiment.rules, batch, count
        self._tokenizer, self._folder = tokenizer, Path(workdir) / "samples"
        self._recorded: list[np.ndarray] = []  # decoded once
        self._effort = BestEffort("making sample videos", "the run goes on without them")
        # The few that are written, whole on every device.
        self._generate = jax.jit(
            self._generated, out_shardings=NamedSharding(mesh, PartitionSpec())
        )

    def __call__(self, step: int, params: Params) -> Pictures:
        """Writes the videos, named by the step; returns pictures uint8 [h, w, 3] on process 0."""
        recorded, generated = self._generate(params, self._batch)
        pictures: dict[str, np.ndarray] = {}
        if jax.process_index() == 0:
            with self._effort:  # the other processes have gone on, and the run will
                self._write(step, recorded, generated, pictures)
        return pictures

    def _write(
        self, step: int, recorded: jax.Array, generated: jax.Array, pictures: dict[str, np.ndarray]
    ) -> None:
        self._recorded = self._recorded or self._decode(recorded)
        folder = self._folder / f"step_{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        for number, pair in enumerate(zip(self._recorded, self._decode(generated))):
            video = np.concatenate(pair, axis=2)
            write_video(folder / f"{number}.mp4", video, max(round(self._clip.fps), 1), crf=18)
            shown = np.linspace(0, len(video) - 1, min(STRIP, len(video))).astype(int)
            rows = [np.concatenate(list(frames[shown]), axis=1) for frames in pair]
            pictures[f"samples/{number}"] = np.concatenate(rows)

    def _generated(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Latents of the first windows, and generated ones with the same observed frames."""
        x0, text = batch["latents"], batch["text"]
        observed = jnp.full(len(x0), self._clip.condition_latents)
        mask = condition_mask(observed, self._clip.latent_frames)
        views = batch_views(self._experiment, batch)
        with use_rules(self._rules):
            net = self._network.bind(params)
            level = jnp.ones((len(x0), 1))  # of the future, which is not remembered
            memory = net.remember(network_input(x0, x0, level, mask, views), text)
            velocity = partial(net.velocity, text=text, memory=memory)

            def clean(noisy: jax.Array, sigma: jax.Array) -> jax.Array:
                return denoise(velocity, noisy, x0, sigma, mask, views)

            noise = jax.random.normal(jax.random.key(0), x0.shape)
            made = sample_video(clean, start(noise, self._sigmas), self._sigmas).x
        return x0[: self._count], made[: self._count]

    def _decode(self, latents: jax.Array) -> list[np.ndarray]:
        # On one device of this process alone: the others have gone on to the next step.
        device, decoded = jax.local_devices()[0], []
        for one in np.asarray(latents):
            video = self._tokenizer.decode(jax.device_put(one[None], device))
            pixels = np.round((np.asarray(video, np.float32)[0] + 1) * 127.5)
            decoded.append(np.clip(pixels, 0, 255).astype(np.uint8))
        return decoded
