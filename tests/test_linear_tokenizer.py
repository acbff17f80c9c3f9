"""The linear tokenizer: causal, a projection, unit variance on the data it was fitted to."""

import numpy as np
import pytest

from mvjax.models.stand_ins import (
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
    with pytest.raises(FileNotFoundError, match=r"no fitted tokenizer at .*; fit one first"):
        load_linear_tokenizer(tmp_path / "none.npz")


def test_wrong_video_is_explained(tokenizer):
    with pytest.raises(ValueError, match=r"12 frames .* use 1 \+ 4k frames, e.g. 9 or 13"):
        tokenizer.encode(clips(1)[:, :12])
    with pytest.raises(ValueError, match=r"0 frames .* e.g. 1 or 5"):
        tokenizer.encode(clips(1)[:, :0])
    with pytest.raises(ValueError, match=r"Frames of 32x30: .* multiples of 8"):
        tokenizer.encode(clips(1)[:, :, :, :30])
    with pytest.raises(ValueError, match="12 frames"):
        fit_linear_tokenizer([clips(1)[:, :12]])
    with pytest.raises(ValueError, match="more video than 0 patches"):
        fit_linear_tokenizer([])
