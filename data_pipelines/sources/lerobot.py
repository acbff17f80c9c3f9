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

import io
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from data_pipelines.episode import NANOSECONDS, Episode, LazyEpisodes, Stream, reason
from data_pipelines.sources.files import check_finished
from data_pipelines.video import VideoFile, VideoPool

# What all versions of LeRobot datasets have in common in their metadata.


@dataclass(frozen=True)
class Place:
    """Where an episode is.

    Attributes:
        number: its episode_index.
        length: its rows.
        tasks: what the list of episodes says happens in it.
        data: the parquet file with its rows.
        videos: video feature -> file, first second, last second (exclusive).
    """

    number: int
    length: int
    tasks: Sequence[str]
    data: Path
    videos: Mapping[str, tuple[Path, float, float]]


@dataclass(frozen=True)
class Listing:
    """The episodes of a dataset, as far as its lists can be read.

    Attributes:
        numbers: the episode_index of each, increasing.
        place: finds the i-th of them; may raise KeyError or ValueError.
        tasks: task_index -> text.
        faults: what could not be read, for messages.
    """

    numbers: Sequence[int]
    place: Callable[[int], Place]
    tasks: Mapping[int, str]
    faults: Sequence[str]


def read_info(path: Path) -> dict:
    """The content of meta/info.json.

    Raises:
        ValueError: if it is missing, damaged, or says too little.
    """
    file = path / "meta/info.json"
    if not file.is_file():
        raise ValueError(f"{path} is no LeRobot dataset: it has no meta/info.json")
    try:
        info = json.loads(file.read_text(encoding="utf-8-sig"))
        features = info.get("features", {})
        whole = features and all(
            isinstance(feature["dtype"], str) and isinstance(feature["shape"], list)
            for feature in features.values()
        )
        whole = whole and isinstance(info.get("data_path"), str) and info.get("fps", 0) > 0
        whole = whole and isinstance(info.get("total_episodes"), int)
        whole = whole and (isinstance(info.get("video_path"), str) or not video_features(info))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is damaged ({type(error).__name__}: {error}); copy it again"
        ) from error
    if not whole:
        raise ValueError(
            f"{file} must say fps, data_path, total_episodes, video_path where there are videos, "
            "and the dtype and shape of every feature; copy or convert the dataset again"
        )
    return info


def video_features(info: Mapping) -> list[str]:
    """The features that are stored as video."""
    return [key for key, feature in info["features"].items() if feature["dtype"] == "video"]


# The rows of one episode out of a parquet file that may hold many.


BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "task_index")


class Span(NamedTuple):
    """Neighbouring rows of a row group: the `count` rows from `first` on."""

    group: int
    first: int
    count: int


class _File(NamedTuple):
    path: Path
    metadata: pq.FileMetaData
    least: np.ndarray  # per row group: the episodes it can hold, from its statistics
    most: np.ndarray


class Rows:
    """Reads columns of episodes, and keeps the last row group: it may hold the next episode too.

    Safe to use from several threads; pickling drops what is kept.

    Args:
        columns: to read; `episode_index` among them.
    """

    def __init__(self, columns: Sequence[str]):
        self._columns = list(dict.fromkeys(columns))
        self._lock = threading.Lock()
        self._file: _File | None = None
        self._group: tuple[Path, int, pa.Table] | None = None

    def __reduce__(self):
        return Rows, (self._columns,)

    def read(self, path: Path, episode: int) -> tuple[pa.Table, list[Span]]:
        """The rows of an episode, and where in the file they are.

        Raises:
            ValueError: if the file is missing, cannot be read, or has no such rows or columns.
        """
        try:
            with self._lock:
                return self._read(path, episode)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(
                f"{path}: not a readable parquet file ({reason(path, error)}); copy it again"
            ) from error

    def _read(self, path: Path, episode: int) -> tuple[pa.Table, list[Span]]:
        if not path.is_file():
            raise ValueError(f"{path}: the rows of episode {episode} are missing; copy it again")
        if self._file is None or self._file.path != path:
            self._file = _describe(path, self._columns)
        parts, spans = [], []
        for group in np.flatnonzero((self._file.least <= episode) & (episode <= self._file.most)):
            table = self._row_group(path, int(group))
            at = np.flatnonzero(table["episode_index"].to_numpy() == episode)
            if len(at) == 0:
                continue
            if at[-1] - at[0] + 1 != len(at):
                raise ValueError(
                    f"{path}: rows of other episodes lie between those of episode {episode}; "
                    "convert the dataset again"
                )
            spans.append(Span(int(group), int(at[0]), len(at)))
            parts.append(table.slice(at[0], len(at)))
        if not parts:
            raise ValueError(f"{path} does not match meta/episodes: it has no episode {episode}")
        return pa.concat_tables(parts), spans

    def _row_group(self, path: Path, group: int) -> pa.Table:
        if self._group is None or self._group[:2] != (path, group):
            self._group = None  # not two in memory at a time
            with pq.ParquetFile(path, metadata=self._file.metadata) as file:
                self._group = path, group, file.read_row_group(group, columns=self._columns)
        return self._group[2]


