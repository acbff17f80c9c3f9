"""Offline evaluation: its errors are those of the policy itself, and its pages say them."""

import dataclasses
import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny_policy import random_observation, tiny_policy

from data_pipelines.episode import Episode, Stream
from mvjax.evaluation.offline import Window, held_out_windows, window_errors
from mvjax.evaluation.offline_report import summarise, write_offline
from mvjax.evaluation.similarity import psnr, ssim

pytestmark = pytest.mark.usefixtures("quickly")


@pytest.fixture(scope="module")
def policy():
    return tiny_policy(batch_size=2)[0]


@pytest.fixture(scope="module")
def windows():
    rng = np.random.default_rng(0)
    made = []
    for seed in range(3):
        future = rng.integers(0, 256, (8, 48, 32, 3), np.uint8)
        query = dataclasses.replace(random_observation(seed), future=future)
        made.append(Window(f"episode {seed}", query, rng.normal(size=(4, 4)).astype(np.float32)))
    return made


def sampled(policy, **changes):
    sampling = dataclasses.replace(policy.model.sampling, **changes)
    return dataclasses.replace(policy, model=dataclasses.replace(policy.model, sampling=sampling))


def test_errors_are_those_of_the_policy_at_every_stop_step_and_mode(policy, windows):
    errors = list(window_errors(policy, windows, [0, 1, 2, 3]))
    assert len(errors) == 3
    queries, wanted = [w.observation for w in windows], np.stack([w.actions for w in windows])
    for k in range(4):
        for oracle, name in ((False, "generated_video"), (True, "true_video")):
            plan = sampled(policy, stop_step=k, oracle=oracle).plan(queries)
            raw = [getattr(e, f"raw_{name}")[k] for e in errors]
            np.testing.assert_allclose(raw, np.abs(plan - wanted), rtol=1e-3, atol=1e-4)
            scaled = policy.normalizer.normalize("actions", wanted)
            scaled -= policy.normalizer.affines["actions"].scale * (
                plan - policy.normalizer.affines["actions"].shift
            )
            squared = [getattr(e, name)[k] for e in errors]
            np.testing.assert_allclose(squared, scaled**2, rtol=1e-3, atol=1e-3)


def test_the_video_is_compared_with_the_true_future(policy, windows):
    error = next(window_errors(policy, windows[:1], [0]))
    made = policy.predict_video([windows[0].observation])[0, 5:]
    np.testing.assert_allclose(error.psnr, psnr(made, windows[0].observation.future), rtol=1e-3)
    np.testing.assert_allclose(error.ssim, ssim(made, windows[0].observation.future), atol=1e-3)


def test_psnr_and_ssim_are_those_of_scikit_image():
    y, x = np.mgrid[:48, :64]
    waves = [128 + 100 * np.sin(x / 7 + k) * np.cos(y / 5) for k in range(3)]
    frame = np.stack(waves, -1).astype(np.uint8)
    noise = np.random.default_rng(0).normal(0, 20, frame.shape)
    noisy = np.clip(frame + noise, 0, 255).astype(np.uint8)
    # skimage 0.26: gaussian_weights, sigma 1.5, use_sample_covariance=False, data_range 255.
    assert ssim(noisy[None], frame[None])[0] == pytest.approx(0.6154411569976527, abs=1e-9)
    assert psnr(noisy[None], frame[None])[0] == pytest.approx(22.14358468222544, abs=1e-9)
    assert psnr(frame[None], frame[None])[0] == np.inf and ssim(frame[None], frame[None])[0] == 1


def test_the_files_hold_both_tables(policy, windows, tmp_path):
    steps = [0, 3]
    errors = list(window_errors(policy, windows, steps))
    page = write_offline(tmp_path, summarise(errors, steps, policy.model.sigmas, "a <policy>"))
    summary = json.loads((tmp_path / "offline.json").read_text())
    assert summary["windows"] == 3 and summary["sigmas"] == [80.0, policy.model.sigmas[3]]
    mse = np.mean([e.generated_video for e in errors], axis=(0, 2, 3))
    np.testing.assert_allclose(summary["generated_video"]["mse"], mse)
    assert np.shape(summary["true_video"]["mse_by_step"]) == (2, 4)
    text = page.read_text()
    assert (
        f"{mse[1]:.4f}" in text
        and "a &lt;policy&gt;" in text
        and "http" not in text.split("svg")[0]
    )


def episodes(count):
    """Half a second of noise at 20 fps each."""
    times = np.arange(10) * 50_000_000
    rng = np.random.default_rng(1)

    class Frames:
        def __len__(self):
            return 10

        def read(self, indices):
            return np.stack([np.full((48, 32, 3), i, np.uint8) for i in indices])

    streams = {"v": Frames(), "a": rng.normal(size=(10, 4)), "p": rng.normal(size=(10, 4))}
    streams = {name: Stream(times, values) for name, values in streams.items()}
    return [Episode(f"e{i}", "d", "arm", ("go",), streams, ("v",)) for i in range(count)]


def test_windows_are_spread_over_held_out_episodes():
    config = tiny_policy()[1]
    whole = ConfigDict(
        dict(
            clip=dict(height=48, width=32, observed_frames=5, future_frames=8, fps=20.0),
            policy_io=config.policy_io.to_dict(),
            validation_share=0.5,
        )
    )
    dataset = ConfigDict(dict(name="d", video="v", action="a", proprio="p"))
    windows = held_out_windows(episodes(12), dataset, whole, 9)
    assert len(windows) == 9 and 3 < len({w.episode for w in windows}) < 10
    assert windows[0].observation.frames.shape == (5, 48, 32, 3)
    assert windows[0].observation.future.shape == (8, 48, 32, 3)
    whole.validation_share = 0.0
    with pytest.raises(ValueError, match=r"has no held-out episode: config\.validation_share is 0"):
        held_out_windows(episodes(3), dataset, whole, 2)
