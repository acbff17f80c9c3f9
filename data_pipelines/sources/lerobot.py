"""LeRobot datasets (huggingface/lerobot) of the versions 2.0, 2.1 and 3.0: pyarrow and PyAV only.

    meta/info.json                            version, frame rate, path templates, features
    data/...                                  parquet, a row per frame: numbers, texts, pictures
    videos/...                                mp4

    v2: meta/episodes.jsonl                   per episode: episode_index, tasks, length
        meta/tasks.jsonl                      task_index, task
        data/chunk-000/episode_000000.parquet
        videos/chunk-000/<key>/episode_000000.mp4
    v3: meta/episodes/chunk-*/file-*.parquet  the same, and the numbers of its files and where in
        meta/tasks.parquet                    its videos it begins: a file holds many episodes
        data/chunk-000/file-000.parquet
        videos/<key>/chunk-000/file-000.mp4

Streams carry the dataset's own feature names ("action", "observation.state",
"observation.images.<camera>") and number formats. Cameras are stored as video or as single
pictures. Left out are texts (but see `texts`), LeRobot 0.6's "language" features, and depth.
Statistics, in which v2.0 and v2.1 differ, are not read.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.episode import NANOSECONDS, Episode, LazyEpisodes, Stream, reason
from data_pipelines.frames import Pictures
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
    info = _read_info(path)
    version = str(info.get("codebase_version", "without a version"))
    faults: list[str] = []
    if version.startswith("v2."):
        episodes, tasks = _episodes_v2(path, faults), _tasks_v2(path, faults)
    elif version.startswith("v3."):
        episodes, tasks = _episodes_v3(path, faults), _tasks_v3(path, faults)
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
    # Of several rows for one episode the last, as LeRobot does. What should be there but is not
    # listed stays in the sequence, to be counted and named.
    listed = {number: row for row, number in enumerate(episodes["episode_index"].to_pylist())}
    numbers = sorted(listed.keys() | set(range(info["total_episodes"])))
    features = _Features.of(info["features"], texts)
    rows = Rows([*features.vectors, *texts, *BOOKKEEPING])
    dataset = _Dataset(
        path, name, embodiment, info, numbers, listed, episodes, tasks, faults, features, rows
    )
    return LazyEpisodes(len(numbers), dataset.load)


# What the metadata says.


def _read_info(path: Path) -> dict:
    """The content of meta/info.json, with all that is needed from it."""
    file = path / "meta/info.json"
    if not file.is_file():
        raise ValueError(f"{path} is no LeRobot dataset: it has no meta/info.json")
    try:
        info = json.loads(file.read_text(encoding="utf-8-sig"))
        features = info.get("features", {}).values()
        whole = (
            len(features) > 0
            and all(isinstance(feature["dtype"], str) for feature in features)
            and all(isinstance(feature["shape"], list) for feature in features)
            and isinstance(info.get("data_path"), str)
            and info.get("fps", 0) > 0
            and isinstance(info.get("total_episodes"), int)
            and (
                isinstance(info.get("video_path"), str)
                or all(feature["dtype"] != "video" for feature in features)
            )
        )
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


class _Features(NamedTuple):
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


def _is_depth(feature: Mapping) -> bool:
    info = feature.get("info") or feature.get("video_info") or {}
    marked = info.get("is_depth_map") or info.get("video.is_depth_map")
    return bool(marked) or str(info.get("video.pix_fmt", "")).startswith("gray1")  # gray10le, ...


def _episodes_v2(path: Path, faults: list[str]) -> pa.Table:
    if not (path / "meta/episodes.jsonl").is_file():
        raise ValueError(f"{path} is not complete: meta/episodes.jsonl is missing; copy it again")

    def row(line: dict) -> dict:
        tasks = [str(text) for text in line.get("tasks") or ()]
        index, length = int(line["episode_index"]), int(line["length"])
        return {"episode_index": index, "length": length, "tasks": tasks}

    kinds = {"episode_index": pa.int64(), "length": pa.int64(), "tasks": pa.list_(pa.string())}
    rows = _read_lines(path / "meta/episodes.jsonl", row, faults)
    return pa.Table.from_pylist(rows, pa.schema(kinds))  # far smaller than a list of dicts


def _tasks_v2(path: Path, faults: list[str]) -> dict[int, str]:
    def row(line: dict) -> tuple[int, str]:
        return int(line["task_index"]), str(line["task"])

    return dict(_read_lines(path / "meta/tasks.jsonl", row, faults))


def _read_lines(file: Path, row: Callable[[dict], Any], faults: list[str]) -> list:
    """The good lines of a JSONL file; notes the bad ones."""
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
            # Statistics are most of these files.
            names = [n for n in pq.read_schema(file).names if not n.startswith("stats/")]
            table = pq.read_table(file, columns=names)
            tables.append(table.cast(table.schema.remove_metadata()))
        except (OSError, pa.ArrowException) as error:
            faults.append(f"{file} is damaged: {reason(file, error)}")
    if not tables:
        found = "; ".join(faults) or "no parquet files under meta/episodes"
        raise ValueError(f"{path} is not complete: {found}; copy it again")
    table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    if missing := {"episode_index", "length"} - set(table.column_names):
        raise ValueError(f"{path}/meta/episodes has no {sorted(missing)}; convert it again")
    index = table["episode_index"]
    if not pa.types.is_integer(index.type) or index.null_count:
        raise ValueError(f"{path}/meta/episodes: not every episode_index is a whole number")
    return table


def _tasks_v3(path: Path, faults: list[str]) -> dict[int, str]:
    file = path / "meta/tasks.parquet"
    try:
        table = pq.read_table(file)
        # The text is the data frame's index: "task", or without a name in older files.
        text = next(n for n in table.column_names if n != "task_index")
        return dict(zip(table["task_index"].to_pylist(), table[text].to_pylist()))
    except (KeyError, OSError, StopIteration, UnicodeDecodeError, pa.ArrowException) as error:
        faults.append(f"{file} cannot be read: {reason(file, error)}")
        return {}


# One episode.


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
    faults: Sequence[str]  # what of the metadata could not be read, for messages
    features: _Features
    rows: "Rows"
    videos: VideoPool = field(default_factory=VideoPool)
    # The encoded pictures of the last few episodes, read from disk once for many windows.
    pictures: LRU = field(default_factory=lambda: LRU(4))

    def load(self, index: int) -> Episode:
        number = self.numbers[index]
        if number not in self.listed:
            reasons = "; ".join(self.faults) or "it is not complete"
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
            key: Stream(times, as_array(table, key, shape, file))
            for key, shape in self.features.vectors.items()
        }
        for key in self.features.pictures:
            streams[key] = Stream(times, StoredPictures(file, key, spans, self.pictures))
        for key in self.features.videos:
            video = self._video(key, row)
            if len(video) < len(times):
                raise ValueError(
                    f"{video.path}: {len(video)} of the {len(times)} frames of episode {number} "
                    "are there; copy or encode it again"
                )
            streams[key] = video.stream()
        return Episode(
            id=f"episode_{number:06d}",
            source=self.name,
            embodiment=self.embodiment,
            instructions=self._instructions(number, row, table),
            streams=streams,
            cameras=(*self.features.videos, *self.features.pictures),
        )

    def _file(self, template: str, listed: str, row: dict, **fields: str) -> Path:
        """A file of an episode: version 2 numbers it by the episode, version 3 lists its number."""
        number = row["episode_index"]
        fields |= {
            "episode_index": number,
            "episode_chunk": number // self.info.get("chunks_size", 1000),
            "chunk_index": row.get(f"{listed}chunk_index"),
            "file_index": row.get(f"{listed}file_index"),
        }
        return self.path / self.info[template].format(**fields)

    def _video(self, key: str, row: dict) -> VideoFile:
        """The part that begins at the first frame and is as long as the rows, as LeRobot reads."""
        listed = f"videos/{key}/"
        file = self._file("video_path", listed, row, video_key=key)
        start = row[f"{listed}from_timestamp"] if f"{listed}file_index" in row else 0.0
        return VideoFile(file, start, start + row["length"] / self.info["fps"], self.videos)

    def _instructions(self, number: int, row: dict, table: pa.Table) -> tuple[str, ...]:
        used = table["task_index"].to_pylist()
        found = [self.tasks.get(n) for n in used] + list(row.get("tasks") or ())
        for key in self.features.texts:
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


# The rows of one episode out of a parquet file that may hold many.


class Span(NamedTuple):
    """Neighbouring rows of a row group: the `count` rows from `first` on."""

    group: int
    first: int
    count: int


class _File(NamedTuple):
    path: Path
    metadata: pq.FileMetaData
    least: np.ndarray  # per row group: the first and the last episode that it can hold, as its
    most: np.ndarray  # statistics say


class Rows:
    """Reads columns of episodes, and keeps the last row group: it may hold the next episode too.

    `pyarrow.dataset` could choose the row groups, but needs 5 ms to read one, this 1 ms.

    Safe to use from several threads; pickling drops what is kept.

    Args:
        columns: to read; `episode_index` among them.
    """

    def __init__(self, columns: Sequence[str]):
        self._columns = list(dict.fromkeys(columns))
        self._files = LRU[Path, _File](1)
        self._groups = LRU[tuple[Path, int], pa.Table](1)

    def read(self, path: Path, episode: int) -> tuple[pa.Table, list[Span]]:
        """The rows of an episode, and where in the file they are.

        Raises:
            ValueError: if the file is missing, cannot be read, or has no such rows or columns.
        """
        if not path.is_file():
            raise ValueError(f"{path}: the rows of episode {episode} are missing; copy it again")
        try:
            return self._read(path, episode)
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(path, error) from error

    def _read(self, path: Path, episode: int) -> tuple[pa.Table, list[Span]]:
        file = self._files.get(path, lambda: self._describe(path))
        parts, spans = [], []
        for group in np.flatnonzero((file.least <= episode) & (episode <= file.most)).tolist():
            table = self._groups.get((path, group), lambda group=group: self._group(file, group))
            at = np.flatnonzero(table["episode_index"].to_numpy() == episode)
            if len(at) == 0:
                continue
            if at[-1] - at[0] + 1 != len(at):
                raise ValueError(
                    f"{path}: rows of other episodes lie between those of episode {episode}; "
                    "convert the dataset again"
                )
            spans.append(Span(group, int(at[0]), len(at)))
            parts.append(table.slice(at[0], len(at)))
        if not parts:
            raise ValueError(f"{path} does not match meta/episodes: it has no episode {episode}")
        return pa.concat_tables(parts), spans

    def _group(self, file: _File, group: int) -> pa.Table:
        with pq.ParquetFile(file.path, metadata=file.metadata) as opened:
            return opened.read_row_group(group, columns=self._columns)

    def _describe(self, path: Path) -> _File:
        metadata = pq.read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
        if missing := [column for column in self._columns if column not in schema.names]:
            raise ValueError(
                f"{path} has no columns {missing}, which meta/info.json says it has; convert it "
                "again"
            )
        if not pa.types.is_integer(schema.field("episode_index").type):
            raise ValueError(f"{path}: episode_index is no whole number; convert the dataset again")
        columns = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
        place = columns.index("episode_index")
        limits = []  # per row group
        for group in range(metadata.num_row_groups):
            found = metadata.row_group(group).column(place).statistics
            known = found is not None and found.has_min_max
            limits.append((found.min, found.max) if known else (-np.inf, np.inf))
        least, most = np.array(limits).reshape(-1, 2).T
        return _File(path, metadata, least, most)


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: not a readable parquet file ({reason(path, error)}); copy it again")


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


# Cameras that are stored as single encoded pictures in the rows of a parquet file.

BATCH = 32  # rows in memory beside those wanted: a row group can hold a million pictures


class StoredPictures(Pictures):
    """Frames of a column of PNG or JPEG files.

    Args:
        path: the parquet file.
        key: the column.
        spans: the rows.
        held: the rows of the last episodes, shared by a dataset.
    """

    upright = True

    def __init__(self, path: Path, key: str, spans: Sequence[Span], held: LRU):
        super().__init__(f"{path}: {key}", sum(span.count for span in spans))
        self._path, self._key, self._held = path, key, held
        self._places = [(span, at) for span in spans for at in range(span.count)]

    def encoded(self, number: int) -> bytes:
        """One picture as it is stored."""
        span, at = self._places[number]
        rows = self._held.get((self._path, self._key, span), lambda: self._column(span))
        if not (rows[at] and rows[at]["bytes"]):
            raise ValueError(
                f"{self.name(number)} is not in the file; write the dataset again with its images"
            )
        return rows[at]["bytes"]

    def _column(self, span: Span) -> list[dict]:
        """Rows {bytes, path}."""
        rows, start, stop = [], 0, span.first + span.count
        try:
            # Page by page: by default all of the row group's column is read at once.
            with pq.ParquetFile(self._path, buffer_size=1 << 20, pre_buffer=False) as file:
                for batch in file.iter_batches(BATCH, row_groups=[span.group], columns=[self._key]):
                    first, last = max(span.first - start, 0), min(stop - start, batch.num_rows)
                    if first < last:
                        rows += batch.slice(first, last - first).column(self._key).to_pylist()
                    start += batch.num_rows
                    if start >= stop:
                        break
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(self._path, error) from error
        return rows
