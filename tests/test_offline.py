"""Offline evaluation: its errors are those of the policy itself, and are on its page."""

import dataclasses
import errno
import functools
import itertools
import json
import os
import shutil
import signal
from fractions import Fraction
from types import SimpleNamespace

import forked
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny_policy import random_observation, run_config, save_run, tiny_policy
from tiny_stages import quick_compiles, save_untrained

from data_pipelines.episode import Episode, Stream, split_of
from data_pipelines.lock import run_lock
from data_pipelines.writers import Demonstration, Scene, write_hdf5
from launch.local import free_port
from mvjax.evaluation import offline
from mvjax.evaluation.held_out import (
    Moment,
    Window,
    check_held_out,
    content_of,
    held_out_moments,
    windows_at,
)
from mvjax.evaluation.offline import summarise, window_errors, write_offline
from mvjax.evaluation.predictions import psnr, ssim, write_predictions
from mvjax.identity import read_identity
from mvjax.training.directory import Checkpoint

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
        moment = Moment("robot", seed, f"episode {seed}", Fraction(1, 2))
        made.append(Window(moment, query, rng.normal(size=(4, 4)).astype(np.float32)))
    return made


@pytest.fixture(scope="module")
def errors(policy, windows):
    """At all stop steps."""
    found = list(window_errors(policy, windows, [0, 1, 2, 3]))
    assert [window for window, _ in found] == windows
    return [error for _, error in found]


@pytest.mark.parametrize(
    ("k", "oracle"), [(0, False), (2, False), (1, True)], ids=["noise", "half", "true video"]
)
def test_errors_are_those_of_the_policy(policy, windows, errors, k, oracle):
    sampling = dataclasses.replace(policy.model.sampling, stop_step=k, oracle=oracle)
    queries, wanted = [w.observation for w in windows], np.stack([w.actions for w in windows])
    plan = policy.sampled(sampling).act(queries)
    name = "true_video" if oracle else "generated_video"
    raw = [getattr(error, f"raw_{name}")[k] for error in errors]
    np.testing.assert_allclose(raw, np.abs(plan - wanted), rtol=1e-3, atol=1e-4)
    affine = policy.normalizer.affines["actions"]
    scaled = affine.scale * (plan - affine.shift)
    scaled -= policy.normalizer.normalize("actions", wanted)  # which bounds it
    squared = [getattr(error, name)[k] for error in errors]
    np.testing.assert_allclose(squared, scaled**2, rtol=1e-3, atol=1e-3)


def test_the_video_is_compared_with_the_true_future(policy, windows, errors):
    made = policy.predict_video([windows[0].observation])[0, 5:]
    future = windows[0].observation.future
    np.testing.assert_allclose(errors[0].psnr, psnr(made, future), rtol=1e-3)
    np.testing.assert_allclose(errors[0].ssim, ssim(made, future), atol=1e-3)


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


