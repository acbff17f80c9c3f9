"""Stand-ins for networks whose weights cannot be downloaded, with the same interfaces.

`LinearTokenizer` stands in for the Wan VAE: 8× in space, 4× in time, 16 channels, causal in time
(the first frame alone, then groups of four), roughly unit variance. Each 8×8 patch of a frame, or
of four frames, is projected on its 16 leading principal components, scaled to unit variance. The
fit is closed-form: a covariance and its eigenvectors.

`NgramTextEncoder` stands in for T5: hashed character n-grams.
"""

import zipfile
import zlib
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.atomic import write_npz
from data_pipelines.clip import CHANNELS, SPATIAL, TEMPORAL, check_frames
from data_pipelines.episode import reason

Array = jax.Array


class Projection(NamedTuple):
    """Affine maps between flat patches [p] and latents [16]."""

    mean: Array  # [p]
    encode: Array  # [p, 16]
    decode: Array  # [16, p]


class LinearTokenizer(NamedTuple):
    """The two projections; a pytree, stored like any parameters."""

    first: Projection
    group: Projection

    @jax.jit
    def encode(self, video: Array) -> Array:
        """Video [b, 1 + 4k, h, w, 3] in [-1, 1] to latents [b, 1 + k, h/8, w/8, 16]."""
        _, t, h, w, _ = video.shape
        check_frames(t)
        if h % SPATIAL or w % SPATIAL:
            raise ValueError(f"Frames of {h}x{w}: height and width must be multiples of {SPATIAL}.")
        parts = (video[:, :1], 1, self.first), (video[:, 1:], TEMPORAL, self.group)
        latents = [(to_patches(x, size) - p.mean) @ p.encode for x, size, p in parts]
        return jnp.concatenate(latents, axis=1)

    @jax.jit
    def decode(self, latents: Array) -> Array:
        """Latents [b, 1 + k, h/8, w/8, 16] to video [b, 1 + 4k, h, w, 3]."""
        parts = (latents[:, :1], 1, self.first), (latents[:, 1:], TEMPORAL, self.group)
        video = [from_patches(x @ p.decode + p.mean, size) for x, size, p in parts]
        return jnp.concatenate(video, axis=1)


def save_linear_tokenizer(path: Path, tokenizer: LinearTokenizer) -> None:
    """Writes a fitted tokenizer as .npz, all of it or nothing."""
    arrays = {
        f"{part}.{name}": np.asarray(value)
        for part, projection in tokenizer._asdict().items()
        for name, value in projection._asdict().items()
    }
    write_npz(path, **arrays)


def load_linear_tokenizer(path: Path) -> LinearTokenizer:
    """Reads what `save_linear_tokenizer` wrote."""
    if not path.exists():
        raise FileNotFoundError(
            f"There is no fitted tokenizer at {path}; fit one (launch.encode --only=tokenizer), or "
            "convert a Wan VAE into that folder (launch.convert)."
        )
    try:
        with np.load(path) as arrays:
            return LinearTokenizer(
                *(
                    Projection(*(jnp.asarray(arrays[f"{part}.{n}"]) for n in Projection._fields))
                    for part in LinearTokenizer._fields
                )
            )
    except (ValueError, EOFError, LookupError, zipfile.BadZipFile, zlib.error) as error:
        # NumPy takes whatever it does not know for a pickle.
        why = reason(path, "neither an .npz file of launch.encode nor the folder of a Wan VAE")
        raise OSError(f"the tokenizer {path} cannot be read: {why}.") from error


def fit_linear_tokenizer(clips: Iterable[np.ndarray]) -> LinearTokenizer:
    """Fits both projections to clips.

    Args:
        clips: batches of video, float32 [b, 1 + 4k, h, w, 3] in [-1, 1], k at least 1.
    """
    moments = [_Moments(SPATIAL**2 * 3), _Moments(TEMPORAL * SPATIAL**2 * 3)]
    for video in clips:
        check_frames(video.shape[1])
        moments[0].add(to_patches(video[:, :1], 1))
        moments[1].add(to_patches(video[:, 1:], TEMPORAL))
    return LinearTokenizer(*(m.projection() for m in moments))


class _Moments:
    """Running sums of patches and of their outer products, float64."""

    def __init__(self, size: int):
        self.count, self.sum, self.outer = 0, np.zeros(size), np.zeros((size, size))

    def add(self, patches) -> None:
        x = np.asarray(patches, np.float64).reshape(-1, len(self.sum))
        self.count += len(x)
        self.sum += x.sum(axis=0)
        self.outer += x.T @ x

    def projection(self) -> Projection:
        if self.count < CHANNELS:
            raise ValueError(
                f"{self.count} patches of video are too few to fit the tokenizer; give more video."
            )
        mean = self.sum / self.count
        values, vectors = np.linalg.eigh(self.outer / self.count - np.outer(mean, mean))
        values, vectors = values[::-1][:CHANNELS], vectors[:, ::-1][:, :CHANNELS]
        # The sign of an eigenvector is arbitrary: fix it, so that equal data gives equal latents.
        vectors *= np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(CHANNELS)])
        std = np.sqrt(np.maximum(values, 1e-8))
        maps = mean, vectors / std, (vectors * std).T
        return Projection(*(jnp.asarray(m, jnp.float32) for m in maps))


def to_patches(video, group: int):
    """[b, n·group, h, w, 3] to [b, n, h/8, w/8, group·192]."""
    b, t, h, w, c = video.shape
    x = video.reshape(b, t // group, group, h // SPATIAL, SPATIAL, w // SPATIAL, SPATIAL, c)
    return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(
        b, t // group, h // SPATIAL, w // SPATIAL, group * SPATIAL**2 * c
    )


def from_patches(x, group: int):
    """The inverse of `to_patches`."""
    b, n, h, w, size = x.shape
    c = size // (group * SPATIAL**2)
    x = x.reshape(b, n, h, w, group, SPATIAL, SPATIAL, c)
    return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, n * group, h * SPATIAL, w * SPATIAL, c)


class NgramTextEncoder:
    """One token per word: the normalised sum of the pseudo-random ±1 vectors of its n-grams.

    Words with common pieces ("drawer", "drawers") get similar vectors; the same text gives the
    same numbers on every machine. Same interface as T5: padding is zeros.

    Args:
        length: tokens per text; longer texts are cut.
        dim: width of a token, a multiple of 8.
    """

    def __init__(self, length: int, dim: int):
        if dim % 8 or not 8 <= dim <= 512:
            raise ValueError(
                f"The n-gram encoder's dim must be a multiple of 8 up to 512, got {dim}."
            )
        self.length, self.dim = length, dim

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Embeds texts: float32 [n, length, dim], zeros past a text's end."""
        out = np.zeros((len(texts), self.length, self.dim), np.float32)
        for row, text in zip(out, texts):
            for token, word in zip(row, text.lower().split()):
                token[:] = self._word(word.strip(".,;:!?\"'"))
        return out

    def _word(self, word: str) -> np.ndarray:
        marked = f"<{word}>"
        grams = {marked} | {marked[i : i + n] for n in (3, 4) for i in range(len(marked) - n + 1)}
        return sum(self._gram(gram) for gram in grams) / np.sqrt(len(grams))

    def _gram(self, gram: str) -> np.ndarray:
        digest = blake2b(gram.encode(), digest_size=self.dim // 8).digest()
        bits = np.unpackbits(np.frombuffer(digest, np.uint8))
        return bits.astype(np.float32) * 2 - 1
