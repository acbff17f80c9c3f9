"""How a run does on windows it has not seen: their loss, and in stage 1 the video it makes.

Everything random here comes from fixed keys, and nothing of the run is changed: with and without
looking, a run gives the same losses.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data_pipelines.video import write_video
from mvjax.experiment import Experiment
from mvjax.flow import condition_mask, denoise, sample_video, start
from mvjax.models.network import Params
from mvjax.parallel import Rules, sharding_tree, split_ways, use_rules
from mvjax.policy.load import load_video_tokenizer
from mvjax.training.objectives import Batch, Stage, named_levels
from mvjax.training.prefetch import device_batches

STRIP = 6  # frames of a video in its picture

Pictures = Mapping[str, np.ndarray]


def look_at(
    experiment: Experiment,
    stage: Stage,
    mesh: Mesh,
    batches: Callable[..., Iterator[Any]],
    identity: Mapping[str, str],
    workdir: Path,
) -> "HeldOut | None":
    """What a run looks at every `training.sample_every` steps; None for 0.

    The loss is measured on as many windows as a micro-batch has, which fit the devices. Videos are
    generated in stage 1, `training.sample_count` of them.

    Args:
        experiment: Of the run.
        stage: The stage that is trained.
        mesh: Where it is trained.
        batches: (split, batch size, **reading) -> the loader's iterator.
        identity: The networks that made the records.
        workdir: The training directory.

    Raises:
        ValueError: If a dataset has no held-out windows, or the tokenizer is another one than made
            the records.
    """
    config, settings, rules = experiment.config, experiment.config.training, experiment.rules
    if not settings.sample_every:
        return None
    shardings = sharding_tree(stage.batch_axes, mesh, rules)

    def windows(count: int) -> Batch:
        loader = batches("validation", count, num_threads=1, prefetch_batches=1)
        return next(device_batches(loader, shardings, ahead=0))[0]

    measured = windows(settings.batch_size // settings.accumulate)
    if stage.name != "video" or settings.sample_count < 1:
        return HeldOut(stage, mesh, rules, measured)
    tokenizer = None
    if jax.process_index() == 0:
        tokenizer, ours = load_video_tokenizer(config.tokenizer)
        if ours != identity["tokenizer"]:
            raise ValueError(
                f"The records were encoded with another tokenizer than {config.tokenizer}; name "
                "that one as config.tokenizer, or set config.training.sample_count=0."
            )
    # As many as the devices generate together, although fewer may be written.
    ways = split_ways("batch", mesh, rules)
    begun = windows(-(-settings.sample_count // ways) * ways)
    videos = HeldOutVideos(experiment, mesh, begun, settings.sample_count, tokenizer, workdir)
    return HeldOut(stage, mesh, rules, measured, videos)


class HeldOut:
    """Called by the loop as held_out(step, params) -> (numbers, pictures)."""

    def __init__(
        self,
        stage: Stage,
        mesh: Mesh,
        rules: Rules,
        batch: Batch,
        videos: "HeldOutVideos | None" = None,
    ):
        """Takes the windows.

        Args:
            stage: Whose loss is measured.
            mesh: Where it is trained.
            rules: How the computation is sharded.
            batch: Windows of the validation split, on the devices, as the stage takes them.
            videos: Also generates videos; None in stage 2.
        """
        self._stage, self._rules, self._batch, self._videos = stage, rules, batch, videos
        self._whole = NamedSharding(mesh, PartitionSpec())  # so that every process can read it

    def __call__(self, step: int, params: Params) -> tuple[dict[str, float], Pictures]:
        """Measures and generates.

        Args:
            step: Number of steps made; names the files.
            params: Of the stage, not changed.

        Returns:
            "validation/loss" and the stage's metrics under "validation/"; pictures uint8 [h, w, 3].
        """
        loss, metrics = jax.device_get(self._loss(params, self._stage.frozen, self._batch))
        levels = metrics.pop("by_level", None)
        numbers = {"loss": loss, **metrics, **named_levels([] if levels is None else [levels])}
        numbers = {f"validation/{name}": float(value) for name, value in numbers.items()}
        return numbers, self._videos(step, params) if self._videos else {}

    @cached_property
    def _loss(self) -> Any:
        def loss(params: Params, frozen: Params, batch: Batch) -> Any:
            with use_rules(self._rules):
                return self._stage.loss(params, frozen, batch, jax.random.key(0))

        return jax.jit(loss, out_shardings=self._whole)


class HeldOutVideos:
    """Generates the future of held-out windows and writes it beside what happened."""

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
            experiment: Of the run.
            mesh: The training's.
            batch: Windows of the validation split on the devices, a batch that the mesh can split.
            count: How many of them are written.
            tokenizer: Decodes latents; needed on process 0 only.
            workdir: The videos are samples/step_<n>/<i>.mp4 there: left what happened, right what
                was generated. Both have passed through the tokenizer.
        """
        self._clip, self._network = experiment.clip, experiment.video_network
        self._sigmas = experiment.sampling().sigmas
        self._rules, self._batch, self._count = experiment.rules, batch, count
        self._tokenizer, self._folder = tokenizer, Path(workdir) / "samples"
        self._happened: list[np.ndarray] = []  # decoded once
        # The few that are written, whole on every device.
        self._whole = NamedSharding(mesh, PartitionSpec())

    def __call__(self, step: int, params: Params) -> Pictures:
        """Writes the videos; their pictures by name, on process 0."""
        happened, made = self._generate(params, self._batch)
        if jax.process_index() != 0:
            return {}
        self._happened = self._happened or self._decode(happened)
        folder = self._folder / f"step_{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        pictures = {}
        for number, (true, generated) in enumerate(zip(self._happened, self._decode(made))):
            video = np.concatenate([true, generated], axis=2)
            write_video(folder / f"{number}.mp4", video, max(round(self._clip.fps), 1), crf=18)
            shown = np.linspace(0, len(true) - 1, min(STRIP, len(true))).astype(int)
            rows = [np.concatenate(list(frames[shown]), axis=1) for frames in (true, generated)]
            pictures[f"samples/{number}"] = np.concatenate(rows)
        return pictures

    @cached_property
    def _generate(self) -> Any:
        return partial(jax.jit, out_shardings=self._whole)(self._generated)

    def _generated(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Latents of the first windows, and generated ones that begin as they do."""
        x0, text = batch["latents"], batch["text"]
        samples = len(x0)
        mask = condition_mask(
            jnp.full(samples, self._clip.condition_latents), self._clip.latent_frames
        )
        with use_rules(self._rules):
            net = self._network.bind(params)

            def clean(noisy: jax.Array, sigma: jax.Array) -> jax.Array:
                return denoise(
                    lambda i: net(i.latents, i.timesteps, text, i.condition_mask),
                    noisy,
                    x0,
                    sigma,
                    mask,
                )

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
