"""What the benchmark reads: records, numbers and videos of released sizes, filled with noise."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.encoding.job import encode_dataset
from data_pipelines.episode import NANOSECONDS, Episode, LazyEpisodes, Stream
from data_pipelines.records.dataset import RecordDataset
from data_pipelines.records.writer import write_npz
from data_pipelines.video import write_video
from mvjax.clip import Clip

NO_POLICY = ConfigDict(dict(action={}, proprio={}))
VIDEO_ONLY = ConfigDict(
    dict(name="benchmark", embodiment="none", video="video", action="", proprio="")
)
_EPISODES = 20
_SHARD_ROWS = 50_000


class _Noise:
    """Stands in for the tokenizer and the text encoder: latents and texts of the right size."""

    def __init__(self, clip: Clip, length: int, dim: int):
        rng = np.random.default_rng(0)
        self._latents = rng.normal(size=(1, *clip.latent_shape)).astype(np.float32)
        self._text = rng.normal(size=(length, dim)).astype(np.float32)

    def encode(self, given: Sequence) -> np.ndarray:
        """Latents for a video, embeddings for texts."""
        if isinstance(given, list):
            return np.stack([self._text] * len(given))
        return np.roll(self._latents, int(given.sum()) % 1000).repeat(len(given), 0)


def make_records(path: Path, clip: Clip, text: tuple[int, int], count: int) -> RecordDataset:
    """Writes records through the encoding job; only the networks are replaced by noise.

    Args:
        path: a new folder.
        clip: gives the latents their shape.
        text: length and width of the embeddings; every text fills its length.
        count: records, at least 20.
    """
    per_episode = -(-count // _EPISODES)
    picture = np.zeros((16, 16, 3), np.uint8)

    def load(index: int) -> Episode:
        times = np.arange(per_episode, dtype=np.int64) * NANOSECONDS
        frames = np.repeat(picture[None] + np.uint8(index), per_episode, axis=0)
        streams = {"video": Stream(times, _InMemory(frames))}
        return Episode(f"{index}", "benchmark", "none", (f"text {index}",), streams, ("video",))

    small = ConfigDict(dict(height=16, width=16, observed_frames=1, future_frames=4, fps=1.0))
    noise = _Noise(clip, *text)
    return encode_dataset(
        LazyEpisodes(_EPISODES, load),
        VIDEO_ONLY,
        small,
        NO_POLICY,
        noise,
        noise,
        path,
        identity={"tokenizer": "noise", "text_encoder": "noise"},
        batch_size=1,
        validation_share=0.0,
    )


class _InMemory:
    def __init__(self, frames: np.ndarray):
        self._frames = frames

    def __len__(self) -> int:
        return len(self._frames)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        return self._frames[np.asarray(indices)]


def make_videos(folder: Path, count: int, frames: int, fps: int = 30) -> list[Path]:
    """Writes 480x640 H.264 videos of moving noise, as hard to decode as filmed ones."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i}.mp4" for i in range(count)]
    for number, path in enumerate(paths):
        write_video(path, _film(number, frames), fps)
    return paths


def _film(seed: int, frames: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (60, 80, 3), np.uint8)
    picture = np.kron(coarse, np.ones((8, 8, 1), np.uint8)) // 2
    grain = rng.integers(0, 24, (480, 640, 3), np.uint8)  # of a sensor; it does not move along
    for i in range(frames):
        yield np.roll(picture, (i, 3 * i), (0, 1)) + np.roll(grain, 7 * i, 1)


class NumberShards:
    """Columns of records without the records: what a pass over the numbers alone reads."""

    def __init__(self, folder: Path, rows: int, shape: tuple[int, int]):
        """Writes `rows` action chunks [horizon, dim] in files of 50,000."""
        folder.mkdir(parents=True)
        self.shapes = {"actions": shape}
        rng, self._files = np.random.default_rng(0), []
        for first in range(0, rows, _SHARD_ROWS):
            count = min(_SHARD_ROWS, rows - first)
            self._files.append(folder / f"shard_{len(self._files):05d}.npz")
            write_npz(
                self._files[-1], actions=rng.standard_normal((count, *shape), dtype=np.float32)
            )

    def shard_columns(self, *names: str) -> Iterator[dict[str, np.ndarray]]:
        """As `RecordDataset.shard_columns`."""
        for file in self._files:
            with np.load(file) as columns:
                yield {name: columns[name] for name in names}
