"""Action errors on held-out episodes, for true and for generated video, and the video's own error.

The release validates a decoder with two tables: the error of its actions when it reads the true
future video at every noise level of the schedule ("gtvid"), and when it reads the video model's own
at every stop step ("genvid"). Both are here, per step of the chunk and dimension, with PSNR and
SSIM of the video that full denoising ends with.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from ml_collections import ConfigDict
from tqdm import tqdm

from data_pipelines.atomic import wait_until, write_json, write_npz, write_text
from data_pipelines.clips import cut_episode
from data_pipelines.episode import Episode, split_of
from data_pipelines.html import render
from data_pipelines.sources.formats import open_config
from data_pipelines.video import write_video
from mvjax.evaluation.figures import curves_figure
from mvjax.experiment import Experiment
from mvjax.flow import Trajectory, advance, schedule, start
from mvjax.policy.load import load_policy, policy_identity
from mvjax.policy.observation import Observation
from mvjax.policy.policy import Inputs, Policy, VideoActionModel, Weights, medoid, to_pixels

# Moments of held-out episodes, as observations with their true future and what was done there.


@dataclass(frozen=True)
class Moment:
    """A moment of a held-out episode.

    Attributes:
        dataset: the dataset's name.
        episode: the episode's number in it.
        id: the episode's id.
        at: how much of the episode lies before it, a share.
    """

    dataset: str
    episode: int
    id: str
    at: Fraction


@dataclass(frozen=True)
class Window:
    """What a demonstration shows at a moment.

    Attributes:
        moment: which one.
        observation: with the true future.
        actions: what was done, raw units [horizon, dim].
    """

    moment: Moment
    observation: Observation
    actions: np.ndarray


def held_out_episodes(
    episodes: Sequence[Episode], dataset: ConfigDict, validation_share: float
) -> dict[int, str]:
    """Number and id of the episodes that no training has seen.

    One that cannot be opened is left out and said: the encoding job has left it out as well.

    Args:
        episodes: of the dataset.
        dataset: its config section.
        validation_share: share of the episodes that training holds out.

    Raises:
        ValueError: if there is none.
    """
    held_out = {}
    for number in range(len(episodes)):
        try:
            id = episodes[number].id
        except Exception as error:  # readers and decoders raise types of their own
            print(f"{dataset.name}: skipped episode number {number}: {error}", file=sys.stderr)
            continue
        if split_of(id, validation_share) == "validation":
            held_out[number] = id
    if not held_out:
        raise ValueError(
            f"Dataset {dataset.name!r} has no held-out episode: config.validation_share is "
            f"{validation_share}; train with a larger one."
        )
    return held_out


def held_out_moments(
    episodes: Sequence[Episode], dataset: ConfigDict, validation_share: float, count: int
) -> list[Moment]:
    """So many moments, spread over the held-out episodes and over their length.

    Args:
        episodes, dataset, validation_share: as in `held_out_episodes`.
        count: how many.

    Returns:
        Moments in the order of their episodes.
    """
    held_out = held_out_episodes(episodes, dataset, validation_share)
    numbers = list(held_out)
    chosen = Counter(numbers[n * len(numbers) // count] for n in range(count))
    return [
        Moment(dataset.name, number, held_out[number], Fraction(2 * n + 1, 2 * many))
        for number, many in chosen.items()
        for n in range(many)
    ]


def windows_at(
    episode: Episode, moments: Sequence[Moment], dataset: ConfigDict, config: ConfigDict
) -> list[Window]:
    """Reads moments of one episode.

    Args:
        episode: theirs.
        moments: which.
        dataset: its config section, with actions.
        config: `clip` and `policy_io`.

    Raises:
        ValueError: if the episode cannot be cut.
    """
    cuts = cut_episode(episode, dataset, config.clip, config.policy_io)
    windows = []
    for moment in moments:
        index = int(moment.at * len(cuts.clips))
        past, future = np.split(cuts.frames[cuts.clips[index]], [config.clip.observed_frames])
        proprio = cuts.columns["proprio"][index]
        observation = Observation(past, proprio, episode.instructions[0], future)
        windows.append(Window(moment, observation, cuts.columns["actions"][index]))
    return windows


# How alike two videos are: PSNR and SSIM.


PEAK = 255.0
_WINDOW = dict(sigma=1.5, truncate=3.5)  # 11 x 11 pixels


def psnr(video: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB, per frame.

    Args:
        video, reference: uint8 [t, h, w, 3].

    Returns:
        float64 [t]; infinity where the frames are equal.
    """
    error = np.mean((video.astype(np.float64) - reference) ** 2, axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(PEAK**2 / error)


def ssim(video: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Structural similarity, per frame: 1 for equal frames.

    Wang et al. 2004: Gaussian window of σ 1.5 over 11x11 pixels, K1 0.01, K2 0.03, population
    covariance; the mean over pixels whose window lies inside the frame, and over the colours.

    Args:
        video, reference: uint8 [t, h, w, 3], at least 11 pixels high and wide.

    Returns:
        float64 [t].
    """
    return np.array(
        [_ssim(x.astype(np.float64), y.astype(np.float64)) for x, y in zip(video, reference)]
    )


def _ssim(x: np.ndarray, y: np.ndarray) -> float:
    blur = lambda image: scipy.ndimage.gaussian_filter(image, axes=(0, 1), **_WINDOW)  # noqa: E731
    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    likeness /= (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return float(likeness[5:-5, 5:-5].mean())


@dataclass(frozen=True)
class WindowErrors:
    """What the policy would have done there; s stop steps.

    Attributes:
        true_video, generated_video: squared error of the normalised actions [s, horizon, dim].
        raw_true_video, raw_generated_video: absolute error in the actions' units, likewise.
        psnr, ssim: of every future frame of the fully denoised video [future_frames].
    """

    true_video: np.ndarray
    generated_video: np.ndarray
    raw_true_video: np.ndarray
    raw_generated_video: np.ndarray
    psnr: np.ndarray
    ssim: np.ndarray


def window_errors(
    policy: Policy, windows: Iterable[Window], stop_steps: Sequence[int]
) -> Iterator[tuple[Window, WindowErrors]]:
    """Every window with its errors, computed in batches of the policy.

    Args:
        policy: its sampling says the schedule; its stop step and mode are not used.
        windows: no more than a batch of them is held at a time.
        stop_steps: at which steps K of the schedule to read the video.
    """
    windows = iter(windows)
    while batch := list(islice(windows, policy.batch_size)):
        (full,) = policy.batches(batch)
        yield from zip(batch, _batch_errors(policy, full, stop_steps))


def _batch_errors(
    policy: Policy, batch: list[Window], stop_steps: Sequence[int]
) -> Iterator[WindowErrors]:
    model, clip, sigmas = policy.model, policy.model.clip, policy.model.sampling.sigmas
    inputs = policy.inputs([window.observation for window in batch], with_future=True)
    read_true, read_generated = [], []
    with policy.devices():
        clean = _encode(model, policy.weights, inputs.video)
        here = start(inputs.video_noise, sigmas)
        for k, (sigma, coefficients) in enumerate(zip(*schedule(sigmas))):
            if k in stop_steps:
                noisy = clean + sigma * inputs.video_noise
                for video, chunks in ((noisy, read_true), (here.x, read_generated)):
                    act = _act(model, policy.weights, video, clean, sigma, inputs)
                    chunks.append(np.asarray(act))
            here = _step(model, policy.weights, here, clean, sigma, coefficients, inputs)
        made = np.asarray(_decode(policy.weights, here.x))[:, clip.observed_frames :]
    shown = np.asarray(inputs.video)[:, clip.observed_frames :]
    wanted = np.stack([window.actions for window in batch])
    normalised = policy.normalizer.normalize("actions", wanted)
    for i in range(len(batch)):
        true, generated = (np.stack(chunks)[:, i] for chunks in (read_true, read_generated))
        raw_true, raw_generated = (
            policy.normalizer.unnormalize("actions", chunks) for chunks in (true, generated)
        )
        yield WindowErrors(
            true_video=(true - normalised[i]) ** 2,
            generated_video=(generated - normalised[i]) ** 2,
            raw_true_video=np.abs(raw_true - wanted[i]),
            raw_generated_video=np.abs(raw_generated - wanted[i]),
            psnr=psnr(made[i], shown[i]),
            ssim=ssim(made[i], shown[i]),
        )


# The noise level is an argument, so that the whole schedule needs one program of each kind.


@partial(jax.jit, static_argnums=0)
def _encode(model: VideoActionModel, weights: Weights, video: jax.Array) -> jax.Array:
    return model.encode(weights[0], video)


@partial(jax.jit, static_argnums=0)
def _act(model, weights: Weights, x, clean, sigma, inputs: Inputs) -> jax.Array:
    level = jnp.full((len(x), 1), sigma)
    context = model.read(weights[1], x, clean, level, inputs.text)
    chunks = model.actions(weights[2], context, level, inputs.proprio, inputs.action_noise)
    return medoid(chunks)


@partial(jax.jit, static_argnums=0)
def _step(
    model, weights: Weights, here: Trajectory, clean, sigma, coefficients, inputs: Inputs
) -> Trajectory:
    x0 = model.denoised(weights[1], here.x, clean, jnp.full((len(clean), 1), sigma), inputs.text)
    return advance(here, x0, coefficients)


@jax.jit
def _decode(weights: Weights, latents: jax.Array) -> jax.Array:
    return to_pixels(weights[0], latents)


# The offline evaluation on file: `offline.json` for programs, `offline.html` for people.


def summarise(
    errors: Sequence[WindowErrors],
    unreadable: Sequence[str],
    stop_steps: Sequence[int],
    sigmas: np.ndarray,
    label: str,
) -> dict[str, Any]:
    """Means over windows, JSON-able.

    Args:
        errors: of every window.
        unreadable: episodes that are not among them, and why.
        stop_steps: at which the video was read.
        sigmas: noise levels of the whole schedule.
        label: what was evaluated.

    Returns:
        windows, unreadable, label, stop_steps, sigmas; under "true_video" and "generated_video"
        mse (of normalised actions, per stop step), mse_by_step and mse_by_dimension (per stop step
        and step of the chunk, or dimension), and mae_by_dimension (in the actions' units); psnr and
        ssim per future frame.
    """

    def mean(name: str, *axes: int) -> list:
        return np.mean([getattr(e, name) for e in errors], axis=(0, *axes)).tolist()

    summary = {
        "label": label,
        "windows": len(errors),
        "unreadable": list(unreadable),
        "stop_steps": list(stop_steps),
        "sigmas": [float(sigmas[k]) for k in stop_steps],
    }
    for name in ("true_video", "generated_video"):
        summary[name] = {
            "mse": mean(name, 2, 3),
            "mse_by_step": mean(name, 3),
            "mse_by_dimension": mean(name, 2),
            "mae_by_dimension": mean(f"raw_{name}", 2),
        }
    finite = np.minimum([e.psnr for e in errors], 100.0)  # equal frames are infinitely alike
    return summary | {"psnr": finite.mean(axis=0).tolist(), "ssim": mean("ssim")}


def write_offline(folder: Path, summary: dict[str, Any]) -> Path:
    """Writes both files and returns the page's path."""
    write_json(folder / "offline.json", summary)
    true, generated = summary["true_video"], summary["generated_video"]
    steps, along = np.array(summary["stop_steps"]), np.array(generated["mse_by_step"][0])
    frames = np.arange(1, len(summary["psnr"]) + 1)

    def by_frame(name: str, values: list[float]) -> str:
        return curves_figure({name: (frames, np.array(values))}, "future frame", name, name)

    page = render(
        "offline.html",
        "mvjax.evaluation",
        title=f"Offline evaluation of {summary['label']}",
        **summary,
        error_by_stop_step=curves_figure(
            {
                "true video": (steps, np.array(true["mse"])),
                "generated video": (steps, np.array(generated["mse"])),
            },
            "stop step K of the video",
            "action error",
            "Error by stop step",
        ),
        error_along_chunk=curves_figure(
            {f"K = {steps[0]}": (np.arange(1, len(along) + 1), along)},
            "step of the chunk",
            "action error",
            "Error along the chunk",
        ),
        psnr_by_frame=by_frame("PSNR, dB", summary["psnr"]),
        ssim_by_frame=by_frame("SSIM", summary["ssim"]),
        mean_psnr=np.mean(summary["psnr"]),
        mean_ssim=np.mean(summary["ssim"]),
    )
    write_text(folder / "offline.html", page)
    return folder / "offline.html"


# The offline evaluation as a job: shared by processes, and continued where it was stopped.
#
# What was computed at a moment is kept in a file of its own, `moments/<digest>.npz`; the digest
# is of all that decides it. So a file that is there is what is wanted, whoever has written it.


_UNREADABLE = "unreadable"  # in place of errors: why the episode could not be read
Files = Mapping[Moment, Path]


def evaluate_offline(
    experiment: Experiment,
    checkpoint: Path,
    folder: Path,
    stop_steps: Sequence[int],
    count: int,
    batch: int,
) -> dict[str, Any]:
    """Evaluates a policy on the held-out episodes of every dataset with actions.

    The processes of a job share the episodes and the folder; each has the whole policy on its own
    devices. An episode that cannot be read is left out and named.

    Args:
        experiment: of the stage-2 run.
        checkpoint: its training directory.
        folder: where the results go.
        stop_steps: at which to read the video.
        count: moments per dataset.
        batch: moments computed at once.

    Returns:
        What `summarise` gives, in every process.

    Raises:
        ValueError: if nothing is held out, or none of it can be read.
    """
    config, sampling = experiment.config, experiment.sampling()
    sections = {d.name: d for d in config.datasets.values() if d.action}
    episodes = {name: open_config(dataset) for name, dataset in sections.items()}
    measured = [policy_identity(config, checkpoint), str(sampling), list(stop_steps)]
    files: dict[Moment, Path] = {}
    for name, dataset in sections.items():
        moments = held_out_moments(episodes[name], dataset, config.validation_share, count)
        files |= _files(folder / "moments", moments, [*measured, *_settings(dataset, config)])

    def windows(moments: Iterable[Moment]) -> Iterator[Window]:
        for (name, number), of_one in groupby(moments, _episode):
            of_one = list(of_one)
            try:
                read = windows_at(episodes[name][number], of_one, sections[name], config)
            except Exception as error:  # decoders raise types of their own
                for moment in of_one:
                    reason = f"{moment.id}: {type(error).__name__}: {error}"
                    write_npz(files[moment], **{_UNREADABLE: np.array(reason)})
            else:
                yield from read

    ours = _share(files)
    left = [moment for moment in ours if not files[moment].exists()]
    if left:
        policy = load_policy(experiment, checkpoint, sampling, batch)
        found = window_errors(policy, windows(left), stop_steps)
        bar = dict(total=len(ours), initial=len(ours) - len(left), unit="moment")
        for window, errors in tqdm(found, **bar, disable=jax.process_index() > 0):
            write_npz(files[window.moment], **asdict(errors))
    wait_until(lambda: all(file.exists() for file in files.values()))

    label = f"{checkpoint} on {', '.join(sections)}"
    summary = summarise(*_read(files.values()), stop_steps, sampling.sigmas, label)
    if jax.process_index() == 0:
        write_offline(folder, summary)
    return summary


def _episode(moment: Moment) -> tuple[str, int]:
    return moment.dataset, moment.episode


def _settings(section: ConfigDict, config: ConfigDict) -> list[dict]:
    """What decides how a dataset's episodes are read."""
    return [part.to_dict() for part in (section, config.clip, config.policy_io)]


def _files(folder: Path, moments: Iterable[Moment], decides: Sequence[Any]) -> Files:
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for moment in moments:
        text = json.dumps([*decides, moment.id, str(moment.at)], sort_keys=True, default=str)
        files[moment] = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.npz"
    return files


def _share(files: Files) -> list[Moment]:
    """The moments of every n-th episode, n being the number of processes."""
    parts = [list(of_one) for _, of_one in groupby(files, _episode)]
    return [moment for part in parts[jax.process_index() :: jax.process_count()] for moment in part]


def _read(files: Iterable[Path]) -> tuple[list[WindowErrors], list[str]]:
    """The errors on file, and why there are none of the other moments' episodes."""
    errors, unreadable = [], []
    for file in files:
        with np.load(file) as kept:
            if _UNREADABLE in kept:
                unreadable.append(str(kept[_UNREADABLE]))
            else:
                errors.append(WindowErrors(**kept))
    if not errors:
        raise ValueError(
            f"None of the {len(unreadable)} held-out moments could be read: {unreadable[0]}."
        )
    return errors, list(dict.fromkeys(unreadable))


# Predicted against true future: pairs of videos for held-out episodes.


UPSCALE = 3  # tiny frames are hard to look at; every pixel becomes 3x3


def write_predictions(
    policy: Policy,
    episodes: Sequence[Episode],
    dataset: ConfigDict,
    config: ConfigDict,
    folder: Path,
    count: int,
) -> None:
    """Writes `<name>_predicted.mp4` and `<name>_true.mp4` of `count` validation episodes.

    The clip starts a third into the episode: observed frames first, then the fully denoised
    future, or the true one.

    Args:
        policy: supplies the video model; its resolution is the videos'.
        episodes: the dataset's episodes.
        dataset: its config section.
        config: `clip`, `policy_io`, `validation_share`.
        folder: where the videos go.
        count: how many pairs, spread over the held-out episodes.
    """
    held_out = list(held_out_episodes(episodes, dataset, config.validation_share))
    chosen = np.linspace(0, len(held_out) - 1, min(count, len(held_out))).astype(int)
    folder.mkdir(parents=True, exist_ok=True)
    observed = config.clip.observed_frames
    for episode in (episodes[held_out[i]] for i in chosen):
        cuts = cut_episode(episode, dataset, config.clip, config.policy_io)
        true = cuts.frames[cuts.clips[len(cuts.clips) // 3]]
        proprio = np.zeros((config.policy_io.proprio.horizon, config.policy_io.proprio.dim))
        query = Observation(true[:observed], proprio.astype(np.float32), episode.instructions[0])
        predicted = policy.predict_video([query])[0]
        for kind, frames in (("predicted", predicted), ("true", true)):
            large = frames.repeat(UPSCALE, axis=1).repeat(UPSCALE, axis=2)
            name = f"{episode.instructions[0].replace(' ', '_')}_{episode.id}_{kind}.mp4"
            write_video(folder / name, large, fps=max(round(config.clip.fps / 4), 1), crf=18)