def as_array(table: pa.Table, key: str, shape: Sequence[int], path: Path) -> np.ndarray:
    """A column as [n, *shape], in the dataset's own number format.

    Raises:
        ValueError: if values are missing, no numbers or of another shape; it names the file `path`.
    """
    column = table[key].combine_chunks()
    missing = column.null_count
    while isinstance(column, pa.ExtensionArray) or pa.types.is_nested(column.type):
        column = column.storage if isinstance(column, pa.ExtensionArray) else column.flatten()
        missing += column.null_count
    size = table.num_rows * int(np.prod(shape))
    if missing or len(column) != size:
        raise ValueError(
            f"{path}: {key} should hold {size} numbers, {table.num_rows} rows of {list(shape)}, "
            f"but has {len(column) - missing}; record or convert the episode again"
        )
    # A copy, so that a few rows do not keep their whole row group in memory.
    array = np.array(column.to_numpy(zero_copy_only=False)).reshape(table.num_rows, *shape)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{path}: {key} holds {column.type}, not numbers; convert it again")
    return array


def _describe(path: Path, columns: Sequence[str]) -> _File:
    metadata = pq.read_metadata(path)
    schema = metadata.schema.to_arrow_schema()
    if missing := [column for column in columns if column not in schema.names]:
        raise ValueError(
            f"{path} has no columns {missing}, which meta/info.json says it has; convert it again"
        )
    if not pa.types.is_integer(schema.field("episode_index").type):
        raise ValueError(f"{path}: episode_index is no whole number; convert the dataset again")
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    place = paths.index("episode_index")
    least, most = [], []
    for group in range(metadata.num_row_groups):
        statistics = metadata.row_group(group).column(place).statistics
        known = statistics is not None and statistics.has_min_max
        least.append(statistics.min if known else np.iinfo(np.int64).min)
        most.append(statistics.max if known else np.iinfo(np.int64).max)
    return _File(path, metadata, np.array(least, np.int64), np.array(most, np.int64))


# Cameras that are stored as single encoded pictures in the rows of a parquet file.


BATCH = 32  # rows in memory beside those wanted: a row group can hold a million pictures


class PictureShelf:
    """The encoded pictures of the last few episodes, read from disk once for many windows.

    Safe to use from several threads; pickling keeps the limit and drops the rest.
    """

    def __init__(self, max_held: int = 4):
        self._max_held = max_held
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[Path, str, Span], list[dict]] = OrderedDict()

    def __reduce__(self):
        return PictureShelf, (self._max_held,)

    def get(self, path: Path, key: str, span: Span) -> list[dict]:
        """Rows {bytes, path} of a picture column."""
        with self._lock:
            wanted = path, key, span
            rows = self._held.pop(wanted, None) or _read_column(path, key, span)
            self._held[wanted] = rows  # most recent last
            while len(self._held) > self._max_held:
                self._held.popitem(last=False)
        return rows


