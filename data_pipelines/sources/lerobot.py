"""LeRobot datasets (huggingface/lerobot), versions 2.0, 2.1 and 3.0, through pyarrow and PyAV.

    meta/info.json                            version, frame rate, path templates, features
    data/...                                  parquet, a row per frame: numbers, texts, images
    videos/...                                mp4

    v2: meta/episodes.jsonl                   per episode: episode_index, tasks, length
        meta/tasks.jsonl                      task_index, task
        data/chunk-000/episode_000000.parquet
        videos/chunk-000/<key>/episode_000000.mp4
    v3: meta/episodes/chunk-*/file-*.parquet  the same, the numbers of its files and its start in
        meta/tasks.parquet                    its videos: a file holds many episodes
        data/chunk-000/file-000.parquet
        videos/<key>/chunk-000/file-000.mp4

Streams have the dataset's own feature names ("action", "observation.state",
"observation.images.<camera>") and dtypes. Cameras are stored as videos or as single images. Texts
(but see `texts`), LeRobot 0.6's "language" features, depth and statistics (in which v2.0 and v2.1
differ) are not read.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.episode import NANOSECONDS, Episode, LazyEpisodes, Stream, reason
from data_pipelines.frames import ImageFrames
from data_pipelines.lru import LRU
from data_pipelines.sources.files import check_finished
from data_pipelines.video import VideoFile, VideoPool

BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "task_index")
TOLERANCE_S = 1e-4  # LeRobot's own, between a row's timestamp and frame_index / fps


def recognises(path: Path) -> bool:
    """Whether this is a LeRobot dataset, of any version."""
    return (path / "meta/info.json").is_file()


def open_lerobot(
    path: Path, *, name: str, embodiment: str, texts: Sequence[str] = ()
) -> Sequence[Episode]:
    """Opens a dataset; rows and videos are read when an episode is accessed.

    The instructions of an episode are the tasks of its frames in order of first appearance, then
    the others in its metadata, then those of `texts`.

    Args:
        path: the folder that holds `meta`, `data` and `videos`.
        name, embodiment: see `formats`.
        texts: features with further instructions, such as DROID's "language_instruction_2": strings
            or integer task indices.

    Raises:
        ValueError: if it is not a LeRobot dataset of these versions, its list of features or of
            episodes is missing or damaged, or a feature in `texts` does not exist.
    """
    path = Path(path)
    check_finished(path)
    info = _read_info(path)
    version = str(info.get("codebase_version", "without a version"))
    faults: list[str] = []
    if version.startswith("v2."):
        episodes, tasks = _episodes_v2(path, faults), _tasks_v2(path, faults)
    elif version.startswith("v3."):
        episodes, tasks = _episodes_v3(path, faults), _tasks_v3(path, faults)
    else:
        raise ValueError(
            f"{path} is a LeRobot dataset {version}; v2.0, v2.1 and v3.0 are supported; convert it "
            "with the lerobot package"
        )
    types = {key: feature["dtype"] for key, feature in info["features"].items()}
    if unfit := [key for key in texts if not types.get(key, "").startswith(("string", "int"))]:
        has = sorted(key for key in types if types[key] == "string")
        raise ValueError(f"{path} has no features {unfit} of strings or integers; strings: {has}")
    # If an episode has several rows, LeRobot takes the last. An episode that should exist but is
    # not listed stays in the sequence, so that it is counted and reported as unreadable.
    listed = {number: row for row, number in enumerate(episodes["episode_index"].to_pylist())}
    numbers = sorted(listed.keys() | set(range(info["total_episodes"])))
    vectors, videos, images = _streams(info["features"])
    rows = Rows([*vectors, *texts, *BOOKKEEPING])
    streams = vectors, videos, images, tuple(texts)
    dataset = _Dataset(
        path, name, embodiment, info, numbers, listed, episodes, tasks, faults, *streams, rows
    )
    return LazyEpisodes(len(numbers), dataset.load)


def _read_info(path: Path) -> dict:
    """The content of meta/info.json; every entry that is needed from it is checked."""
    file = path / "meta/info.json"
    if not file.is_file():
        raise ValueError(f"{path} is not a LeRobot dataset: it has no meta/info.json")
    try:
        info = json.loads(file.read_text(encoding="utf-8-sig"))
        features = info.get("features", {}).values()
        dtypes = {feature["dtype"] for feature in features}
        complete = (
            len(features) > 0
            and all(isinstance(dtype, str) for dtype in dtypes)
            and all(isinstance(feature["shape"], list) for feature in features)
            and isinstance(info.get("data_path"), str)
            and info.get("fps", 0) > 0
            and isinstance(info.get("total_episodes"), int)
            and ("video" not in dtypes or isinstance(info.get("video_path"), str))
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is damaged ({type(error).__name__}: {error}); copy it again"
        ) from error
    if not complete:
        raise ValueError(
            f"{file} must have fps, data_path, total_episodes, video_path if there are videos, "
            "and the dtype and shape of every feature; copy or convert the dataset again"
        )
    return info


def _streams(features: Mapping[str, dict]) -> tuple[dict, list[str], list[str]]:
    """The vectors with their shapes, the videos, and the cameras that are stored as images."""
    vectors, videos, images = {}, [], []
    for key, feature in features.items():
        if _is_depth(feature) or key in (*BOOKKEEPING, "index"):
            continue
        match feature["dtype"]:
            case "video":
                videos.append(key)
            case "image":
                images.append(key)
            case dtype if dtype not in ("string", "language"):
                vectors[key] = tuple(feature["shape"])
    return vectors, videos, images


def _is_depth(feature: Mapping) -> bool:
    info = feature.get("info") or feature.get("video_info") or {}
    marked = info.get("is_depth_map") or info.get("video.is_depth_map")
    return bool(marked) or str(info.get("video.pix_fmt", "")).startswith("gray1")  # gray10le, ...


def _episodes_v2(path: Path, faults: list[str]) -> pa.Table:
    if not (path / "meta/episodes.jsonl").is_file():
        raise ValueError(f"{path} is incomplete: meta/episodes.jsonl is missing; copy it again")

    def row(line: dict) -> dict:
        tasks = [str(text) for text in line.get("tasks") or ()]
        index, length = int(line["episode_index"]), int(line["length"])
        return {"episode_index": index, "length": length, "tasks": tasks}

    kinds = {"episode_index": pa.int64(), "length": pa.int64(), "tasks": pa.list_(pa.string())}
    rows = _read_lines(path / "meta/episodes.jsonl", row, faults)
    return pa.Table.from_pylist(rows, pa.schema(kinds))  # far smaller than a list of dicts


def _tasks_v2(path: Path, faults: list[str]) -> dict[int, str]:
    file = path / "meta/tasks.jsonl"
    return dict(_read_lines(file, lambda t: (int(t["task_index"]), str(t["task"])), faults))


def _read_lines(file: Path, row: Callable[[dict], Any], faults: list[str]) -> list:
    """The rows of a JSONL file; the first bad lines are added to `faults`."""
    if not file.is_file():
        faults.append(f"{file} is missing")
        return []
    rows = []
    for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append(row(json.loads(line.decode("utf-8"))))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if len(faults) < 5:
                faults.append(f"{file} line {number}: {type(error).__name__}: {error}")
    return rows


def _episodes_v3(path: Path, faults: list[str]) -> pa.Table:
    tables = []
    for file in sorted((path / "meta/episodes").glob("chunk-*/file-*.parquet")):
        try:
            # The statistics are most of the file.
            names = [n for n in pq.read_schema(file).names if not n.startswith("stats/")]
            table = pq.read_table(file, columns=names)
            tables.append(table.cast(table.schema.remove_metadata()))
        except (OSError, pa.ArrowException) as error:
            faults.append(f"{file} is damaged: {reason(file, error)}")
    if not tables:
        found = "; ".join(faults) or "no parquet files under meta/episodes"
        raise ValueError(f"{path} is incomplete: {found}; copy it again")
    table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    if missing := {"episode_index", "length"} - set(table.column_names):
        raise ValueError(f"{path}/meta/episodes has no {sorted(missing)}; convert it again")
    index = table["episode_index"]
    if not pa.types.is_integer(index.type) or index.null_count:
        raise ValueError(f"{path}/meta/episodes: not every episode_index is an integer")
    return table


def _tasks_v3(path: Path, faults: list[str]) -> dict[int, str]:
    file = path / "meta/tasks.parquet"
    try:
        table = pq.read_table(file)
        # The text is the data frame's index, named "task"; older files give it no name.
        text = next(n for n in table.column_names if n != "task_index")
        return dict(zip(table["task_index"].to_pylist(), table[text].to_pylist()))
    except (KeyError, OSError, StopIteration, UnicodeDecodeError, pa.ArrowException) as error:
        faults.append(f"{file} cannot be read: {reason(file, error)}")
        return {}


@dataclass(frozen=True)
class _Dataset:
    path: Path
    name: str
    embodiment: str
    info: Mapping[str, Any]
    numbers: Sequence[int]  # episode_index of each episode
    listed: Mapping[int, int]  # episode_index -> its row in `episodes`
    episodes: pa.Table
    tasks: Mapping[int, str]  # task_index -> text
    faults: Sequence[str]  # of the metadata, for messages
    vectors: Mapping[str, tuple[int, ...]]  # feature -> shape
    videos: Sequence[str]
    images: Sequence[str]
    texts: Sequence[str]
    rows: "Rows"
    pool: VideoPool = field(default_factory=VideoPool)
    # The encoded images of the last few episodes: read from disk once for many windows.
    cache: LRU = field(default_factory=lambda: LRU(4))

    def load(self, index: int) -> Episode:
        number = self.numbers[index]
        if number not in self.listed:
            reasons = "; ".join(self.faults) or "it is incomplete"
            raise ValueError(
                f"{self.path}/meta does not list episode {number} of {len(self.numbers)} "
                f"({reasons}); copy it again"
            )
        (row,) = self.episodes.slice(self.listed[number], 1).to_pylist()
        try:
            return self._load(number, row)
        except (LookupError, OSError, TypeError, UnicodeDecodeError, pa.ArrowException) as error:
            raise ValueError(
                f"{self.path}: episode {number} cannot be read ({type(error).__name__}: {error}); "
                "copy the dataset again"
            ) from error

    def _load(self, number: int, row: dict) -> Episode:
        file = self._file("data_path", "data/", row)
        table, spans = self.rows.read(file, number)
        if table.num_rows != row["length"]:
            raise ValueError(
                f"{file} does not match meta/episodes: episode {number} should have "
                f"{row['length']} rows, found {table.num_rows}; copy or convert it again"
            )
        times = _timestamps(table, self.info["fps"], file)
        streams = {
            key: Stream(times, _as_array(table, key, shape, file))
            for key, shape in self.vectors.items()
        }
        for key in self.images:
            streams[key] = Stream(times, ParquetImages(file, key, spans, self.cache))
        for key in self.videos:
            video = self._video(key, row)
            if len(video) < len(times):
                raise ValueError(
                    f"{video.path} has {len(video)} of the {len(times)} frames of episode "
                    f"{number}; copy or encode it again"
                )
            streams[key] = video.stream()
        return Episode(
            id=f"episode_{number:06d}",
            source=self.name,
            embodiment=self.embodiment,
            instructions=self._instructions(number, row, table),
            streams=streams,
            cameras=(*self.videos, *self.images),
        )

    def _file(self, template: str, listed: str, row: dict, **fields: str) -> Path:
        """A file of an episode: numbered by the episode in version 2, listed in version 3."""
        number = row["episode_index"]
        fields |= {
            "episode_index": number,
            "episode_chunk": number // self.info.get("chunks_size", 1000),
            "chunk_index": row.get(f"{listed}chunk_index"),
            "file_index": row.get(f"{listed}file_index"),
        }
        return self.path / self.info[template].format(**fields)

    def _video(self, key: str, row: dict) -> VideoFile:
        """The segment from the listed start, as long as the rows, as LeRobot reads it."""
        listed = f"videos/{key}/"
        file = self._file("video_path", listed, row, video_key=key)
        start = row[f"{listed}from_timestamp"] if f"{listed}file_index" in row else 0.0
        return VideoFile(file, start, start + row["length"] / self.info["fps"], self.pool)

    def _instructions(self, number: int, row: dict, table: pa.Table) -> tuple[str, ...]:
        used = table["task_index"].to_pylist()
        found = [self.tasks.get(n) for n in used] + list(row.get("tasks") or ())
        for key in self.texts:
            values = table[key].to_pylist()
            found += [v if isinstance(v, str) else self.tasks.get(v) for v in values]
        texts = tuple(dict.fromkeys(text for text in found if text is not None))
        if not texts:
            reasons = f" ({'; '.join(self.faults)})" if self.faults else ""
            raise ValueError(
                f"{self.path}: meta has no text for the tasks {sorted(set(used))} of episode "
                f"{number}{reasons}; copy it again"
            )
        return tuple(text for text in texts if text.strip()) or ("",)


def _timestamps(table: pa.Table, fps: float, path: Path) -> np.ndarray:
    """Nanoseconds: frame_index / fps, unless the float32 column says something else."""
    stored = _as_array(table, "timestamp", (), path)
    regular = _as_array(table, "frame_index", (), path) / fps
    tolerance = max(TOLERANCE_S, float(np.spacing(stored.max())))
    stored = stored.astype(np.float64)
    seconds = regular if np.abs(stored - regular).max() < tolerance else stored
    if not np.isfinite(seconds).all():
        raise ValueError(f"{path}: timestamp holds NaN or infinity; record the episode again")
    times = np.round(seconds * NANOSECONDS).astype(np.int64)
    try:
        Stream(times, times)
    except ValueError as error:  # `Stream` does not know the file
        raise ValueError(f"{path}: {error}") from None
    return times


class Span(NamedTuple):
    """Consecutive rows of a row group: the `count` rows from `first` on."""

    group: int
    first: int
    count: int


class Rows:
    """Reads columns of episodes; caches the last row group, which may hold the next episode, too.

    `pyarrow.dataset` could choose the row groups, but needs 5 ms to read one, this 1 ms. Safe to
    use from several threads; pickling drops the cache.
    """

    def __init__(self, columns: Sequence[str]):
        """`columns` must include `episode_index`."""
        self._columns = list(dict.fromkeys(columns))
        self._files = LRU[Path, tuple[pq.FileMetaData, np.ndarray]](1)
        self._groups = LRU[tuple[Path, int], pa.Table](1)

    def read(self, path: Path, episode: int) -> tuple[pa.Table, list[Span]]:
        """The rows of an episode, and their place in the file.

        Raises:
            ValueError: if the file is missing, cannot be read, or has no such rows or columns.
        """
        with _named(path):
            return self._read(path, episode)

    def _read(self, path: Path, episode: int) -> tuple[pa.Table, list[Span]]:
        metadata, (least, most) = self._files.get(path, lambda: self._describe(path))

        def read_group() -> pa.Table:
            with pq.ParquetFile(path, metadata=metadata) as file:
                return file.read_row_group(group, columns=self._columns)

        parts, spans = [], []
        for group in np.flatnonzero((least <= episode) & (episode <= most)).tolist():
            table = self._groups.get((path, group), read_group)
            at = np.flatnonzero(table["episode_index"].to_numpy() == episode)
            if len(at) == 0:
                continue
            if at[-1] - at[0] + 1 != len(at):
                raise ValueError(
                    f"{path}: the rows of episode {episode} are not consecutive; convert it again"
                )
            spans.append(Span(group, int(at[0]), len(at)))
            parts.append(table.slice(at[0], len(at)))
        if not parts:
            raise ValueError(f"{path} does not match meta/episodes: it has no episode {episode}")
        return pa.concat_tables(parts), spans

    def _describe(self, path: Path) -> tuple[pq.FileMetaData, np.ndarray]:
        """The metadata, and the lowest and highest episode of each row group [2, groups]."""
        metadata = pq.read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
        if missing := [column for column in self._columns if column not in schema.names]:
            raise ValueError(
                f"{path} has no columns {missing}, which meta/info.json lists; convert it again"
            )
        if not pa.types.is_integer(schema.field("episode_index").type):
            raise ValueError(f"{path}: episode_index is not an integer; convert the dataset again")
        columns = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
        place = columns.index("episode_index")
        limits = []
        for group in range(metadata.num_row_groups):
            found = metadata.row_group(group).column(place).statistics
            known = found is not None and found.has_min_max
            limits.append((found.min, found.max) if known else (-np.inf, np.inf))
        return metadata, np.array(limits).reshape(-1, 2).T


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns what pyarrow raises for a damaged file into a ValueError that names it."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"{path}: not a readable parquet file ({reason(path, error)}); copy it again"
        ) from error


def _as_array(table: pa.Table, key: str, shape: Sequence[int], path: Path) -> np.ndarray:
    """A column as [n, *shape] in its own dtype; ValueError if values are missing."""
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


BATCH = 32  # rows read at a time: a row group can hold a million images


class ParquetImages(ImageFrames):
    """A camera that is stored as a column of PNG or JPEG images.

    Args:
        path: the parquet file.
        key: the column.
        spans: the rows.
        cache: of the rows of the last episodes, shared by a dataset.
    """

    upright = True

    def __init__(self, path: Path, key: str, spans: Sequence[Span], cache: LRU):
        super().__init__(f"{path}: {key}", sum(span.count for span in spans))
        self._path, self._key, self._cache = path, key, cache
        self._places = [(span, at) for span in spans for at in range(span.count)]

    def encoded(self, number: int) -> bytes:
        """One image as it is stored."""
        span, at = self._places[number]
        rows = self._cache.get((self._path, self._key, span), lambda: self._column(span))
        if not (rows[at] and rows[at]["bytes"]):
            raise ValueError(
                f"{self.name(number)} is not in the file; write the dataset again with its images"
            )
        return rows[at]["bytes"]

    def _column(self, span: Span) -> list[dict]:
        """Rows {bytes, path}."""
        rows, start, stop = [], 0, span.first + span.count
        # Page by page: by default pyarrow reads the whole column of the row group at once.
        with (
            _named(self._path),
            pq.ParquetFile(self._path, buffer_size=1 << 20, pre_buffer=False) as file,
        ):
            for batch in file.iter_batches(BATCH, row_groups=[span.group], columns=[self._key]):
                first, last = max(span.first - start, 0), min(stop - start, batch.num_rows)
                if first < last:
                    rows += batch.slice(first, last - first).column(self._key).to_pylist()
                start += batch.num_rows
                if start >= stop:
                    break
        return rows
