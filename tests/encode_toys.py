"""Small episodes in memory, a tokenizer that pools, and the encoding job on them; run as a program,
it encodes slowly until a file is there.

python tests/encode_toys.py OUT shard_00002.npz
"""

import sys
import time
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from data_pipelines.episode import Episode, Stream
from mvjax.encode import encode_dataset
from mvjax.models.stand_ins import LinearTokenizer, Projection

SIZE, FPS, CONTROL = 48, 40, 80
CLIP = ConfigDict(dict(height=16, width=16, observed_frames=5, future_frames=8, fps=20))
POLICY_IO = ConfigDict(
    dict(action=dict(horizon=4, fps=80, shift=0.0, dim=4), proprio=dict(horizon=1, fps=80, dim=4))
)
ROBOT = ConfigDict(
    dict(name="robot", video="front", action="action", proprio="state", embodiment="arm")
)
HUMAN = ConfigDict(dict(name="human", video="front", action="", proprio="", embodiment="human"))
IDENTITY = {"tokenizer": "toy", "text_encoder": "toy"}


class Frames:
    """Frames in memory that count how often each is decoded."""

    def __init__(self, seed, n):
        self.data = np.random.default_rng(seed).integers(0, 256, (n, SIZE, SIZE, 3), np.uint8)
        self.reads = np.zeros(n, int)

    def __len__(self):
        return len(self.data)

    def read(self, indices):
        np.add.at(self.reads, indices, 1)
        return self.data[indices]


class BrokenFrames(Frames):
    def read(self, indices):
        raise OSError("moov atom not found")


class Tokenizer:
    """Pools frames: the first alone, then groups of four; 8x8 pixels; channels repeated to 16."""

    def __init__(self, fail_at=None):
        self.calls, self.fail_at, self.shapes = 0, fail_at, set()

    def encode(self, video):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        self.shapes.add(video.shape)
        assert video.dtype == np.float32 and video.min() >= -1 and video.max() <= 1
        b, t, h, w, _ = video.shape
        first, rest = video[:, :1], video[:, 1:].reshape(b, (t - 1) // 4, 4, h, w, 3).mean(2)
        small = np.concatenate([first, rest], 1)
        small = small.reshape(b, -1, h // 8, 8, w // 8, 8, 3).mean((3, 5))
        return np.tile(small, 6)[..., :16]


class TextEncoder:
    def encode(self, texts):
        out = np.zeros((len(texts), 8, 4), np.float32)
        for row, text in zip(out, texts):
            row[: min(len(text), 8)] = len(text)
        return out


class OtherTextEncoder(TextEncoder):
    def encode(self, texts):
        return 2 * super().encode(texts)


def random_tokenizer(seed=0):
    """In place of a fit, which takes seconds."""
    rng = np.random.default_rng(seed)

    def projection(size):
        shapes = ((size,), (size, 16), (16, size))
        return Projection(
            *(rng.normal(scale=size**-0.5, size=s).astype(np.float32) for s in shapes)
        )

    return LinearTokenizer(*(projection(8 * 8 * 3 * frames) for frames in (1, 4)))


def episode(
    i, n=30, acting=True, instructions=None, reader=Frames, embeddings=None, scale=1.0, offset=0.0
):
    rng = np.random.default_rng(100 + i)
    streams = {"front": Stream(np.arange(n, dtype=np.int64) * 10**9 // FPS, reader(i, n))}
    if acting:
        stamps = np.arange(2 * n, dtype=np.int64) * 10**9 // CONTROL
        for name in ("action", "state"):
            values = offset + scale * rng.normal(size=(2 * n, 4))
            streams[name] = Stream(stamps, values.astype(np.float32))
    instructions = instructions or (f"task {'x' * (i % 3)}",)
    cameras = ("front",)
    return Episode(f"episode {i}", "toy", "arm", instructions, streams, cameras, embeddings or {})


def encode(episodes, path, dataset=ROBOT, tokenizer=None, clip=CLIP, text_encoder=None, **options):
    defaults = dict(batch_size=16, episodes_per_shard=2, validation_share=0.3, identity=IDENTITY)
    options = defaults | options
    return encode_dataset(
        episodes,
        dataset,
        clip,
        POLICY_IO,
        tokenizer or Tokenizer(),
        text_encoder or TextEncoder(),
        path,
        **options,
    )


def assert_same(a, b):
    assert (a.fingerprint, len(a), a.episodes) == (b.fingerprint, len(b), b.episodes)
    for i in range(len(a)):
        for key, value in a[i].items():
            np.testing.assert_array_equal(value, b[i][key])


def assert_same_files(a, b):
    files = sorted(path.name for path in a.iterdir())
    assert files == sorted(path.name for path in b.iterdir())
    for name in files:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def encode_slowly(path, until):
    """Six shards, of which the last is never reached: soon after `until` is there, it waits."""

    class Slow(Tokenizer):
        left = 3  # a shard has four batches

        def encode(self, video):
            self.left -= (path / until).exists()
            time.sleep(0.02 if self.left else 60)
            return super().encode(video)

    encode([episode(i) for i in range(12)], path, tokenizer=Slow())


if __name__ == "__main__":
    encode_slowly(Path(sys.argv[1]), sys.argv[2])
