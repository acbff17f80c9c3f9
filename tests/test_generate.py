"""Generated video: the sampler and its guidance, and the command from checkpoint to mp4."""

import contextlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from published import random_tensors, write_published
from tiny_policy import random_params
from tiny_stages import save_untrained, tiny_config

from data_pipelines.clip import Clip
from data_pipelines.frames import cover
from data_pipelines.video import VideoFile, read_observed, write_video
from mvjax.experiment import Experiment
from mvjax.flow import Sampling, condition_mask, denoise, published_noise, sample_video, start
from mvjax.models.stand_ins import NgramTextEncoder, fit_linear_tokenizer, save_linear_tokenizer
from mvjax.parallel import make_mesh, make_rules
from mvjax.policy.generate import (
    VideoModel,
    check_tiled,
    generate,
    generation_config,
    load_matching_tokenizer,
    read_embedding,
)
from mvjax.policy.load import load_video_tokenizer
from mvjax.training.damage import CheckpointMismatch
from mvjax.weights.convert import prepare, write
from mvjax.weights.kinds import VAE, VIDEO, Hints
from mvjax.weights.source import open_source

pytestmark = pytest.mark.usefixtures("quickly")
CLIP = Clip(height=32, width=48, observed_frames=5, future_frames=8, fps=10.0)
SIZE = ("--height=32", "--width=48", "--frames=9", "--steps=3")


@pytest.fixture(scope="module")
def tokenizer():
    rng = np.random.default_rng(0)
    return fit_linear_tokenizer([rng.uniform(-1, 1, (8, 13, 32, 32, 3)).astype("float32")])


@pytest.fixture(scope="module")
def model():
    """A random video DiT on one device."""
    network = Experiment.from_config(tiny_config("video")).video_network
    mesh = make_mesh({}, jax.devices()[:1])
    return VideoModel(network, random_params(network, 1), mesh, make_rules())


def embed(text):
    return NgramTextEncoder(4, 16).encode([text])[0]


def observed(count=5, height=32, width=48, seed=3):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def by_hand(model, tokenizer, frames, texts, sampling, guidance):
    """The video from `sample_video` and the formula of guidance."""
    clean = np.zeros((1, *CLIP.latent_shape), np.float32)
    clean[:, :2] = tokenizer.encode(frames[None].astype(np.float32) / 127.5 - 1)
    mask = condition_mask(jnp.full(1, 2), CLIP.latent_frames)
    net = model.network.bind(model.params)

    def predict(x, sigma, text):
        return denoise(lambda i: net(*i[:2], text[None], i[2]), x, clean, sigma, mask)

    def denoiser(x, sigma):
        x0, *others = (predict(x, sigma, text) for text in texts)
        return x0 + guidance * (x0 - others[0]) if others else x0

    @jax.jit
    def latents(noise):
        sigmas = sampling.sigmas
        x = sample_video(denoiser, start(noise, sigmas), sigmas, last=sampling.video_steps).x
        return denoiser(x, jnp.full((1, 1), sigmas[-1]))

    return np.asarray(latents(published_noise(sampling.seed, clean.shape)))


class Kept:
    """A tokenizer that keeps the latents it was asked to decode."""

    def __init__(self, tokenizer):
        self.encode, self._decode = tokenizer.encode, tokenizer.decode

    def decode(self, latents):
        self.latents = latents
        return self._decode(latents)


@pytest.mark.parametrize("guidance", [0.0, 2.5])
def test_the_loop_samples_what_sample_video_does(model, tokenizer, guidance):
    sampling = Sampling(video_steps=4, seed=5)
    text, negative = embed("open the drawer"), embed("poor quality")
    kept, seen, frames = Kept(tokenizer), [], observed()
    texts = dict(guidance=guidance, negative=negative)
    video = generate(model, kept, CLIP, frames, text, sampling, **texts, progress=seen.append)
    texts = [text, negative] if guidance else [text]
    expected = by_hand(model, tokenizer, frames, texts, sampling, guidance)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(kept.latents / scale, expected / scale, rtol=1e-5, atol=1e-5)
    assert seen == [1, 2, 3, 4, 5] and sampling.evaluations == 5
    assert video.shape == (13, 32, 48, 3) and video.dtype == np.uint8
    coded = np.asarray(tokenizer.decode(expected))[0]
    np.testing.assert_allclose(video, np.clip((coded + 1) * 127.5, 0, 255), atol=0.6)


