"""LeRobot v3.0 datasets (huggingface/lerobot), read with pyarrow and PyAV only.

    meta/info.json                            frame rate, path templates, features
    meta/tasks.parquet                        task_index by task text
    meta/episodes/chunk-*/file-*.parquet      per episode: tasks, rows, file numbers, video times
    data/chunk-*/file-*.parquet               a row per frame
    videos/<key>/chunk-*/file-*.mp4           many episodes per file

Streams carry the dataset's own feature names ("action", "observation.state",
"observation.images.<camera>"). Features that are text are left out.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.episode import NANOSECONDS, Episode, LazyEpisodes, Stream
from data_pipelines.sources.finished import check_finished
from data_pipelines.video import VideoFile, VideoPool

BOOKKEEPING = {"timestamp", "frame_index", "episode_index", "index", "task_index"}
TOLERANCE_S = 1e-4  # LeRobot's own, between a row's timestamp and frame_index / fps


def recognises(path: Path) -> bool:
    """Whether this is a LeRobot dataset, of any version."""
    return (path / "meta/info.json").is_file()


def open_lerobot(path: Path, *, name: str, embodiment: str) -> Sequence[Episode]:
    """Open a dataset; rows and videos are read when an episode is asked for.

    Args:
        path: the folder that holds `meta`, `data` and `videos`.
        name: of the dataset, becomes `Episode.source`.
        embodiment: the robot, becomes `Episode.embodiment`.

    Raises:
        ValueError: if it is no LeRobot v3.0 dataset or is not complete.
    """
    path = Path(path)
    check_finished(path)
    info = _read_info(path)
    rows = _read_episodes(path)
    vectors, cameras = _features(path, info)
    dataset = _Dataset(
        path, name, embodiment, info, rows, _read_tasks(path), vectors, cameras, _first_rows(rows)
    )
    return LazyEpisodes(len(rows), dataset.load)


@dataclass(frozen=True)
class _Dataset:
    path: Path
    name: str
    embodiment: str
    info: dict
    rows: list[dict]  # of meta/episodes, in order
    tasks: dict[int, str]
    vectors: dict[str, tuple[int, ...]]  # feature -> shape
    cameras: list[str]
    first_rows: dict[tuple[int, int], int]
    pool: VideoPool = field(default_factory=VideoPool)

    def load(self, index: int) -> Episode:
        row = self.rows[index]
        table = self._read_rows(row)
        times = _timestamps(table, self.info["fps"])
        streams = {
            key: Stream(times, _array(table, key, shape)) for key, shape in self.vectors.items()
        }
        for key in self.cameras:
            video = self._video(row, key)
            streams[key] = Stream(video.timestamps, video)
        instructions = row.get("tasks") or [self.tasks[table["task_index"][0].as_py()]]
        return Episode(
            id=f"episode_{row['episode_index']:06d}",
            source=self.name,
            embodiment=self.embodiment,
            instructions=tuple(instructions),
            streams=streams,
            cameras=tuple(self.cameras),
        )

    def _read_rows(self, row: dict) -> pa.Table:
        """The rows of one episode; reads only the row groups that hold them."""
        number = _data_file(row)
        path = self.path / self.info["data_path"].format(
            chunk_index=number[0], file_index=number[1]
        )
        if not path.is_file():
            raise ValueError(f"{self.path} is not complete: {path} is missing")
        start, stop = (
            row[f"dataset_{end}_index"] - self.first_rows[number] for end in ("from", "to")
        )
        columns = [*self.vectors, "timestamp", "frame_index", "episode_index", "task_index"]
        with pq.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            edges = np.concatenate([[0], np.cumsum(sizes)])
            groups = [g for g in range(len(sizes)) if edges[g] < stop and edges[g + 1] > start]
            table = file.read_row_groups(groups, columns=columns)
        table = table.slice(start - int(edges[groups[0]]) if groups else 0, stop - start)
        owners = set(table["episode_index"].to_pylist())
        if table.num_rows != stop - start or owners != {row["episode_index"]}:
            raise ValueError(
                f"{path} does not match meta/episodes: episode {row['episode_index']} should have "
                f"{stop - start} rows, found {table.num_rows} of the episodes {sorted(owners)}"
            )
        return table

    def _video(self, row: dict, key: str) -> VideoFile:
        path = self.path / self.info["video_path"].format(
            video_key=key,
            chunk_index=row[f"videos/{key}/chunk_index"],
            file_index=row[f"videos/{key}/file_index"],
        )
        start, end = (row[f"videos/{key}/{edge}_timestamp"] for edge in ("from", "to"))
        return VideoFile(path, start, end, self.pool)


def _read_info(path: Path) -> dict:
    file = path / "meta/info.json"
    if not file.is_file():
        raise ValueError(f"{path} is no LeRobot dataset: it has no meta/info.json")
    info = json.loads(file.read_text(encoding="utf-8"))
    version = str(info.get("codebase_version", "without a version"))
    if version.startswith("v2"):
        raise ValueError(
            f"{path} is a LeRobot {version} dataset, which is not supported yet; convert it with "
            "python -m lerobot.datasets.v30.convert_dataset_v21_to_v30 (in lerobot 0.4)"
        )
    if not version.startswith("v3."):
        raise ValueError(f"{path} is a LeRobot dataset {version}; v3.0 is expected")
    return info


def _read_episodes(path: Path) -> list[dict]:
    files = sorted((path / "meta/episodes").glob("chunk-*/file-*.parquet"))
    if not files:
        raise ValueError(f"{path} is not complete: no parquet files under meta/episodes")
    rows = []
    for file in files:
        names = [n for n in pq.read_schema(file).names if not n.startswith("stats/")]
        rows += pq.read_table(file, columns=names).to_pylist()
    return sorted(rows, key=lambda row: row["episode_index"])


def _read_tasks(path: Path) -> dict[int, str]:
    file = path / "meta/tasks.parquet"
    if not file.is_file():
        return {}
    table = pq.read_table(file)
    # The text is the data frame's index: "task", or without a name in older files.
    text = next(n for n in table.column_names if n != "task_index")
    return dict(zip(table["task_index"].to_pylist(), table[text].to_pylist()))


def _features(path: Path, info: dict) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Vector features with their shapes, and video features."""
    vectors, cameras = {}, []
    for key, feature in info["features"].items():
        if feature["dtype"] == "video":
            cameras.append(key)
        elif feature["dtype"] == "image":
            raise ValueError(
                f"{path} keeps {key} as single images; only video features are supported (make "
                "the dataset with use_videos=True)"
            )
        elif key not in BOOKKEEPING and feature["dtype"] not in ("string", "language"):
            vectors[key] = tuple(feature["shape"])
    return vectors, cameras


