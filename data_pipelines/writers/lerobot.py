"""Write a LeRobot v3.0 dataset (huggingface/lerobot, `lerobot.datasets`, codebase_version v3.0).

    meta/info.json  meta/stats.json  meta/tasks.parquet  meta/episodes/chunk-000/file-000.parquet
    data/chunk-000/file-000.parquet                      rows of all features but the videos
    videos/<key>/chunk-000/file-000.mp4                  many episodes per file

The videos are encoded beforehand (`data_pipelines.video.write_video`); an episode says which part
of which file is its own. `info.json` comes last: a folder without it is not a dataset.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# The descriptive files of a LeRobot v3.0 dataset: `meta/info.json`, `meta/tasks.parquet`.


CHUNK_FILES = 1000  # files per chunk folder
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
OWN_COLUMNS = {  # columns LeRobot adds to every dataset
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}


def tasks_table(tasks: list[str]) -> pa.Table:
    """Task numbers indexed by the task's text, as pandas stores a data frame with an index."""
    columns = [
        {
            "name": name,
            "field_name": name,
            "pandas_type": kind,
            "numpy_type": numpy,
            "metadata": None,
        }
        for name, kind, numpy in (
            ("task_index", "int64", "int64"),
            ("task", "unicode", "object"),
        )
    ]
    names = {"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object"}
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [{**names, "metadata": {"encoding": "UTF-8"}}],
        "columns": columns,
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.0.0",
    }
    table = pa.table({"task_index": np.arange(len(tasks)), "task": tasks})
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def dataset_info(
    *,
    vectors: Mapping[str, int],
    videos: Sequence[str],
    frame_size: tuple[int, int],
    fps: int,
    robot_type: str,
    totals: Mapping[str, int],
) -> dict:
    """The content of info.json.

    Args:
        vectors: feature name -> dimensions of a float32 vector.
        videos: names of the video features.
        frame_size: (height, width) of the videos in pixels.
        fps: frames and rows per second.
        robot_type: the robot's name.
        totals: total_episodes, total_frames and total_tasks.
    """
    height, width = frame_size
    features = {
        key: {"dtype": "float32", "shape": [dim], "names": None} for key, dim in vectors.items()
    }
    for key in videos:
        features[key] = {
            "dtype": "video",
            "shape": [height, width, 3],
            "names": ["height", "width", "channels"],
            "info": {
                "video.height": height,
                "video.width": width,
                "video.codec": "h264",
                "video.pix_fmt": "yuv420p",
                "video.is_depth_map": False,
                "video.fps": fps,
                "video.channels": 3,
                "has_audio": False,
            },
        }
    for key, dtype in OWN_COLUMNS.items():
        features[key] = {"dtype": dtype, "shape": [1], "names": None}
    return {
        "codebase_version": "v3.0",
        "robot_type": robot_type,
        **totals,
        "chunks_size": CHUNK_FILES,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 500,
        "fps": fps,
        "splits": {"train": f"0:{totals['total_episodes']}"},
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH if videos else None,
        "features": features,
    }


# The statistics a LeRobot v3.0 dataset carries, per episode and over all of it.
#
# Each feature has min, max, mean, std, count and the quantiles q01, q10, q50, q90, q99. Vectors
# have shape [d]; pictures are scaled to [0, 1] and have shape [3, 1, 1], over a sample of the
# frames.


QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}

Stats = dict[str, np.ndarray]


def vector_stats(values: np.ndarray) -> Stats:
    """Statistics of [n, d] values, each of shape [d] (count: [1])."""
    values = values.astype(np.float64)
    quantiles = np.quantile(values, list(QUANTILES.values()), axis=0)
    return {
        "min": values.min(0),
        "max": values.max(0),
        "mean": values.mean(0),
        "std": values.std(0),
        "count": np.array([len(values)]),
        **dict(zip(QUANTILES, quantiles)),
    }


def frame_stats(frames: Sequence[np.ndarray]) -> Stats:
    """Statistics of uint8 [h, w, 3] frames per channel, each of shape [3, 1, 1] (count: [1])."""
    stats = vector_stats(np.stack(frames).reshape(-1, 3) / 255.0)
    stats = {name: value.reshape(3, 1, 1) for name, value in stats.items() if name != "count"}
    return {**stats, "count": np.array([len(frames)])}