def test_the_files_hold_both_tables(policy, errors, tmp_path):
    sigmas, steps = policy.model.sampling.sigmas, [0, 1, 2, 3]
    page = write_offline(tmp_path, summarise(errors, ["a > b"], steps, sigmas, "a <policy>"))
    summary = json.loads((tmp_path / "offline.json").read_text())
    assert summary["windows"] == 3 and summary["sigmas"] == sigmas.tolist()
    mse = np.mean([e.generated_video for e in errors], axis=(0, 2, 3))
    np.testing.assert_allclose(summary["generated_video"]["mse"], mse)
    assert np.shape(summary["true_video"]["mse_by_step"]) == (4, 4)
    text = page.read_text()
    assert (
        f"{mse[1]:.4f}" in text
        and "a &lt;policy&gt;" in text
        and "Could not be read: a &gt; b" in text
        and "http" not in text.split("svg")[0]
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder, five demonstrations of which one is too short, and a configuration file."""
    folder = tmp_path_factory.mktemp("run")
    save_run(folder)
    shutil.rmtree(folder / "action" / "checkpoints")
    with quick_compiles():
        save_untrained(whole_config(str(folder)), folder / "action")
    demonstrations = [demonstration(number, 12) for number in range(4)] + [demonstration(4, 1)]
    write_hdf5(folder / "data" / "lift_demo.hdf5", demonstrations, Scene("lift", "Lift"))
    (folder / "config.py").write_text(
        f"from test_offline import whole_config\nget_config = lambda: whole_config({str(folder)!r})"
    )
    return folder


def demonstration(seed, steps):
    rng = np.random.default_rng(seed)
    state = rng.normal(size=(steps, 4))
    pictures = rng.integers(0, 256, (steps, 40, 40, 3), np.uint8)
    return Demonstration(rng.normal(size=(steps, 4)), {"front": pictures}, states=state)


def whole_config(folder):
    config = run_config(folder)
    names = dict(video="obs/front", action="actions", proprio="states")
    robot = dict(name="robot", format="robomimic_hdf5", path=f"{folder}/data", embodiment="arm")
    config.datasets = {"robot": robot | names}
    config.validation_share = 1.0
    config.sampler.update(video_steps=3, action_steps=2, draws=1)
    return config


def arguments(run, out):
    flags = ("--suite=offline", "--moments=6", "--batch=1", "--stop_steps=0,2")
    paths = (f"--config={run}/config.py", f"--checkpoint={run}/action", f"--out={out}")
    return ("launch.evaluate", *flags, *paths)


def compiled_once(folder):
    """Lets the processes of a test share compiled programs."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def killed_at_the_fourth_moment(folder):
    """After its disk was away for the third one."""
    compiled_once(folder)
    written, write = itertools.count(1), offline.write_npz
    opened, windows = itertools.count(1), offline.windows_at

    def write_or_die(path, **arrays):
        if next(written) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, **arrays)

    def windows_or_error(*arguments):
        if next(opened) == 2:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return windows(*arguments)

    offline.write_npz, offline.windows_at = write_or_die, windows_or_error


def test_processes_share_the_moments_and_a_killed_one_goes_on(run, tmp_path):
    """All end with the same table, to the last bit."""
    quick = functools.partial(compiled_once, tmp_path)
    variables = {"MVJAX_COORDINATOR": f"127.0.0.1:{free_port()}", "MVJAX_PROCESS_COUNT": "2"}
    both = [
        forked.Program(
            *arguments(run, tmp_path / "two"),
            environment={**variables, "MVJAX_PROCESS_ID": str(process)},
            prepare=quick,
        )
        for process in range(2)
    ]
    with both[0], both[1]:
        said = [program.finish() for program in both]
    assert [s.code for s in said] == [0, 0], said
    assert "action error" in said[0].out and "action error" not in said[1].out

    command = arguments(run, tmp_path / "one")
    moments = tmp_path / "one" / "moments"
    killed = functools.partial(killed_at_the_fourth_moment, tmp_path)
    assert forked.run(*command, prepare=killed).code == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in moments.glob("*.npz")}
    assert len(before) == 3 and not (tmp_path / "one" / "offline.json").exists()
    again = forked.run(*command, prepare=quick)
    assert again.code == 0, again.err
    again_at = {path: path.stat().st_mtime_ns for path in before}
    assert len(again_at.items() - before.items()) == 1  # what could not be read is tried again

    tables = [(tmp_path / name / "offline.json").read_bytes() for name in ("one", "two")]
    assert tables[0] == tables[1]
    summary = json.loads(tables[0])
    assert read_identity(tmp_path / "one")["what"] == summary["identity"]["what"]
    assert not list(tmp_path.glob("*/.lock"))
    assert summary["windows"] == 5 and np.shape(summary["true_video"]["mse"]) == (2,)
    (unreadable,) = summary["unreadable"]
    assert "demo_4" in unreadable and f"could not be read: {unreadable}" in again.out

    # Moments of another policy are not added, nor taken from this one.
    other = forked.run(*command, "--config.sampler.seed=5", prepare=quick)
    assert other.code == 2 and "sampling.seed is 0 there, 5 here" in other.err
    with run_lock(tmp_path / "one"):
        other = forked.run(*command, prepare=quick)
    assert other.code != 0 and "is writing to" in other.err
    assert (tmp_path / "one" / "offline.json").read_bytes() == tables[0]


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


class WithABrokenOne(list):
    """Its first episode cannot be opened."""

    def __getitem__(self, index):
        if index == 0:
            raise OSError("moov atom not found")
        return super().__getitem__(index)


