"""Offline evaluation: action errors on held-out episodes, and the error of the predicted video.

The mimic-video release validates a decoder with two tables: the error of its actions when it reads
the true future video at every noise level of the schedule ("gtvid"), and when it reads the video
model's own at every stop step ("genvid"). Both are computed here per step of the chunk and per
dimension, together with PSNR and SSIM of the fully denoised video.

The processes of a job share the moments. The errors at a moment are kept in a file of their own,
`moments/<digest>.npz`, named by a digest of everything they depend on: an existing file is valid
whichever process wrote it, and a stopped evaluation resumes from the missing ones.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.atomic import wait_until, write_json, write_npz, write_text
from data_pipelines.html import render
from data_pipelines.lock import run_lock
from data_pipelines.progress import Bar
from data_pipelines.settings import plain
from data_pipelines.sources.formats import open_config
from mvjax.evaluation.figures import curves_figure
from mvjax.evaluation.held_out import (
    Moment,
    Window,
    check_held_out,
    content_of,
    held_out_moments,
    windows_at,
)
from mvjax.evaluation.predictions import psnr, ssim
from mvjax.experiment import Experiment
from mvjax.flow import Trajectory, advance, schedule, start
from mvjax.identity import FILE, claim, described
from mvjax.parallel import everywhere
from mvjax.policy.load import load_policy
from mvjax.policy.policy import (
    Inputs,
    Policy,
    Scene,
    VideoActionModel,
    Weights,
    medoid,
    to_pixels,
)
from mvjax.training.directory import find_checkpoint

_UNREADABLE = "unreadable"  # key of the reason in the file of a moment that could not be read


def evaluate_offline(
    experiment: Experiment,
    checkpoint: Path,
    folder: Path,
    stop_steps: Sequence[int],
    count: int,
    batch: int,
) -> dict[str, Any]:
    """Evaluates a policy on the held-out episodes of every dataset with actions.

    The processes of a job share the episodes and the folder; each holds the whole policy on its own
    devices. An episode that cannot be read is left out and named in the results, and is tried again
    by the next call. The folder holds the results of one policy (`mvjax.identity`), and one job
    writes there at a time.

    Args:
        experiment, checkpoint: a stage-2 run and its training directory.
        folder: receives the results.
        stop_steps: denoising steps at which to read the video; (0,) for a policy that reads the
            observed frames alone, whose errors with the true video are those with its own.
        count: moments per dataset.
        batch: moments computed at once.

    Returns:
        The summary of `summarise` and the "identity", in every process.

    Raises:
        ValueError: the folder holds the results of another policy; names what differs. Or the
            policy was trained on episodes that would count as held out.
        OSError: another process evaluates into the folder.
    """
    for k in stop_steps:
        experiment.sampling(stop_step=k)  # which raises where it would change nothing
    check_held_out(experiment.config, find_checkpoint(checkpoint))
    # Process 0 writes for all.
    with run_lock(folder) if jax.process_index() == 0 else nullcontext():
        return _evaluate(experiment, checkpoint, folder, stop_steps, count, batch)


def _evaluate(
    experiment: Experiment,
    checkpoint: Path,
    folder: Path,
    stop_steps: Sequence[int],
    count: int,
    batch: int,
) -> dict[str, Any]:
    config, sampling = experiment.config, experiment.sampling()
    sections = {d.name: d for d in config.datasets.values() if d.action}
    episodes = {name: open_config(dataset) for name, dataset in sections.items()}
    policy = load_policy(experiment, checkpoint, sampling, batch)
    identity = {
        "what": plain({**policy.identity["what"], "sampling": sampling.identity}),
        "where": policy.identity["where"],
    }
    begun = (folder / FILE).exists() and any((folder / "moments").glob("*.npz"))
    claim(folder, **identity, begun=begun, process=jax.process_index())
    measured = [identity["what"], list(stop_steps)]
    files: dict[Moment, Path] = {}
    for name, dataset in sections.items():
        read_with = [part.to_dict() for part in (dataset, config.clip, config.policy_io)]
        moments = held_out_moments(episodes[name], dataset, config.validation_share, count)
        for (_, index), of_one in groupby(moments, _episode):
            depends_on = [*measured, *read_with, content_of(episodes[name][index])]
            files |= {moment: _file(folder / "moments", moment, depends_on) for moment in of_one}

    def windows(moments: Iterable[Moment]) -> Iterator[Window]:
        for (name, index), of_one in groupby(moments, _episode):
            of_one = list(of_one)
            try:
                read = windows_at(episodes[name][index], of_one, sections[name], config)
            except Exception as error:  # decoders raise types of their own
                for moment in of_one:
                    reason = f"{moment.id}: {type(error).__name__}: {error}"
                    write_npz(files[moment], **{_UNREADABLE: np.array(reason)})
            else:
                yield from read

    # Whole episodes per process, since opening one costs more than reading another moment of it.
    by_episode = [list(of_one) for _, of_one in groupby(files, _episode)]
    ours = by_episode[jax.process_index() :: jax.process_count()]
    share = [moment for of_one in ours for moment in of_one]
    for file in (files[moment] for moment in share):
        if file.exists() and _reason(file):  # it may have been a network that was away
            file.unlink()
    everywhere(True)  # no process takes those for the results of this job
    left = [moment for moment in share if not files[moment].exists()]
    if left:
        found = window_errors(policy, windows(left), stop_steps)
        bar = dict(total=len(share), initial=len(share) - len(left), unit="moment")
        for window, errors in Bar(found, **bar, disable=jax.process_index() > 0):
            write_npz(files[window.moment], **asdict(errors))
    wait_until(lambda: all(file.exists() for file in files.values()))

    label = f"{checkpoint} on {', '.join(sections)}"
    summary = summarise(*_read(files), stop_steps, sampling.sigmas, label)
    summary |= {"identity": identity}
    if jax.process_index() == 0:
        write_offline(folder, summary)
    return summary


def _episode(moment: Moment) -> tuple[str, int]:
    return moment.dataset, moment.episode


def _file(folder: Path, moment: Moment, depends_on: Sequence[Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps([*depends_on, moment.id, str(moment.at)], sort_keys=True, default=str)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.npz"


@dataclass(frozen=True)
class WindowErrors:
    """The policy's errors at one window; s stop steps.

    Attributes:
        true_video, generated_video: squared error of the normalised actions [s, horizon, dim].
        raw_true_video, raw_generated_video: the absolute error in the actions' units.
        psnr, ssim: of every future frame of the fully denoised video [future_frames].
    """

    true_video: np.ndarray
    generated_video: np.ndarray
    raw_true_video: np.ndarray
    raw_generated_video: np.ndarray
    psnr: np.ndarray
    ssim: np.ndarray


def _read(files: Mapping[Moment, Path]) -> tuple[list[WindowErrors], list[str]]:
    """The errors on file, and the reasons why other moments have none."""
    errors, unreadable = [], []
    for file in files.values():
        if reason := _reason(file):
            unreadable.append(reason)
        else:
            with np.load(file) as kept:
                errors.append(WindowErrors(**kept))
    if not errors:
        raise ValueError(
            f"None of the {len(unreadable)} held-out moments could be read: {unreadable[0]}."
        )
    return errors, list(dict.fromkeys(unreadable))


def _reason(file: Path) -> str:
    """Why a moment could not be read; "" for one with errors."""
    with np.load(file) as kept:
        return str(kept[_UNREADABLE]) if _UNREADABLE in kept else ""


# The errors, computed on the policy's devices.


def window_errors(
    policy: Policy, windows: Iterable[Window], stop_steps: Sequence[int]
) -> Iterator[tuple[Window, WindowErrors]]:
    """Yields every window with its errors at all stop steps, holding one batch at a time.

    The policy's sampling sets the noise schedule; its own stop step and mode are not used.
    """
    windows = iter(windows)
    while batch := list(islice(windows, policy.batch_size)):
        (full,) = policy.batches(batch)  # the last batch is padded
        yield from zip(batch, _batch_errors(policy, full, stop_steps))


def _batch_errors(
    policy: Policy, batch: list[Window], stop_steps: Sequence[int]
) -> Iterator[WindowErrors]:
    model, clip, sigmas = policy.model, policy.model.clip, policy.model.sampling.sigmas
    inputs = policy.inputs([w.observation for w in batch], with_future=True, predicts=True)
    from_true, from_generated = [], []
    with policy.devices():
        clean = _encode(model, policy.weights, inputs)
        here = start(inputs.video_noise, sigmas)
        for k, (sigma, coefficients) in enumerate(zip(*schedule(sigmas))):
            if k in stop_steps:
                noisy = clean.video + sigma * inputs.video_noise
                for video, chunks in ((noisy, from_true), (here.x, from_generated)):
                    act = _act(model, policy.weights, video, clean, sigma, inputs)
                    chunks.append(np.asarray(act))
            here = _step(model, policy.weights, here, clean, sigma, coefficients, inputs)
        predicted = np.asarray(_decode(policy.weights, here.x))[:, clip.observed_frames :]
    future = np.asarray(inputs.video)[:, clip.observed_frames :]
    wanted = np.stack([window.actions for window in batch])
    normalised = policy.normalizer.normalize("actions", wanted)
    for i in range(len(batch)):
        true, generated = (np.stack(chunks)[:, i] for chunks in (from_true, from_generated))
        raw_true, raw_generated = (
            policy.normalizer.unnormalize("actions", chunks) for chunks in (true, generated)
        )
        yield WindowErrors(
            true_video=(true - normalised[i]) ** 2,
            generated_video=(generated - normalised[i]) ** 2,
            raw_true_video=np.abs(raw_true - wanted[i]),
            raw_generated_video=np.abs(raw_generated - wanted[i]),
            psnr=psnr(predicted[i], future[i]),
            ssim=ssim(predicted[i], future[i]),
        )


# The noise level is an argument, so that each function is compiled once for the whole schedule.


@partial(jax.jit, static_argnums=0)
def _encode(model: VideoActionModel, weights: Weights, inputs: Inputs) -> Scene:
    return model.encode(weights[0], inputs.video, inputs.views)


@partial(jax.jit, static_argnums=0)
def _act(model, weights: Weights, x, clean, sigma, inputs: Inputs) -> jax.Array:
    level = jnp.full((len(x), 1), sigma)
    context = model.read(weights[1], x, clean, level, inputs.text)
    sigma = jnp.float32(model.context_sigma) if model.observed_only else sigma
    queries = inputs.proprio, inputs.action_noise, inputs.pending
    return medoid(model.actions(weights[2], context, sigma, *queries))


@partial(jax.jit, static_argnums=0)
def _step(
    model, weights: Weights, here: Trajectory, clean, sigma, coefficients, inputs: Inputs
) -> Trajectory:
    level = jnp.full((len(here.x), 1), sigma)
    x0 = model.denoised(weights[1], here.x, clean, level, inputs.text)
    return advance(here, x0, coefficients)


@jax.jit
def _decode(weights: Weights, latents: jax.Array) -> jax.Array:
    return to_pixels(weights[0], latents)


# The results: `offline.json` for programs, `offline.html` for people.


def summarise(
    errors: Sequence[WindowErrors],
    unreadable: Sequence[str],
    stop_steps: Sequence[int],
    sigmas: np.ndarray,
    label: str,
) -> dict[str, Any]:
    """Averages errors over windows.

    Args:
        errors: one per window.
        unreadable: reasons why other windows are missing.
        stop_steps: steps at which the video was read.
        sigmas: noise levels of the whole schedule.
        label: title of the evaluation.

    Returns:
        A JSON-able map: label, windows (their number), unreadable, stop_steps and sigmas;
        "true_video" and "generated_video", each with mse (of normalised actions, per stop step),
        mse_by_step and mse_by_dimension (per stop step and step of the chunk, or dimension) and
        mae_by_dimension (in the actions' units); psnr and ssim per future frame.
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
    finite = np.minimum([e.psnr for e in errors], 100.0)  # PSNR of equal frames is infinite
    return summary | {"psnr": finite.mean(axis=0).tolist(), "ssim": mean("ssim")}


def write_offline(folder: Path, summary: dict[str, Any]) -> Path:
    """Writes `offline.json` and `offline.html`, and returns the path of the page."""
    write_json(folder / "offline.json", summary)
    steps = np.array(summary["stop_steps"])
    by_stop_step = {
        title: (steps, np.array(summary[name]["mse"]))
        for title, name in (("true video", "true_video"), ("generated video", "generated_video"))
    }

    def along(values: list[float], name: str, x_label: str, y_label: str, title: str) -> str:
        curve = np.arange(1, len(values) + 1), np.array(values)
        return curves_figure({name: curve}, x_label, y_label, title)

    def by_frame(values: list[float], name: str) -> str:
        return along(values, name, "future frame", name, f"{name} by future frame")

    errors = summary["generated_video"]["mse"]
    at = int(np.argmin(errors))
    best = {"step": int(steps[at]), "mse": errors[at], "true": summary["true_video"]["mse"][at]}
    page = render(
        "offline.html",
        "mvjax.evaluation",
        title=f"Offline evaluation of {summary['label']}",
        **summary,
        best=best,
        evaluated={k: v for k, v in described(summary.get("identity")).items() if v != "–"},
        error_by_stop_step=curves_figure(
            by_stop_step, "stop step K of the video", "action error", "Error by stop step"
        ),
        error_along_chunk=along(
            summary["generated_video"]["mse_by_step"][0],
            f"K = {steps[0]}",
            "step of the chunk",
            "action error",
            "Error along the chunk",
        ),
        psnr_by_frame=by_frame(summary["psnr"], "PSNR, dB"),
        ssim_by_frame=by_frame(summary["ssim"], "SSIM"),
        mean_psnr=np.mean(summary["psnr"]),
        mean_ssim=np.mean(summary["ssim"]),
    )
    write_text(folder / "offline.html", page)
    return folder / "offline.html"