def test_guidance_moves_away_from_the_negative_text(model, tokenizer):
    text, negative = embed("open the drawer"), embed("poor quality")

    def made(guidance, negative=negative):
        texts = dict(guidance=guidance, negative=negative)
        return generate(model, tokenizer, CLIP, observed(), text, Sampling(video_steps=2), **texts)

    plain = made(0.0)
    np.testing.assert_array_equal(plain, made(0.0, None))  # without guidance it is not read
    assert (plain != made(3.0)).any() and (made(1.0) != made(3.0)).any()
    # Guidance away from the prompt itself has no effect.
    difference = plain.astype(int) - made(3.0, text)
    assert np.abs(difference).max() <= 1
    with pytest.raises(ValueError, match=r"needs the embedding of a negative text of the shape"):
        made(3.0, None)


def test_every_step_and_every_later_video_is_one_program(model, tokenizer):
    model = VideoModel(model.network, model.params, model.mesh, model.rules)  # compiles anew
    before = VideoModel._step._cache_size()
    videos = []
    for seed, steps, sigma_max in ((0, 2, 80.0), (1, 2, 80.0), (0, 4, 50.0)):
        sampling = Sampling(video_steps=steps, sigma_max=sigma_max, seed=seed)
        videos.append(generate(model, tokenizer, CLIP, observed(), embed("press"), sampling))
    assert all((videos[0] != other).any() for other in videos[1:])
    assert VideoModel._step._cache_size() == before + 1


def test_settings_and_frames_that_do_not_fit_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match=r"1 observed frames, but clip.observed_frames is"):
        generate(model, tokenizer, CLIP, observed(1), embed("press"), Sampling())
    with pytest.raises(ValueError, match=r"sigma_max 0.001 and sigma_min 0.002"):
        Sampling(sigma_max=0.001)
    with pytest.raises(ValueError, match="guidance must be 0"):
        generate(model, tokenizer, CLIP, observed(), embed("press"), Sampling(), guidance=-1.0)


@pytest.mark.parametrize(
    ("size", "scaled"), [((50, 100), (32, 64)), ((100, 50), (96, 48)), ((20, 30), (32, 48))]
)
def test_pictures_cover_the_clip_and_keep_their_proportions(size, scaled):
    # A ramp in both directions, sampled as bilinear interpolation does.
    y, x = np.mgrid[: size[0], : size[1]]
    ramp = np.stack([2 * y, 2 * x, y + x], axis=-1).astype(np.uint8)
    ours = cover(ramp[None], 32, 48)[0]
    assert ours.shape == (32, 48, 3)
    top, left = (scaled[0] - 32) // 2, (scaled[1] - 48) // 2
    rows = (np.arange(32) + top + 0.5) * size[0] / scaled[0] - 0.5
    columns = (np.arange(48) + left + 0.5) * size[1] / scaled[1] - 0.5
    inner = np.s_[4:-4, 4:-4]  # the filter is cut at the edges
    np.testing.assert_allclose(
        ours[..., 0][inner], 2 * rows[4:-4, None] + 0 * columns[4:-4], atol=1
    )
    np.testing.assert_allclose(
        ours[..., 1][inner], 0 * rows[4:-4, None] + 2 * columns[4:-4], atol=1
    )


@pytest.mark.parametrize(("length", "taken"), [(3, 1), (4, 1), (5, 5), (8, 5)])
def test_a_video_gives_its_last_frames(tmp_path, length, taken):
    levels = np.arange(length, dtype=np.uint8)[:, None, None, None] * 30
    write_video(tmp_path / "a.mp4", np.broadcast_to(levels, (length, 32, 32, 3)), 10, crf=1)
    frames = read_observed(tmp_path / "a.mp4", most=5)
    assert len(frames) == taken
    expected = 30 * np.arange(length)[-taken:]
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), expected, atol=4)


def test_pictures_are_read_upright_and_in_rgb(tmp_path):
    frame = observed(1)[0]
    Image.fromarray(frame).convert("RGBA").save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_observed(tmp_path / "a.png", 5)[0], frame)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    Image.fromarray(frame).save(tmp_path / "b.png", exif=exif)
    np.testing.assert_array_equal(read_observed(tmp_path / "b.png", 5)[0], np.rot90(frame, -1))