def combine(parts: Sequence[Stats]) -> Stats:
    """Statistics of a union from those of its parts; quantiles are averaged, as LeRobot does."""
    counts = np.array([part["count"][0] for part in parts], np.float64)
    weights = counts / counts.sum()

    def average(values: Sequence[np.ndarray]) -> np.ndarray:
        return np.tensordot(weights, np.stack(values), 1)

    mean = average([part["mean"] for part in parts])
    variance = average([part["std"] ** 2 + (part["mean"] - mean) ** 2 for part in parts])
    return {
        "min": np.min([part["min"] for part in parts], 0),
        "max": np.max([part["max"] for part in parts], 0),
        "mean": mean,
        "std": np.sqrt(variance),
        "count": np.array([int(counts.sum())]),
        **{name: average([part[name] for part in parts]) for name in QUANTILES},
    }


EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"


@dataclass(frozen=True)
class VideoPart:
    """The frames of one episode inside an encoded file.

    Attributes:
        path: the .mp4, at the dataset's frame rate.
        first_frame: where the episode starts in it.
        stats: of the frames (`lerobot_stats.frame_stats`).
    """

    path: Path
    first_frame: int
    stats: Stats


@dataclass(frozen=True)
class RobotEpisode:
    """One episode to write.

    Attributes:
        instruction: the task in words.
        vectors: feature name -> float32 [n, d], one row per frame.
        videos: feature name -> its part of a file, n frames from `first_frame` on.
    """

    instruction: str
    vectors: Mapping[str, np.ndarray]
    videos: Mapping[str, VideoPart]


def write_lerobot(
    path: Path,
    episodes: Sequence[RobotEpisode],
    *,
    fps: int,
    robot_type: str,
    frame_size: tuple[int, int],
    data_file_mb: float = 100.0,
) -> None:
    """Write the dataset; the same input gives the same bytes.

    Args:
        path: the dataset's folder; files of the same names are replaced.
        episodes: all with the same features.
        fps: frames and rows per second.
        robot_type: the robot's name, e.g. "metaworld_sawyer".
        frame_size: (height, width) of the videos in pixels.
        data_file_mb: size at which a new data file is begun.

    Raises:
        ValueError: if episodes disagree on features or lengths.
        OSError: if the folder cannot be written.
    """
    if not episodes:
        raise ValueError(f"{path}: no episodes were given to write")
    tasks = list(dict.fromkeys(episode.instruction for episode in episodes))
    tables = _tables(episodes, tasks, fps)
    data_files = _write_data(path, tables, data_file_mb)
    video_files = _place_videos(path, episodes)
    rows, all_stats, start = [], {}, 0
    for number, (episode, table) in enumerate(zip(episodes, tables)):
        stats = {key: vector_stats(_column(table, key)) for key in table.column_names}
        stats.update({key: part.stats for key, part in episode.videos.items()})
        for key, value in stats.items():
            all_stats.setdefault(key, []).append(value)
        rows.append(
            {
                "episode_index": number,
                "tasks": [episode.instruction],
                "length": table.num_rows,
                "data/chunk_index": data_files[number] // CHUNK_FILES,
                "data/file_index": data_files[number] % CHUNK_FILES,
                "dataset_from_index": start,
                "dataset_to_index": start + table.num_rows,
                **_video_columns(episode, table.num_rows, video_files, fps),
                **{f"stats/{k}/{n}": v.tolist() for k, s in stats.items() for n, v in s.items()},
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
            }
        )
        start += table.num_rows
    _write_parquet(path / EPISODES_PATH, [pa.Table.from_pylist(rows)])
    _write_parquet(path / "meta/tasks.parquet", [tasks_table(tasks)])
    overall = {key: combine(parts) for key, parts in all_stats.items()}
    _write_json(
        path / "meta/stats.json",
        {key: {n: v.tolist() for n, v in stats.items()} for key, stats in overall.items()},
    )
    info = dataset_info(
        vectors={key: values.shape[1] for key, values in episodes[0].vectors.items()},
        videos=list(episodes[0].videos),
        frame_size=frame_size,
        fps=fps,
        robot_type=robot_type,
        totals={"total_episodes": len(rows), "total_frames": start, "total_tasks": len(tasks)},
    )
    _write_json(path / "meta/info.json", info)


