"""The speed of the data pipeline, each figure beside the speed of the machine, measured in turns.

The benchmark first writes its own data: records and videos of the released sizes, filled with
noise. The files have just been written, so both sides read from the page cache.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import av
import numpy as np
import psutil
from ml_collections import ConfigDict

from data_pipelines.atomic import write_npz
from data_pipelines.clip import Clip
from data_pipelines.cutting import cut_episode
from data_pipelines.episode import NANOSECONDS, Episode, LazyEpisodes, Stream
from data_pipelines.loader import make_loader
from data_pipelines.records import RecordDataset
from data_pipelines.statistics import column_statistics
from data_pipelines.video import VideoFile, write_video
from launch.benchmarks.training_speed import take_turns
from mvjax.encode import encode_dataset

# --- The data: records, numbers and videos of released sizes, filled with noise ---

NO_POLICY = ConfigDict(dict(action={}, proprio={}))
VIDEO_ONLY = ConfigDict(
    dict(name="benchmark", embodiment="none", video="video", action="", proprio="")
)
_EPISODES = 20
_SHARD_ROWS = 50_000


class _Noise:
    """Takes the place of tokenizer and text encoder: latents and embeddings of the right size."""

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

    Latents have the shape of `clip`, embeddings that of `text` (length, width); `count` is at
    least 60: an episode needs three frames.
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
    """Writes 480x640 H.264 videos of moving noise, as costly to decode as filmed ones."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i}.mp4" for i in range(count)]
    for number, path in enumerate(paths):
        write_video(path, _film(number, frames), fps)
    return paths


def _film(seed: int, frames: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (60, 80, 3), np.uint8)
    picture = np.kron(coarse, np.ones((8, 8, 1), np.uint8)) // 2
    grain = rng.integers(0, 24, (480, 640, 3), np.uint8)  # of a sensor: another motion
    for i in range(frames):
        yield np.roll(picture, (i, 3 * i), (0, 1)) + np.roll(grain, 7 * i, 1)


class NumberShards:
    """The numeric columns of records without the records, for a pass over the numbers alone."""

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


# --- The measurements ---

BATCH = 8
_CLIP = ConfigDict(dict(height=480, width=640, observed_frames=5, future_frames=56, fps=30.0))


@dataclass(frozen=True)
class Turn:
    """One measurement: units per second, and processor time per unit, of all threads together."""

    speed: float
    cpu_ms: float


@dataclass(frozen=True)
class Pair:
    """The speed of this pipeline and of the machine alone, one figure per turn.

    Attributes:
        name: What was measured.
        thing: The unit of the speed, "clip" or "frame".
        ours: Of this pipeline.
        alone: The same work without it.
        beside: What `alone` is.
    """

    name: str
    thing: str
    ours: list[Turn]
    alone: list[Turn]
    beside: str

    @property
    def speed_ratio(self) -> float:
        """Our speed divided by the other's, the median over the turns."""
        return median(a.speed / b.speed for a, b in zip(self.ours, self.alone))

    @property
    def cpu_ratio(self) -> float:
        """The other's processor time divided by ours; it hardly depends on what else is running."""
        return median(b.cpu_ms / a.cpu_ms for a, b in zip(self.ours, self.alone))

    def __str__(self) -> str:
        def words(turns: list[Turn]) -> str:
            speed, cpu = median(t.speed for t in turns), median(t.cpu_ms for t in turns)
            return f"{speed:.0f} {self.thing}s/s ({cpu:.2f} ms of processor time each)"

        return (
            f"{self.name}: {words(self.ours)}, {self.beside} {words(self.alone)}; "
            f"{self.speed_ratio:.0%} of its speed, {self.cpu_ratio:.0%} by processor time"
        )


def clip_bytes(dataset: RecordDataset) -> int:
    """Bytes of a clip as published: bfloat16 latents and text."""
    return 2 * (int(np.prod(dataset.shapes["latents"])) + dataset.text(0).size)


