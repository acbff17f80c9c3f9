"""How fast data comes, each figure beside what the machine gives without us, measured in turns.

Nothing is read but what is written here first: records and videos of the released sizes, filled
with noise. All files have just been written, so both sides read from the page cache.
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
from data_pipelines.clips import cut_episode
from data_pipelines.episode import NANOSECONDS, Episode, LazyEpisodes, Stream
from data_pipelines.loader import make_loader
from data_pipelines.records import RecordDataset
from data_pipelines.statistics import column_statistics
from data_pipelines.video import VideoFile, write_video
from mvjax.encode import encode_dataset

# What the benchmark reads: records, numbers and videos of released sizes, filled with noise.


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


BATCH = 8
_CLIP = ConfigDict(dict(height=480, width=640, observed_frames=5, future_frames=56, fps=30.0))


@dataclass(frozen=True)
class Turn:
    """One measurement.

    Attributes:
        speed: things per second.
        cpu_ms: processor time for one of them, of all threads together.
    """

    speed: float
    cpu_ms: float


@dataclass(frozen=True)
class Pair:
    """Ours and the machine's own speed, one figure per turn.

    Attributes:
        name: what was measured.
        thing: of which so many are done per second.
        ours: of this pipeline.
        alone: the same work without it.
        beside: what `alone` is.
    """

    name: str
    thing: str
    ours: list[Turn]
    alone: list[Turn]
    beside: str

    @property
    def speed_ratio(self) -> float:
        """Our speed by the other's, the median over the turns."""
        return median(a.speed / b.speed for a, b in zip(self.ours, self.alone))

    @property
    def cpu_ratio(self) -> float:
        """The other's processor time by ours; this hardly depends on what else is running."""
        return median(b.cpu_ms / a.cpu_ms for a, b in zip(self.ours, self.alone))


def clip_bytes(dataset: RecordDataset) -> int:
    """Bytes of a clip as published: bfloat16 latents and text."""
    return 2 * (int(np.prod(dataset.shapes["latents"])) + dataset.text(0).size)


def records_speed(dataset: RecordDataset, rounds: int, threads: int) -> Pair:
    """Clips per second of the training loader, beside reading the files of records as they are.

    Args:
        dataset: of `make_records`.
        rounds: turns of each; in a turn all records are read once.
        threads: of either.
    """
    shards = sorted(dataset.path.glob("*.arrayrecord"))

    def ours() -> Turn:
        loader = make_loader([dataset], [1.0], BATCH, 0, "train", num_threads=threads)
        next(loader)  # opening the files and starting the threads happen once in a run
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
    """Reads whole files with as many threads; the number of bytes."""
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
    """Frames per second cut into clips, beside what PyAV alone decodes to RGB; all are shown.

    Args:
        videos: of `make_videos`, at 30 frames per second.
        rounds: turns of each; in a turn all videos are decoded once.
        threads: videos decoded at a time, by either; each decoder has one thread.
    """

    def decode(path: Path) -> int:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            # Kept together, as a clip needs them.
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
    return len(cut_episode(episode, VIDEO_ONLY, _CLIP, NO_POLICY, 1.0).frames)


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
    """One turn of each unmeasured, then in turns, so that others on the machine slow both."""
    ours()
    alone()
    turns = [(ours(), alone()) for _ in range(rounds)]
    return Pair(name, thing, [a for a, _ in turns], [b for _, b in turns], beside)


def statistics_seconds(folder: Path, rows: int, shape: tuple[int, int]) -> float:
    """Seconds for the normalizer's statistics of `rows` action chunks of a shape.

    Args:
        folder: a new folder, for the numbers and the scratch file.
        rows: windows.
        shape: horizon and dimensions.
    """
    numbers = NumberShards(folder / "numbers", rows, shape)
    start = time.perf_counter()
    column_statistics([(numbers, np.arange(rows))], "actions", folder / "scratch")
    return time.perf_counter() - start


def memory_over_time(
    dataset: RecordDataset, videos: Sequence[Path], seconds: float, points: int = 60
) -> list[tuple[float, float]]:
    """Memory of this process while batches are read and videos are cut, over and over.

    Args:
        dataset: of `make_records`.
        videos: of `make_videos`.
        seconds: how long.
        points: so often it is measured.

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
        seen[-1].append(process.memory_info().rss / 1e6)  # also where the last batch came late
    finally:
        stop.set()
        beside.join()
    return [((i + 1) * seconds / points, float(np.mean(mb))) for i, mb in enumerate(seen) if mb]