def test_moments_are_spread_over_held_out_episodes(caplog):
    config, dataset = tiny_policy()[1], ConfigDict(dict(name="d", video="v", action="a"))
    dataset.proprio = "p"
    data = WithABrokenOne(episodes(12))
    moments = held_out_moments(data, dataset, 0.5, 9)
    assert len(moments) == 9 and 3 < len({m.id for m in moments}) < 10
    (warned,) = caplog.records
    assert warned.levelname == "WARNING"
    assert warned.getMessage() == "d: skipped episode number 0: moov atom not found"
    assert all(split_of(m.id, 0.5) == "validation" for m in moments)
    last = [m for m in moments if m.id == moments[-1].id]
    windows = windows_at(data[last[0].episode], last, dataset, config)
    assert [w.moment for w in windows] == last
    assert windows[0].observation.frames["video"].shape == (5, 48, 32, 3)
    assert windows[0].observation.future["video"].shape == (8, 48, 32, 3)
    negated = Stream(data[5].streams["a"].timestamps, -data[5].streams["a"].values)
    other = dataclasses.replace(data[5], streams={**data[5].streams, "a": negated})
    assert content_of(data[5]) == content_of(episodes(12)[5]) != content_of(other)
    with pytest.raises(ValueError, match=r"has no held-out episode: config\.validation_share is 0"):
        held_out_moments(data, dataset, 0.0, 2)


def test_an_episode_that_was_trained_on_is_not_held_out(monkeypatch, caplog, tmp_path):
    """Neither with a larger share than the decoder's, nor in silence with one of the backbone."""

    def trained(share, name="d"):
        config = {"validation_share": share, "datasets": {name: {"name": name}}}
        config["backbone"] = {"checkpoint": ""}
        return ConfigDict(config), Checkpoint(tmp_path, 1, {"config": config})

    decoder = trained(0.04)[1]
    check_held_out(trained(0.04)[0], decoder)
    check_held_out(trained(0.01)[0], decoder)
    check_held_out(trained(1.0, "new")[0], decoder)  # all of it is new to the decoder
    check_held_out(trained(1.0)[0], Checkpoint(tmp_path, 1, {"config": {}, "converted": "x"}))
    with pytest.raises(ValueError, match=r"validation_share is 0.5, but .* was trained with 0.04"):
        check_held_out(trained(0.5)[0], decoder)
    config = trained(0.04)[0]
    config.datasets.copy = config.datasets.d
    with pytest.raises(ValueError, match=r"datasets.copy and .d have the same name, 'd'"):
        check_held_out(config, decoder)
    config = trained(0.04)[0]
    config.backbone.checkpoint = "video"
    seen = iter([trained(0.04)[1], trained(0.0)[1]])
    monkeypatch.setattr("mvjax.evaluation.held_out.find_checkpoint", lambda path: next(seen))
    check_held_out(config, decoder)
    assert not caplog.text
    check_held_out(config, decoder)
    assert "has seen videos of the held-out episodes" in caplog.text


def test_predictions_of_all_episodes_have_files_of_their_own(tmp_path):
    """Two datasets of LeRobot have episodes of one name; ids may be paths, texts may be long."""
    policy = SimpleNamespace(predict_video=lambda seen: np.zeros((1, 13, 48, 32, 3), np.uint8))
    config = tiny_policy()[1]
    config.validation_share = 1.0
    ids, text = ("a/b", "a_b", "x" * 300), "open/close the drawer, " + 20 * "slowly "
    for name in ("one", "two"):
        dataset = ConfigDict(dict(name=name, video="v", action="a", proprio="p"))
        data = [
            dataclasses.replace(episode, id=id, instructions=(text,))
            for id, episode in zip(ids, episodes(3))
        ]
        write_predictions(policy, data, dataset, config, tmp_path, 3)
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) == 3 * 2 * 3
    assert "open_close_the_drawer_slowly_slowly_slo_one_a_b_true.mp4" in names
    shown = json.loads(
        (tmp_path / "open_close_the_drawer_slowly_slowly_slo_one_a_b.json").read_text()
    )
    assert shown == {"instruction": text, "dataset": "one", "episode": "a_b", "seconds": 0.15}