def records_speed(dataset: RecordDataset, rounds: int, threads: int) -> Pair:
    """Clips per second of the training loader, beside a plain read of the record files.

    In a turn all records are read once. Both sides use the same number of threads.
    """
    shards = sorted(dataset.path.glob("*.arrayrecord"))

    def ours() -> Turn:
        loader = make_loader([dataset], [1.0], BATCH, 0, "train", num_threads=threads)
        next(loader)  # opens the files and starts the threads, which happens once in a run
        batches = max(1, len(dataset) // BATCH)

        def read() -> int:
            for _ in range(batches):
                next(loader)
            return batches * BATCH

        return _turn(read)

    def alone() -> Turn:
        return _turn(lambda: _plain_read(shards, threads) / clip_bytes(dataset))

    size = clip_bytes(dataset) / 1e6
    return _in_turns(f"cached records of {size:.1f} MB", "clip", ours, alone, rounds, "plain read")


def _plain_read(files: Sequence[Path], threads: int, block: int = 1 << 20) -> int:
    """Reads whole files in parallel; returns the number of bytes."""
    portion = 16 * block
    ranges = [(file, at) for file in files for at in range(0, file.stat().st_size, portion)]

    def read(place: tuple[Path, int]) -> int:
        buffer, total = bytearray(block), 0
        with place[0].open("rb", buffering=0) as file:
            file.seek(place[1])
            while total < portion and (got := file.readinto(buffer)):
                total += got
        return total

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(read, ranges))


def decoding_speed(videos: Sequence[Path], rounds: int, threads: int) -> Pair:
    """Frames per second cut into clips, beside PyAV alone, which decodes every frame to RGB.

    In a turn all videos are decoded once, `threads` at a time; each decoder has one thread.
    """

    def decode(path: Path) -> int:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            # All in memory at once, as a clip needs them.
            return len([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])

    def all_by(work: Callable[[Path], int]) -> Callable[[], Turn]:
        def decoded() -> int:
            with ThreadPoolExecutor(threads) as pool:
                return sum(pool.map(work, videos))

        return lambda: _turn(decoded)

    name = "480x640 H.264 decoded into clips"
    return _in_turns(name, "frame", all_by(_cut), all_by(decode), rounds, "PyAV alone")


def _cut(path: Path) -> int:
    streams = {"video": VideoFile(path).stream()}
    episode = Episode(path.stem, "benchmark", "none", ("",), streams, ("video",))
    return len(cut_episode(episode, VIDEO_ONLY, _CLIP, NO_POLICY, 1.0).video.frames)


def _turn(work: Callable[[], float]) -> Turn:
    cpu, start = time.process_time(), time.perf_counter()
    done = work()
    return Turn(done / (time.perf_counter() - start), (time.process_time() - cpu) / done * 1e3)


def _in_turns(
    name: str,
    thing: str,
    ours: Callable[[], Turn],
    alone: Callable[[], Turn],
    rounds: int,
    beside: str,
) -> Pair:
    ours()  # one turn of each is not measured
    alone()
    return Pair(name, thing, **take_turns({"ours": ours, "alone": alone}, rounds), beside=beside)


def statistics_seconds(folder: Path, rows: int, shape: tuple[int, int]) -> float:
    """Seconds for the normalizer's statistics of `rows` action chunks [horizon, dim].

    `folder` is a new folder, for the numbers and the scratch file.
    """
    numbers = NumberShards(folder / "numbers", rows, shape)
    start = time.perf_counter()
    column_statistics([(numbers, np.arange(rows))], "actions", folder / "scratch")
    return time.perf_counter() - start


def memory_over_time(
    dataset: RecordDataset, videos: Sequence[Path], seconds: float, points: int = 60
) -> list[tuple[float, float]]:
    """Memory of this process while batches are read and videos are cut, again and again.

    Returns:
        (seconds since the start, MB in use): the mean of each of the `points` intervals.
    """
    process, start, stop = psutil.Process(), time.perf_counter(), threading.Event()

    def cut_again() -> None:
        while not stop.is_set():
            for path in videos:
                _cut(path)

    seen: list[list[float]] = [[] for _ in range(points)]
    loader = make_loader([dataset], [1.0], BATCH, 0, "train", num_threads=2)
    beside = threading.Thread(target=cut_again, daemon=True)
    beside.start()
    try:
        while (now := time.perf_counter() - start) < seconds:
            next(loader)
            seen[int(now / seconds * points)].append(process.memory_info().rss / 1e6)
        seen[-1].append(process.memory_info().rss / 1e6)  # the last batch may have come late
    finally:
        stop.set()
        beside.join()
    return [((i + 1) * seconds / points, float(np.mean(mb))) for i, mb in enumerate(seen) if mb]
