"""LeRobot datasets (huggingface/lerobot) of the versions 2.0, 2.1 and 3.0: pyarrow and PyAV only.

    meta/info.json    version, frame rate, path templates, features
    meta/...          the episodes and tasks
    data/...          parquet, a row per frame: numbers, texts, single pictures
    videos/...        mp4

The versions differ in where an episode's rows and videos are: `lerobot_v2`, `lerobot_v3`.

Streams carry the dataset's own feature names ("action", "observation.state",
"observation.images.<camera>") and number formats. Cameras are stored as video or as single
pictures. Left out are texts (but see `texts`), LeRobot 0.6's "language" features, and depth.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipelines.episode import NANOSECONDS, Episode, LazyEpisodes, Stream
from data_pipelines.sources import lerobot_v2, lerobot_v3
from data_pipelines.sources.finished import check_finished
from data_pipelines.sources.lerobot_meta import Listing, Place, read_info
from data_pipelines.sources.lerobot_pictures import Pictures, PictureShelf
from data_pipelines.sources.lerobot_rows import BOOKKEEPING, Rows, as_array
from data_pipelines.video import VideoFile, VideoPool

TOLERANCE_S = 1e-4  # LeRobot's own, between a row's timestamp and frame_index / fps


def recognises(path: Path) -> bool:
    """Whether this is a LeRobot dataset, of any version."""
    return (path / "meta/info.json").is_file()


def open_lerobot(
    path: Path, *, name: str, embodiment: str, texts: Sequence[str] = ()
) -> Sequence[Episode]:
    """Open a dataset; rows and videos are read when an episode is asked for.

    An episode's instructions are the tasks of its frames in the order they begin, then the others
    that its metadata names, then those of `texts`.

    Args:
        path: the folder that holds `meta`, `data` and `videos`.
        name: of the dataset, becomes `Episode.source`.
        embodiment: the robot, becomes `Episode.embodiment`.
        texts: features with further instructions, such as DROID's "language_instruction_2": texts,
            or integers that number the tasks.

    Raises:
        ValueError: if it is no LeRobot dataset of these versions, its list of features or of
            episodes is missing or damaged, or a feature in `texts` does not exist.
    """
    path = Path(path)
    check_finished(path)
    info = read_info(path)
    version = str(info.get("codebase_version", "without a version"))
    if version.startswith("v2."):
        listing = lerobot_v2.read_listing(path, info)
    elif version.startswith("v3."):
        listing = lerobot_v3.read_listing(path, info)
    else:
        raise ValueError(
            f"{path} is a LeRobot dataset {version}; v2.0, v2.1 and v3.0 are read (the lerobot "
            "package has converters)"
        )
    types = {key: feature["dtype"] for key, feature in info["features"].items()}
    if unfit := [key for key in texts if not types.get(key, "").startswith(("string", "int"))]:
        has = sorted(key for key in types if types[key] == "string")
        raise ValueError(
            f"{path} has no features {unfit} of texts or of integers; texts are {has or 'in none'}"
        )
    # What should be there but is not listed stays in the sequence, to be counted and named.
    listed = {number: i for i, number in enumerate(listing.numbers)}
    numbers = sorted(listed.keys() | set(range(info["total_episodes"])))
    features = _Features.of(info["features"], texts)
    dataset = _Dataset(
        path=path,
        name=name,
        embodiment=embodiment,
        fps=info["fps"],
        numbers=numbers,
        listed=listed,
        listing=listing,
        features=features,
        rows=Rows([*features.vectors, *texts, *BOOKKEEPING]),
    )
    return LazyEpisodes(len(numbers), dataset.load)


@dataclass(frozen=True)
class _Features:
    vectors: Mapping[str, tuple[int, ...]]  # feature -> shape
    videos: Sequence[str]
    pictures: Sequence[str]
    texts: Sequence[str]

    @classmethod
    def of(cls, features: Mapping[str, dict], texts: Sequence[str]) -> "_Features":
        vectors, videos, pictures = {}, [], []
        for key, feature in features.items():
            dtype = feature["dtype"]
            if _is_depth(feature) or key in (*BOOKKEEPING, "index"):
                continue
            if dtype == "video":
                videos.append(key)
            elif dtype == "image":
                pictures.append(key)
            elif dtype not in ("string", "language"):
                vectors[key] = tuple(feature["shape"])
        return cls(vectors, videos, pictures, tuple(texts))


@dataclass(frozen=True)
class _Dataset:
    path: Path
    name: str
    embodiment: str
    fps: float
    numbers: Sequence[int]  # episode_index of each episode
    listed: Mapping[int, int]  # episode_index -> its place in the listing
    listing: Listing
    features: _Features
    rows: Rows
    videos: VideoPool = field(default_factory=VideoPool)
    pictures: PictureShelf = field(default_factory=PictureShelf)

    def load(self, index: int) -> Episode:
        number = self.numbers[index]
        try:
            return self._load(self._place(number))
        except (LookupError, OSError, TypeError, UnicodeDecodeError, pa.ArrowException) as error:
            raise ValueError(
                f"{self.path}: episode {number} cannot be read ({type(error).__name__}: {error}); "
                "copy the dataset again"
            ) from error

    def _place(self, number: int) -> Place:
        if number not in self.listed:
            reasons = "; ".join(self.listing.faults) or "it is not complete"
            raise ValueError(
                f"{self.path}/meta does not list episode {number} of {len(self.numbers)} "
                f"({reasons}); copy it again"
            )
        return self.listing.place(self.listed[number])

    def _load(self, place: Place) -> Episode:
        table, spans = self.rows.read(place.data, place.number)
        if table.num_rows != place.length:
            raise ValueError(
                f"{place.data} does not match meta/episodes: episode {place.number} should have "
                f"{place.length} rows, found {table.num_rows}; copy or convert it again"
            )
        times = _timestamps(table, self.fps, place.data)
        streams = {
            key: Stream(times, as_array(table, key, shape, place.data))
            for key, shape in self.features.vectors.items()
        }
        for key in self.features.pictures:
            streams[key] = Stream(times, Pictures(place.data, key, spans, self.pictures))
        for key in self.features.videos:
            video = VideoFile(*place.videos[key], self.videos)
            if len(video) < len(times):
                raise ValueError(
                    f"{video.path}: {len(video)} of the {len(times)} frames of episode "
                    f"{place.number} are there; copy or encode it again"
                )
            streams[key] = video.stream()
        return Episode(
            id=f"episode_{place.number:06d}",
            source=self.name,
            embodiment=self.embodiment,
            instructions=self._instructions(place, table),
            streams=streams,
            cameras=(*self.features.videos, *self.features.pictures),
        )

    def _instructions(self, place: Place, table: pa.Table) -> tuple[str, ...]:
        tasks = self.listing.tasks
        found = [tasks.get(n) for n in table["task_index"].to_pylist()] + list(place.tasks)
        for key in self.features.texts:
            values = table[key].to_pylist()
            found += [value if isinstance(value, str) else tasks.get(value) for value in values]
        texts = tuple(dict.fromkeys(text for text in found if text is not None))
        if not texts:
            unknown = sorted(set(table["task_index"].to_pylist()))
            reasons = "; ".join(self.listing.faults)
            raise ValueError(
                f"{self.path}: meta has no text for the tasks {unknown} of episode {place.number}"
                f"{reasons and f' ({reasons})'}; copy it again"
            )
        return tuple(text for text in texts if text.strip()) or ("",)


def _is_depth(feature: Mapping) -> bool:
    info = feature.get("info") or feature.get("video_info") or {}
    marked = info.get("is_depth_map") or info.get("video.is_depth_map")
    return bool(marked) or str(info.get("video.pix_fmt", "")).startswith("gray1")  # gray10le, ...


def _timestamps(table: pa.Table, fps: float, path: Path) -> np.ndarray:
    """Nanoseconds; the exact multiples of 1 / fps where the float32 column only rounds them."""
    stored = as_array(table, "timestamp", (), path)
    regular = as_array(table, "frame_index", (), path) / fps
    tolerance = max(TOLERANCE_S, float(np.spacing(stored.max())))
    stored = stored.astype(np.float64)
    seconds = regular if np.abs(stored - regular).max() < tolerance else stored
    if not np.isfinite(seconds).all():
        raise ValueError(f"{path}: timestamp holds NaN or infinity; record the episode again")
    times = np.round(seconds * NANOSECONDS).astype(np.int64)
    try:
        Stream(times, times)
    except ValueError as error:  # here it is known of which file
        raise ValueError(f"{path}: {error}") from None
    return times