def test_a_model_of_tiled_cameras_takes_no_picture_of_one():
    config = tiny_config("video")
    check_tiled(config, observed(1), tiled=False)
    with config.ignore_type():  # lists, as JSON keeps them
        config.datasets = dict(robot=dict(video=[["front", "wrist"]]))
    check_tiled(config, observed(1, 32, 32), tiled=True)
    for size, tiled, words in (((32, 32), False, "of one camera"), ((32, 48), True, "32x48")):
        with pytest.raises(ValueError, match=rf"tiled from .*'front', 'wrist'.*{words}.*--tiled"):
            check_tiled(config, observed(1, *size), tiled)
    with config.ignore_type():
        config.datasets.other = dict(video="front")  # it has seen single cameras, too
    check_tiled(config, observed(1), tiled=False)
    config.clip.views = dict(hands=dict(height=16, width=32))
    for dataset in config.datasets.values():
        dataset.views = dict(hands=("left", "right"))
    check_tiled(config, observed(1), tiled=True, views=dict(hands=observed(1, 16, 32)))
    with pytest.raises(ValueError, match=r"tiled from .*'left', 'right'.* of 16x32, with --tiled"):
        check_tiled(config, observed(1), tiled=False, views=dict(hands=observed(1, 16, 32)))


def test_embeddings_are_filled_up_with_zeros(tmp_path):
    values = np.random.default_rng(0).normal(size=(3, 8))
    for array in (values, values[None].astype(np.float32)):
        np.save(tmp_path / "a.npy", array)
        read = read_embedding(tmp_path / "a.npy", length=5, dim=8)
        assert read.shape == (5, 8) and read.dtype == np.float32 and not read[3:].any()
        np.testing.assert_allclose(read[:3], values, rtol=1e-6)
    for array, words in (
        (values[:, :4], r"float64 \[3, 4\], expected .* 1 to 5 float tokens of width 8"),
        (np.zeros((6, 8)), "expected .* 1 to 5 float tokens"),
        (np.zeros((3, 8), int), r"holds int64 \[3, 8\], expected"),
    ):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(ValueError, match=words):
            read_embedding(tmp_path / "a.npy", length=5, dim=8)
    np.save(tmp_path / "a.npy", np.array([{}]))
    (tmp_path / "b.npy").write_bytes(b"not an array")
    for name in ("a.npy", "b.npy"):
        with pytest.raises(ValueError, match=f"{name} is not a .npy file of numbers"):
            read_embedding(tmp_path / name, length=5, dim=8)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Converted tiny weights, a text embedding and a picture, as flags of the command."""
    folder = tmp_path_factory.mktemp("converted")
    for kind, name in ((VIDEO, "dit"), (VAE, "vae")):
        path = write_published(folder, kind, "nvidia", random_tensors(kind, "nvidia"))
        hints = Hints(rope_ratio_thw=(1.0, 3.0, 3.0), precision="float32")
        write(prepare(open_source(path, hints)), folder / name)
    np.save(folder / "text.npy", np.random.default_rng(0).normal(size=(1, 3, 64)))
    Image.fromarray(observed(1, 60, 60)[0]).save(folder / "start.png")
    return {
        "checkpoint": folder / "dit",
        "tokenizer": folder / "vae",
        "text_embedding": folder / "text.npy",
        "image": folder / "start.png",
    }


def flags_of(given, *more, **changes):
    merged = {**given, **changes}
    return [*(f"--{k}={v}" for k, v in merged.items() if v is not None), *more]


def read(path):
    video = VideoFile(path)
    return video.read(range(len(video))), video.timestamps


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer):
    """A stage-1 training directory whose settings name everything that is needed, as flags."""
    folder = tmp_path_factory.mktemp("trained")
    save_linear_tokenizer(folder / "tokenizer.npz", tokenizer)
    config = tiny_config("video")
    config.tokenizer = str(folder / "tokenizer.npz")
    config.sampler.update(video_steps=3)
    save_untrained(config, folder / "run")
    write_video(folder / "start.mp4", observed(7, 32, 32), 20)
    return {"checkpoint": folder / "run", "image": folder / "start.mp4", "prompt": "open"}


def test_converted_weights_take_the_released_lengths(command, converted, tmp_path):
    out = tmp_path / "a.mp4"
    said = command("launch.generate", *flags_of(converted, *SIZE, f"--out={out}"))
    assert said.code == 0, said.err
    assert "9 frames of 32x48 at 10 frames per second, 1 of them observed; " in said.out
    assert said.out.count("\n") == 1 and "4/4" in said.err
    frames, timestamps = read(out)
    assert frames.shape == (9, 32, 48, 3)
    np.testing.assert_array_equal(timestamps, np.arange(9) * 100_000_000)
    config = generation_config(converted["checkpoint"])
    assert Clip(**config.clip) == Clip(480, 640, observed_frames=5, future_frames=56, fps=10.0)
    assert Sampling(**config.sampler) == Sampling() and config.text.length == 512


def test_converted_weights_take_a_given_configuration(converted):
    given = tiny_config("video")
    given.tokenizer = "elsewhere.npz"
    given.video_model.precision = "published"
    with pytest.raises(CheckpointMismatch, match=r"texts of width 64, but text.dim .* is 16"):
        generation_config(converted["checkpoint"], given)
    given.text.dim = 64
    config = generation_config(converted["checkpoint"], given)
    assert config.clip == given.clip and config.sampler == given.sampler
    assert config.tokenizer == "elsewhere.npz" and config.video_model.precision == "published"
    assert config.video_model.width == generation_config(converted["checkpoint"]).video_model.width


def test_a_training_directory_knows_its_settings(command, trained, tmp_path):
    for name in ("new/a", "again"):  # the folder is made
        said = command("launch.generate", *flags_of(trained, f"--out={tmp_path / name}.mp4"))
        assert said.code == 0, said.err
    assert "13 frames of 32x32 at 20 frames per second, 5 of them observed; " in said.out
    assert "4/4" in said.err
    first, again = ((tmp_path / f"{name}.mp4").read_bytes() for name in ("new/a", "again"))
    assert first == again
    assert len(read(tmp_path / "again.mp4")[0]) == 13

    flags = flags_of(trained, f"--out={tmp_path / 'four.mp4'}")
    said = command("launch.generate", *flags, devices=4)
    assert said.code == 0, said.err
    one, four = (read(tmp_path / f"{name}.mp4")[0].astype(int) for name in ("again", "four"))
    assert np.abs(one - four).max() <= 12 and np.abs(one - four).mean() < 0.2  # a pixel's rounding


def test_flags_come_before_the_settings_of_the_directory(command, trained, tmp_path):
    out = tmp_path / "a.mp4"
    flags = "--guidance=2", "--negative_prompt=blurred", "--fps=5", "--frames=9", "--steps=1"
    said = command("launch.generate", *flags_of(trained, *flags, "--width=48", f"--out={out}"))
    assert said.code == 0, said.err
    assert "9 frames of 32x48 at 5 frames per second" in said.out and "2/2" in said.err


def test_another_tokenizer_than_the_trained_one_is_refused(trained, tmp_path):
    shutil.copytree(trained["checkpoint"], tmp_path / "run")
    path = trained["checkpoint"].parent / "tokenizer.npz"
    _, identity = load_video_tokenizer(path)
    (meta,) = (tmp_path / "run/checkpoints/0/meta").rglob("metadata")
    for trained_with, fits in ((identity, True), ("another", False)):
        content = json.loads(meta.read_text()) | {"identity": {"tokenizer": trained_with}}
        meta.write_text(json.dumps(content))
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="another video"):
            load_matching_tokenizer(path, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="no video tokenizer at nothing"):
        load_matching_tokenizer("nothing", tmp_path / "run")


def test_what_is_missing_or_wrong_is_said_in_a_sentence(complains, converted, trained, tmp_path):
    out = tmp_path / "out/a.mp4"
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "cut.png").write_bytes(converted["image"].read_bytes()[:2000])
    for given, changes, words in (
        (converted, dict(tokenizer=None), "or --tokenizer=DIR with a converted Wan VAE"),
        (converted, dict(text_embedding=None, prompt="x"), "give --text_encoder=DIR with a"),
        (converted, dict(prompt="x"), "give either --prompt or --text_embedding"),
        (converted, dict(height=50), "height must be a multiple of 16 pixels"),
        (converted, dict(frames=60), "more than the 1 observed, e.g. 61; got 60"),
        (converted, dict(image="nothing.png"), "There is no picture or video at nothing.png"),
        (converted, dict(image=tmp_path / "text.png"), "text.png is neither a picture"),
        (converted, dict(image=tmp_path / "cut.png"), "cut.png is a damaged picture"),
        (converted, dict(guidance=2), "--guidance=2 needs --negative_prompt"),
        (converted, dict(checkpoint=converted["tokenizer"]), "of stage 'vae', expected a video"),
        (trained, dict(sigma_max=0.1), "sigma_max 0.1 and sigma_min 0.3"),
    ):
        complains(words, "launch.generate", *flags_of(given, f"--out={out}", **changes))
    complains("--out must be the name of an .mp4", "launch.generate", *flags_of(trained, "--out=x"))
    assert not out.parent.exists()