def _data_file(row: dict) -> tuple[int, int]:
    return row["data/chunk_index"], row["data/file_index"]


def _first_rows(rows: list[dict]) -> dict[tuple[int, int], int]:
    """(chunk, file) of the data -> the dataset-wide index of the file's first row."""
    first: dict[tuple[int, int], int] = {}
    for row in rows:
        file, start = _data_file(row), row["dataset_from_index"]
        first[file] = min(first.get(file, start), start)
    return first


def _timestamps(table: pa.Table, fps: float) -> np.ndarray:
    """Nanoseconds; the exact multiples of 1 / fps where the float32 column only rounds them."""
    stored = table["timestamp"].to_numpy().astype(np.float64).reshape(-1)
    regular = table["frame_index"].to_numpy().reshape(-1) / fps
    seconds = regular if np.abs(stored - regular).max() < TOLERANCE_S else stored
    return np.round(seconds * NANOSECONDS).astype(np.int64)


def _array(table: pa.Table, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """A column as [n, *shape], in the dataset's own number format."""
    column = table[key].combine_chunks()
    while isinstance(column, pa.ExtensionArray):
        column = column.storage
    while pa.types.is_nested(column.type):
        column = column.flatten()
    return column.to_numpy(zero_copy_only=False).reshape(table.num_rows, *shape)
