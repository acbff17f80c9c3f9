"""Validation on held-out windows while training."""

import hashlib

import av
import jax
import numpy as np
import pytest
from run_records import without_times
from tiny_stages import build_stage, five_steps, tiny_loader

from data_pipelines.clip import Clip
from mvjax.experiment import Experiment
from mvjax.flow import condition_mask
from mvjax.models.stand_ins import fit_linear_tokenizer, save_linear_tokenizer
from mvjax.parallel import sharding_tree
from mvjax.policy.generate import Conditions, VideoModel
from mvjax.training.metrics import read_records
from mvjax.training.prefetch import device_batches
from mvjax.training.train import train
from mvjax.training.validation import ValidationVideos, make_validation

pytestmark = pytest.mark.usefixtures("quickly")
IDENTITY = {"tokenizer": "given by the file"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The file of a tokenizer fitted to noise, as the latents of the tests are."""
    path, rng = tmp_path_factory.mktemp("tokenizer") / "tokenizer.npz", np.random.default_rng(0)
    save_linear_tokenizer(
        path, fit_linear_tokenizer([rng.uniform(-1, 1, (8, 13, 32, 32, 3)).astype("float32")])
    )
    return path


def validating_config(stage, tokenizer):
    config = five_steps(stage)
    config.training.update(sample_every=2, sample_count=2)
    config.sampler.video_steps, config.tokenizer = 3, str(tokenizer)
    return config


def windows_of(config):
    """A loader of held-out windows: as the training's, of another seed."""

    def batches(split, batch_size, **reading):
        assert split == "validation"
        other = config.copy_and_resolve_references()
        other.training.batch_size = batch_size
        loader = tiny_loader(other)
        for _ in range(50):
            next(loader)
        return loader

    return batches


def stage_and_validation(config, workdir, identity):
    stage, mesh, _ = build_stage(config)
    with jax.set_mesh(mesh):
        validation = make_validation(
            Experiment.from_config(config), stage, mesh, windows_of(config), identity, workdir
        )
    return stage, validation


def frames_of(path):
    with av.open(str(path)) as video:
        rate = video.streams.video[0].average_rate
        return np.stack([f.to_ndarray(format="rgb24") for f in video.decode(video=0)]), rate


@pytest.fixture(scope="module")
def validated(tokenizer, tmp_path_factory):
    """A stage-1 run with validation at steps 2 and 4."""
    config, workdir = validating_config("video", tokenizer), tmp_path_factory.mktemp("validated")
    identity = {"tokenizer": hashlib.sha256(tokenizer.read_bytes()).hexdigest()}
    stage, validation = stage_and_validation(config, workdir, identity)
    train(
        Experiment.from_config(config), stage, tiny_loader(config), workdir, validation=validation
    )
    return config, workdir


def test_validation_changes_nothing_of_the_run(validated, video_run):
    ours, theirs = (without_times(read_records(folder)) for folder in (validated[1], video_run))
    assert [r["step"] for r in ours] == [1, 2, 3, 4, 5]
    for record, other in zip(ours, theirs):
        assert {k: v for k, v in record.items() if not k.startswith("validation/")} == other


def test_the_loss_of_held_out_windows_is_recorded(validated):
    with_loss = [r for r in read_records(validated[1]) if "validation/loss" in r]
    assert [r["step"] for r in with_loss] == [2, 4]
    for record in with_loss:
        assert record["validation/velocity_mse"] == pytest.approx(record["validation/loss"])
        counts = [v for k, v in record.items() if k.startswith("validation/samples/")]
        assert sum(counts) == 8 and record["eval_seconds"] > 0
    first, second = with_loss  # the same windows and the same noise: only learning differs
    assert first["validation/samples/tau_0.8_1.0"] == second["validation/samples/tau_0.8_1.0"]
    assert first["validation/loss"] != second["validation/loss"]


def test_the_videos_are_playable_and_begin_with_the_observed_frames(validated):
    config, workdir = validated
    clip, samples = Clip(**config.clip), workdir / "samples"
    assert sorted(path.name for path in samples.iterdir()) == ["step_00000002", "step_00000004"]
    for step in samples.iterdir():
        assert sorted(path.name for path in step.iterdir()) == ["0.mp4", "1.mp4"]
        for path in step.iterdir():
            video, rate = frames_of(path)
            assert rate == clip.fps
            assert video.shape == (clip.frames, clip.height, 2 * clip.width, 3)
            true, made = np.split(video.astype(float), 2, axis=2)
            apart = np.abs(true - made).mean(axis=(1, 2, 3))
            assert apart[: clip.observed_frames].max() < 0.3 * apart[clip.observed_frames :].min()
    (events,) = (workdir / "tensorboard").iterdir()
    assert b"samples/0" in events.read_bytes() and b"\x89PNG" in events.read_bytes()


def test_videos_are_sampled_as_launch_generate_does(tokenizer, tmp_path):
    config = validating_config("video", tokenizer)
    stage, mesh, rules = build_stage(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: p + 0.1 * rng.normal(size=p.shape).astype(np.float32),
        jax.jit(stage.init)(jax.random.key(1)),
    )
    shardings = sharding_tree(stage.batch_axes, mesh, rules)
    batch, _ = next(device_batches(tiny_loader(config), shardings))
    videos = ValidationVideos(Experiment.from_config(config), mesh, batch, 1, None, tmp_path)
    happened, ours = map(np.asarray, videos._generate(params, batch))
    clip = Clip(**config.clip)
    mask = np.asarray(condition_mask(np.full(1, clip.condition_latents), clip.latent_frames))
    text, clean = np.asarray(batch["text"])[:1], np.asarray(batch["latents"])[:1]
    np.testing.assert_array_equal(happened, clean)
    noise = np.asarray(jax.random.normal(jax.random.key(0), batch["latents"].shape))[:1]
    model = VideoModel(Experiment.from_config(config).video_network, params, mesh, rules)
    sampling = Experiment.from_config(config).sampling()
    assert sampling.video_steps == 3
    theirs = model.sample(noise, Conditions(clean, mask, text, np.float32(0), {}), sampling)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert ours.shape == theirs.shape == (1, *clip.latent_shape)


def test_stage_two_measures_only(tokenizer, tmp_path):
    config = validating_config("action", tokenizer)
    config.training.accumulate = 2
    stage, validation = stage_and_validation(config, tmp_path, IDENTITY)
    numbers, pictures = validation(2, jax.jit(stage.init)(jax.random.key(1)))
    # As many windows as a micro-batch has; two draws of action noise for each.
    assert sum(v for k, v in numbers.items() if k.startswith("validation/samples/")) == 4 * 2
    assert numbers["validation/loss"] > 0 and not pictures and not any(tmp_path.iterdir())


def test_another_tokenizer_than_the_records_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"encoded with another tokenizer than .*tokenizer\.npz"):
        stage_and_validation(validating_config("video", tokenizer), tmp_path, IDENTITY)
