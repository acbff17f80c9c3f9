"""The linear tokenizer (causal, a projection, unit variance), and the n-gram text encoder."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mvjax.models.stand_ins import (
    NgramTextEncoder,
    fit_linear_tokenizer,
    from_patches,
    load_linear_tokenizer,
    save_linear_tokenizer,
    to_patches,
)


def clips(count=16, frames=13, size=32, seed=0):
    """Smooth random video with a little noise in every pixel, in [-1, 1]."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(count, frames, size // 4, size // 4, 3)).cumsum(axis=1)
    smooth = 0.3 * coarse.repeat(4, axis=2).repeat(4, axis=3)
    return np.tanh(smooth + 0.1 * rng.normal(size=smooth.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return fit_linear_tokenizer([clips()[:8], clips()[8:]])


def test_shapes(tokenizer):
    video = clips(2, size=48)
    latents = tokenizer.encode(video)
    assert latents.shape == (2, 4, 6, 6, 16)
    assert tokenizer.decode(latents).shape == video.shape


def test_later_frames_change_no_earlier_latent(tokenizer):
    video = clips(1)
    before = np.asarray(tokenizer.encode(video))
    for frame, first_changed in ((0, 0), (1, 1), (4, 1), (5, 2), (12, 3)):
        changed = video.copy()
        changed[:, frame] += 0.5
        difference = np.abs(np.asarray(tokenizer.encode(changed)) - before).max(axis=(0, 2, 3, 4))
        assert np.flatnonzero(difference > 0).tolist() == [first_changed], frame
    prefix = tokenizer.encode(video[:, :5])
    np.testing.assert_allclose(prefix, before[:, :2], atol=1e-5)
    np.testing.assert_allclose(tokenizer.encode(video[:, :1]), before[:, :1], atol=1e-5)


def test_latents_of_fitted_data_are_uncorrelated_with_unit_variance(tokenizer):
    latents = np.asarray(tokenizer.encode(clips()))
    for part in (latents[:, :1], latents[:, 1:]):
        x = part.reshape(-1, 16).astype(np.float64)
        np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-4)
        np.testing.assert_allclose(x.T @ x / len(x), np.eye(16), atol=1e-3)


def test_decode_after_encode_is_a_projection(tokenizer):
    once = tokenizer.decode(tokenizer.encode(clips(2, seed=1)))
    twice = tokenizer.decode(tokenizer.encode(once))
    np.testing.assert_allclose(twice, once, atol=1e-4)
    latents = np.random.default_rng(0).normal(size=(1, 3, 2, 2, 16)).astype(np.float32)
    np.testing.assert_allclose(tokenizer.encode(tokenizer.decode(latents)), latents, atol=1e-3)


def test_it_is_the_best_linear_code_of_its_size(tokenizer):
    """The error left in the first frames is the sum of the covariance's smaller eigenvalues."""
    video = clips()
    error = (np.asarray(tokenizer.decode(tokenizer.encode(video))) - video)[:, :1]
    patches = to_patches(video[:, :1], 1).reshape(-1, 192).astype(np.float64)
    values = np.linalg.eigvalsh(np.cov(patches.T, bias=True))[:-16]
    mean_square = np.sum(error.astype(np.float64) ** 2) / len(patches)
    np.testing.assert_allclose(mean_square, values.sum(), rtol=1e-3)


@pytest.mark.parametrize("group", [1, 4])
def test_patches_come_back(group):
    video = clips(2, frames=4)
    np.testing.assert_array_equal(from_patches(to_patches(video, group), group), video)


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    path = tmp_path / "new" / "tokenizer.npz"
    save_linear_tokenizer(path, tokenizer)
    loaded = load_linear_tokenizer(path)
    np.testing.assert_array_equal(loaded.encode(clips(1)), tokenizer.encode(clips(1)))
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.npz"]
    with pytest.raises(FileNotFoundError, match=r"no fitted tokenizer at"):
        load_linear_tokenizer(tmp_path / "none.npz")


def test_a_file_that_is_no_tokenizer_is_named(tokenizer, tmp_path):
    save_linear_tokenizer(tmp_path / "whole.npz", tokenizer)
    whole, path = (tmp_path / "whole.npz").read_bytes(), tmp_path / "tokenizer.npz"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 40\n"
    other = "neither an .npz file"
    for content, words in ((pointer, "git lfs pull"), (b"", other), (whole[:-99], other)):
        path.write_bytes(content)
        with pytest.raises(OSError, match=f"tokenizer.npz cannot be read: .*{words}"):
            load_linear_tokenizer(path)
    np.savez(path, weights=np.zeros(3))
    with pytest.raises(OSError, match=r"neither an \.npz file of launch\.encode"):
        load_linear_tokenizer(path)


def test_wrong_video_is_explained(tokenizer):
    with pytest.raises(ValueError, match=r"12 frames .* use 1 \+ 4k frames"):
        tokenizer.encode(clips(1)[:, :12])
    with pytest.raises(ValueError, match=r"0 frames .* use 1 \+ 4k frames"):
        tokenizer.encode(clips(1)[:, :0])
    with pytest.raises(ValueError, match=r"Frames of 32x30: .* multiples of 8"):
        tokenizer.encode(clips(1)[:, :, :, :30])
    with pytest.raises(ValueError, match="12 frames"):
        fit_linear_tokenizer([clips(1)[:, :12]])
    with pytest.raises(ValueError, match="0 patches of video are too few"):
        fit_linear_tokenizer([])


# The n-gram text encoder: the same numbers everywhere, similar words near each other.

TEXTS = ["open the drawer", "Close the door.", ""]
DIGEST = "69a9a07b3e11e46473a19f392bb35a2725f884a70d4bb611755aabd0af3b4a8a"


def digest(texts):
    return hashlib.sha256(NgramTextEncoder(8, 64).encode(texts).tobytes()).hexdigest()


def word(text):
    return NgramTextEncoder(1, 256).encode([text])[0, 0]


def cosine(a, b):
    a, b = word(a), word(b)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_the_numbers_are_recorded():
    """Records and checkpoints made on one machine are read on another."""
    assert digest(TEXTS) == DIGEST


def test_the_numbers_do_not_depend_on_the_process():
    program = "from test_stand_ins import TEXTS, digest; print(digest(TEXTS))"
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": f"{here}:{here.parent}"}
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == DIGEST


def test_zeros_past_the_end_and_cut_at_the_length():
    out = NgramTextEncoder(8, 64).encode(TEXTS)
    assert out.dtype == np.float32 and out.shape == (3, 8, 64)
    used = np.any(out != 0, axis=-1)
    np.testing.assert_array_equal(used.sum(axis=1), [3, 3, 0])
    assert used[:2, :3].all()
    short = NgramTextEncoder(2, 64).encode(TEXTS)
    np.testing.assert_array_equal(short, out[:, :2])


def test_a_text_does_not_depend_on_its_neighbours_case_or_punctuation():
    encoder = NgramTextEncoder(4, 64)
    alone, among = encoder.encode(["close the door"])[0], encoder.encode(TEXTS)[1]
    np.testing.assert_array_equal(alone, among)


def test_similar_words_are_nearer_than_different_ones():
    for close, far in (("drawers", "window"), ("draw", "button"), ("drawn", "faucet")):
        assert cosine("drawer", close) > cosine("drawer", far) + 0.2
    assert cosine("drawer", "drawer") == pytest.approx(1)
    assert abs(cosine("drawer", "pulley")) < 0.3


def test_entries_have_about_unit_size():
    """The network's text projection starts for inputs of order one."""
    assert 0.5 < np.std([word(w) for text in TEXTS for w in text.split()]) < 2


@pytest.mark.parametrize("dim", [0, 12, 520])
def test_impossible_widths_are_explained(dim):
    with pytest.raises(ValueError, match=f"multiple of 8 up to 512, got {dim}"):
        NgramTextEncoder(8, dim)