class Pictures:
    """A `FrameReader` over a picture column.

    Args:
        path: the parquet file.
        key: the column, of PNG or JPEG files.
        spans: the rows.
        shelf: shared by a dataset.
    """

    def __init__(self, path: Path, key: str, spans: Sequence[Span], shelf: PictureShelf):
        self._path = path
        self._key = key
        self._spans = spans
        self._shelf = shelf

    def __len__(self) -> int:
        return sum(span.count for span in self._spans)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Frames at `indices` (any order, repeats allowed): uint8 [k, h, w, 3].

        Raises:
            IndexError: for a frame that does not exist.
            ValueError: if a picture is missing, damaged, of more than 8 bits, or of another size.
        """
        indices = [int(i) for i in indices]
        if not indices:
            raise ValueError(f"{self._path}: no frame indices were given")
        bad = [i for i in indices if not 0 <= i < len(self)]
        if bad:
            raise IndexError(f"{self._path}: frame {bad[0]} asked for, but there are {len(self)}")
        unique = sorted(set(indices))
        frames = dict(zip(unique, [self._frame(i) for i in unique]))
        sizes = {frame.shape for frame in frames.values()}
        if len(sizes) > 1:
            raise ValueError(f"{self._path}: pictures of {self._key} differ in size: {sizes}")
        return np.stack([frames[i] for i in indices])

    def _frame(self, index: int) -> np.ndarray:
        at = index
        for span in self._spans:
            if at < span.count:
                break
            at -= span.count
        row = self._shelf.get(self._path, self._key, span)[at]
        where = f"{self._path}: picture {index} of {self._key}"
        if not (row and row["bytes"]):
            raise ValueError(f"{where} is not in the file; write the dataset again with its images")
        try:
            with Image.open(io.BytesIO(row["bytes"])) as picture:
                if picture.mode.startswith(("I", "F")):
                    raise ValueError(f"{where} has more than 8 bits; depth is not read")
                return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # as Pillow raises
            raise ValueError(f"{where} is damaged ({error}); copy the file again") from error


def _read_column(path: Path, key: str, span: Span) -> list[dict]:
    rows, start, stop = [], 0, span.first + span.count
    try:
        # Page by page: by default all of the row group's column is read at once.
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            for batch in file.iter_batches(BATCH, row_groups=[span.group], columns=[key]):
                first, last = max(span.first - start, 0), min(stop - start, batch.num_rows)
                if first < last:
                    rows += batch.slice(first, last - first).column(key).to_pylist()
                start += batch.num_rows
                if start >= stop:
                    break
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"{path}: not a readable parquet file ({reason(path, error)}); copy it again"
        ) from error
    return rows


# Where things are in LeRobot v2.0 and v2.1: a parquet file and a video per episode.
#
#     meta/episodes.jsonl    per episode: episode_index, tasks, length
#     meta/tasks.jsonl       task_index, task
#     data/chunk-000/episode_000000.parquet
#     videos/chunk-000/<key>/episode_000000.mp4
#
# The two differ only in where statistics are, which are not read (`meta/stats.json` in v2.0,
# `meta/episodes_stats.jsonl` in v2.1).


def _listing_v2(path: Path, info: dict) -> Listing:
    """The episodes of a v2 dataset.

    Raises:
        ValueError: if meta/episodes.jsonl is missing.
    """
    if not (path / "meta/episodes.jsonl").is_file():
        raise ValueError(f"{path} is not complete: meta/episodes.jsonl is missing; copy it again")
    known: dict[str, str] = {}  # 50,000 episodes of one task share one text

    def episode(line: dict) -> tuple[int, tuple[int, tuple[str, ...]]]:
        texts = line.get("tasks") or ()
        tasks = tuple(known.setdefault(str(text), str(text)) for text in texts)
        return int(line["episode_index"]), (int(line["length"]), tasks)

    def task(line: dict) -> tuple[int, str]:
        return int(line["task_index"]), str(line["task"])

    faults: list[str] = []
    episodes = _read_lines(path / "meta/episodes.jsonl", episode, faults)
    tasks = _read_lines(path / "meta/tasks.jsonl", task, faults)
    numbers = sorted(episodes)
    files = _FilesV2(path, info, [(number, *episodes[number]) for number in numbers])
    return Listing(numbers, files.place, tasks, faults)


@dataclass(frozen=True)
class _FilesV2:
    path: Path
    info: dict
    episodes: list[tuple[int, int, tuple[str, ...]]]  # episode_index, length, tasks

    def place(self, index: int) -> Place:
        number, length, tasks = self.episodes[index]
        at = {"episode_index": number}
        at["episode_chunk"] = number // self.info.get("chunks_size", 1000)
        videos = {}
        for key in video_features(self.info):
            file = self.path / self.info["video_path"].format(video_key=key, **at)
            videos[key] = file, 0.0, length / self.info["fps"]
        return Place(number, length, tasks, self.path / self.info["data_path"].format(**at), videos)


def _read_lines(
    file: Path, item: Callable[[dict], tuple[int, Any]], faults: list[str]
) -> dict[int, Any]:
    """The lines of a JSONL file by number, the later of two (as LeRobot does); notes bad lines."""
    if not file.is_file():
        faults.append(f"{file} is missing")
        return {}
    items = {}
    for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not line.strip():
            continue
        try:
            key, value = item(json.loads(line.decode("utf-8")))
        except (KeyError, TypeError, ValueError) as error:
            if len(faults) < 5:
                faults.append(f"{file} line {number}: {type(error).__name__}: {error}")
        else:
            items[key] = value
    return items


# Where things are in LeRobot v3.0: many episodes per parquet file and per video.
#
#     meta/tasks.parquet                      task_index by task text
#     meta/episodes/chunk-*/file-*.parquet    per episode: tasks, length, file numbers, video times
#     data/chunk-000/file-000.parquet
#     videos/<key>/chunk-000/file-000.mp4
#
# A video's part is where its first frame is and as long as the rows, as LeRobot's own reader has
# it.


def _listing_v3(path: Path, info: dict) -> Listing:
    """The episodes of a v3 dataset.

    Raises:
        ValueError: if there is no readable list of episodes.
    """
    faults: list[str] = []
    table = _read_episodes(path, faults)
    numbers = table["episode_index"].to_numpy()
    order = np.argsort(numbers, kind="stable")
    # Of several rows for one episode the last.
    order = order[np.append(np.diff(numbers[order]) > 0, True)[: len(order)]]
    files = _FilesV3(path, info, table.take(order).combine_chunks())
    return Listing(numbers[order].tolist(), files.place, _read_tasks(path, faults), faults)


@dataclass(frozen=True)
class _FilesV3:
    path: Path
    info: dict
    table: pa.Table  # of the episodes; far smaller than a list of dicts

    def place(self, index: int) -> Place:
        (row,) = self.table.slice(index, 1).to_pylist()
        videos = {}
        for key in video_features(self.info):
            column = f"videos/{key}/"
            file = self.info["video_path"].format(
                video_key=key,
                chunk_index=row[column + "chunk_index"],
                file_index=row[column + "file_index"],
            )
            start = row[column + "from_timestamp"]
            videos[key] = self.path / file, start, start + row["length"] / self.info["fps"]
        data = self.info["data_path"].format(
            chunk_index=row["data/chunk_index"], file_index=row["data/file_index"]
        )
        tasks = row.get("tasks") or ()
        return Place(row["episode_index"], row["length"], tasks, self.path / data, videos)


def _read_episodes(path: Path, faults: list[str]) -> pa.Table:
    tables = []
    for file in sorted((path / "meta/episodes").glob("chunk-*/file-*.parquet")):
        try:
            # Statistics are most of these files.
            names = [n for n in pq.read_schema(file).names if not n.startswith("stats/")]
            table = pq.read_table(file, columns=names)
            tables.append(table.cast(table.schema.remove_metadata()))
        except (OSError, pa.ArrowException) as error:
            faults.append(f"{file} is damaged: {reason(file, error)}")
    if not tables:
        found = "; ".join(faults) or "no parquet files under meta/episodes"
        raise ValueError(f"{path} is not complete: {found}; copy it again")
    table = pa.concat_tables(tables, promote_options="permissive")
    if missing := {"episode_index", "length"} - set(table.column_names):
        raise ValueError(f"{path}/meta/episodes has no {sorted(missing)}; convert it again")
    index = table["episode_index"]
    if not pa.types.is_integer(index.type) or index.null_count:
        raise ValueError(f"{path}/meta/episodes: not every episode_index is a whole number")
    return table


def _read_tasks(path: Path, faults: list[str]) -> dict[int, str]:
    file = path / "meta/tasks.parquet"
    try:
        table = pq.read_table(file)
        # The text is the data frame's index: "task", or without a name in older files.
        text = next(n for n in table.column_names if n != "task_index")
        return dict(zip(table["task_index"].to_pylist(), table[text].to_pylist()))
    except (KeyError, OSError, StopIteration, UnicodeDecodeError, pa.ArrowException) as error:
        faults.append(f"{file} cannot be read: {reason(file, error)}")
        return {}


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
        listing = _listing_v2(path, info)
    elif version.startswith("v3."):
        listing = _listing_v3(path, info)
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
