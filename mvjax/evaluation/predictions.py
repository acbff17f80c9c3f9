"""Predicted video against the true future: PSNR, SSIM, and pairs of videos to look at."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy
from ml_collections import ConfigDict

from data_pipelines.atomic import write_json
from data_pipelines.cameras import camera_rows, cameras
from data_pipelines.clip import VIDEO
from data_pipelines.cutting import cut_episode
from data_pipelines.episode import NANOSECONDS, Episode
from data_pipelines.lock import run_lock
from data_pipelines.sources.formats import open_config
from data_pipelines.video import write_video
from mvjax.evaluation.held_out import check_held_out, held_out_episodes
from mvjax.experiment import Experiment
from mvjax.identity import claim, digest_of
from mvjax.policy.load import load_policy
from mvjax.policy.observation import Observation
from mvjax.policy.policy import Policy
from mvjax.training.directory import find_checkpoint

PEAK = 255.0
UPSCALE = 3  # small frames are hard to look at: every pixel becomes 3x3


def psnr(video: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Returns the peak signal-to-noise ratio of every frame in dB.

    Args:
        video, reference: uint8 [t, h, w, 3].

    Returns:
        float64 [t]; infinity where the frames are equal.
    """
    error = np.mean((video.astype(np.float64) - reference) ** 2, axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(PEAK**2 / error)


def ssim(video: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Returns the structural similarity of every frame: 1 for equal frames.

    Wang et al. 2004: Gaussian window of σ 1.5 over 11x11 pixels, K1 0.01, K2 0.03, population
    covariance; the mean over the pixels whose window lies inside the frame, and over the colours.

    Args:
        video, reference: uint8 [t, h, w, 3], at least 11 pixels high and wide.

    Returns:
        float64 [t].
    """
    return np.array(
        [_ssim(x.astype(np.float64), y.astype(np.float64)) for x, y in zip(video, reference)]
    )


def _ssim(x: np.ndarray, y: np.ndarray) -> float:
    def blur(image: np.ndarray) -> np.ndarray:
        return scipy.ndimage.gaussian_filter(image, sigma=1.5, truncate=3.5, axes=(0, 1))

    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return float(similarity[5:-5, 5:-5].mean())


def predict(experiment: Experiment, checkpoint: Path, folder: Path, count: int) -> None:
    """Writes the predictions of `count` held-out episodes of every dataset into a folder.

    The folder holds those of one video model, and one process writes there at a time.

    Raises:
        ValueError: the folder holds predictions of another one; names what differs. Or the model
            was trained on episodes that would count as held out.
        OSError: another process writes into the folder.
    """
    config = experiment.config
    check_held_out(config, find_checkpoint(checkpoint))
    with run_lock(folder):
        policy = load_policy(experiment, checkpoint, experiment.sampling(), batch_size=1)
        what = dict(policy.identity["what"], sampling=policy.model.sampling.identity)
        sections = ("clip", "text", "backbone", "crop")
        settings = {k: v for k, v in what["settings"].items() if k in sections}
        # The decoder is not used.
        what = {
            name: what[name] for name in ("backbone", "tokenizer", "text_encoder", "sampling")
        } | {"settings": settings}
        begun = any(folder.glob("*_predicted.mp4"))
        claim(folder, what, policy.identity["where"], begun=begun)
        for dataset in config.datasets.values():
            write_predictions(policy, open_config(dataset), dataset, config, folder, count)


def write_predictions(
    policy: Policy,
    episodes: Sequence[Episode],
    dataset: ConfigDict,
    config: ConfigDict,
    folder: Path,
    count: int,
) -> None:
    """Writes `<name>_predicted.mp4` and `<name>_true.mp4` of `count` held-out episodes.

    `<name>.json` says in full what they show: instruction, dataset, episode, and the seconds from
    the first frame of the episode to the last observed one. Named by instruction, dataset and
    episode, they are spread over the held-out episodes of the dataset. The clip starts a third into
    the episode: the observed frames, then the fully denoised or the true future.
    """
    held_out = list(held_out_episodes(episodes, dataset, config.validation_share))
    chosen = np.linspace(0, len(held_out) - 1, min(count, len(held_out))).astype(int)
    folder.mkdir(parents=True, exist_ok=True)
    io = config.policy_io.proprio
    for episode in (episodes[held_out[i]] for i in chosen):
        cuts = cut_episode(episode, dataset, config.clip, config.policy_io)
        third = len(cuts.texts) // 3
        true = cuts.video.window(third)
        observed = {VIDEO: true[: config.clip.observed_frames]}
        observed |= {name: view.window(third) for name, view in cuts.views.items()}
        anchor = int(cuts.columns["anchor"][third])
        instruction = episode.instructions_at(anchor)[0]
        proprio = np.zeros((io.horizon, io.dim), np.float32)  # the video model does not read it
        noise_key = episode.id, 0
        seen = Observation(observed, proprio, instruction, None, noise_key, arranged=True)
        predicted = policy.predict_video([seen])[0]
        name = _name(instruction, dataset.name, episode.id)
        shown = dict(instruction=instruction, dataset=dataset.name, episode=episode.id)
        clock = cameras(camera_rows(dataset.video))[0]
        start = int(episode.streams[clock].timestamps[0])
        seconds = round((anchor - start) / NANOSECONDS, 3)
        write_json(folder / f"{name}.json", shown | {"seconds": seconds})
        for kind, frames in (("predicted", predicted), ("true", true)):
            large = frames.repeat(UPSCALE, axis=1).repeat(UPSCALE, axis=2)
            path = folder / f"{name}_{kind}.mp4"
            write_video(path, large, fps=max(round(config.clip.fps / 4), 1), crf=18)


def _name(instruction: str, dataset: str, id: str) -> str:
    """A file name, another one for every episode: texts are of any length, ids may be paths."""
    safe = re.sub(r"[^a-zA-Z0-9_.-]+", "_", id)
    if safe != id or len(id) > 80:
        safe = f"{safe[-60:]}_{digest_of(id)[:6]}"
    return "_".join([re.sub(r"\W+", "_", instruction[:40]), dataset, safe])