def _tables(episodes: Sequence[RobotEpisode], tasks: list[str], fps: int) -> list[pa.Table]:
    tables, start = [], 0
    first = episodes[0]
    for number, episode in enumerate(episodes):
        lengths = {key: len(values) for key, values in episode.vectors.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"episode {number}: its vectors must be equally long, got {lengths}")
        if [*episode.vectors] != [*first.vectors] or [*episode.videos] != [*first.videos]:
            raise ValueError(
                f"episode {number} has the features {[*episode.vectors, *episode.videos]}, episode "
                f"0 has {[*first.vectors, *first.videos]}; all must have the same"
            )
        n = next(iter(lengths.values()))
        columns = {
            key: pa.FixedSizeListArray.from_arrays(
                pa.array(np.ascontiguousarray(values, np.float32).reshape(-1)), values.shape[1]
            )
            for key, values in episode.vectors.items()
        }
        columns["timestamp"] = pa.array((np.arange(n) / fps).astype(np.float32))
        columns["frame_index"] = pa.array(np.arange(n))
        columns["episode_index"] = pa.array(np.full(n, number))
        columns["index"] = pa.array(np.arange(start, start + n))
        columns["task_index"] = pa.array(np.full(n, tasks.index(episode.instruction)))
        tables.append(pa.table(columns))
        start += n
    return tables


def _write_data(path: Path, tables: list[pa.Table], data_file_mb: float) -> list[int]:
    """Write the rows, one row group per episode, and return each episode's file number."""
    numbers, files, size = [], [], 0.0
    for table in tables:
        size += table.nbytes / 2**20
        if not files or size > data_file_mb:
            files.append([])
            size = table.nbytes / 2**20
        files[-1].append(table)
        numbers.append(len(files) - 1)
    for number, parts in enumerate(files):
        name = DATA_PATH.format(chunk_index=number // CHUNK_FILES, file_index=number % CHUNK_FILES)
        _write_parquet(path / name, parts)
    return numbers


def _place_videos(path: Path, episodes: Sequence[RobotEpisode]) -> dict[tuple[str, Path], int]:
    """Link every video file to its place; returns (feature, given path) -> file number."""
    numbers: dict[tuple[str, Path], int] = {}
    for episode in episodes:
        for key, part in episode.videos.items():
            if (key, part.path) in numbers:
                continue
            number = numbers[key, part.path] = sum(k == key for k, _ in numbers)
            chunk, file = divmod(number, CHUNK_FILES)
            name = VIDEO_PATH.format(video_key=key, chunk_index=chunk, file_index=file)
            place_file(part.path, path / name)
    return numbers


def place_file(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, replacing what is there (a copy across disks)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(source, part)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, part)
    os.replace(part, target)
    part.unlink(missing_ok=True)  # renaming between two names of one file leaves both


def _video_columns(episode: RobotEpisode, length: int, files: dict, fps: int) -> dict:
    columns = {}
    for key, part in episode.videos.items():
        chunk, file = divmod(files[key, part.path], CHUNK_FILES)
        columns[f"videos/{key}/chunk_index"] = chunk
        columns[f"videos/{key}/file_index"] = file
        columns[f"videos/{key}/from_timestamp"] = part.first_frame / fps
        columns[f"videos/{key}/to_timestamp"] = (part.first_frame + length) / fps
    return columns


def _column(table: pa.Table, key: str) -> np.ndarray:
    column = table[key].combine_chunks()
    if pa.types.is_fixed_size_list(column.type):
        return column.flatten().to_numpy().reshape(table.num_rows, -1)
    return column.to_numpy().reshape(table.num_rows, 1)


def _write_parquet(path: Path, tables: list[pa.Table]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with pq.ParquetWriter(part, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    os.replace(part, path)


def _write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)
