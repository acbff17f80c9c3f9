"""Writing datasets: LeRobot v3.0, HDF5 of robomimic and LIBERO, folders of captioned videos.

Videos are encoded beforehand (`data_pipelines.video.write_video`) and linked into place. Every file
is written atomically.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines import atomic

# LeRobot v3.0 (huggingface/lerobot, `lerobot.datasets`, codebase_version v3.0).
#
#   meta/info.json  meta/stats.json  meta/tasks.parquet  meta/episodes/chunk-000/file-000.parquet
#   data/chunk-000/file-000.parquet                      rows of all features but the videos
#   videos/<key>/chunk-000/file-000.mp4                  many episodes per file

_CHUNK_FILES = 1000  # files per chunk folder
_DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
_OWN_COLUMNS = {  # that LeRobot adds to every dataset
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}

Stats = dict[str, np.ndarray]  # min, max, mean, std, count and the quantiles


@dataclass(frozen=True)
class VideoPart:
    """The frames of one episode in an encoded file."""

    path: Path  # the .mp4, at the dataset's frame rate
    first_frame: int  # the episode's first frame in the file
    stats: Stats  # from `frame_stats`


@dataclass(frozen=True)
class RobotEpisode:
    """One episode of n frames to write."""

    instruction: str | Sequence[str]  # of the episode, or of each of its frames
    vectors: Mapping[str, np.ndarray]  # feature name -> float32 [n, d]
    videos: Mapping[str, VideoPart]  # feature name -> n frames of a file

    @property
    def tasks(self) -> list[str]:
        """The distinct instructions in the order in which they begin."""
        given = self.instruction
        return [given] if isinstance(given, str) else list(dict.fromkeys(given))


def write_lerobot(
    path: Path,
    episodes: Sequence[RobotEpisode],
    *,
    fps: int,
    robot_type: str,
    frame_size: tuple[int, int],
    data_file_mb: float = 100.0,
) -> None:
    """Writes a LeRobot v3.0 dataset; the same input gives the same bytes.

    Args:
        path: the dataset's folder; existing files are replaced.
        episodes: at least one; all have the same features.
        fps: frames and rows per second.
        robot_type: the robot's name, e.g. "metaworld_sawyer".
        frame_size: (height, width) of the videos in pixels.
        data_file_mb: size in MB at which a new data file begins.
    """
    if not episodes:
        raise ValueError(f"{path}: no episodes to write")
    tasks = list(dict.fromkeys(task for episode in episodes for task in episode.tasks))
    tables = _tables(episodes, tasks, fps)
    data_files = _write_data(path, tables, data_file_mb)
    video_files = _place_videos(path, episodes)
    rows, all_stats, start = [], {}, 0
    for number, (episode, table) in enumerate(zip(episodes, tables)):
        stats = {key: vector_stats(_column(table, key)) for key in table.column_names}
        stats |= {key: part.stats for key, part in episode.videos.items()}
        for key, value in stats.items():
            all_stats.setdefault(key, []).append(value)
        end = start + table.num_rows
        row = {
            "episode_index": number,
            "tasks": episode.tasks,
            "length": table.num_rows,
            "data/chunk_index": data_files[number] // _CHUNK_FILES,
            "data/file_index": data_files[number] % _CHUNK_FILES,
            "dataset_from_index": start,
            "dataset_to_index": end,
        }
        for key, part in episode.videos.items():
            chunk, file = divmod(video_files[key, part.path], _CHUNK_FILES)
            row |= {
                f"videos/{key}/chunk_index": chunk,
                f"videos/{key}/file_index": file,
                f"videos/{key}/from_timestamp": part.first_frame / fps,
                f"videos/{key}/to_timestamp": (part.first_frame + table.num_rows) / fps,
            }
        row |= {f"stats/{k}/{n}": v.tolist() for k, s in stats.items() for n, v in s.items()}
        rows.append(row | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
        start = end
    _write_parquet(path / _EPISODES_PATH, pa.Table.from_pylist(rows))
    _write_parquet(path / "meta/tasks.parquet", _tasks_table(tasks))
    overall = {
        key: {name: value.tolist() for name, value in _combined(parts).items()}
        for key, parts in all_stats.items()
    }
    _write_json(path / "meta/stats.json", overall)
    info = {
        "codebase_version": "v3.0",
        "robot_type": robot_type,
        "total_episodes": len(rows),
        "total_frames": start,
        "total_tasks": len(tasks),
        "chunks_size": _CHUNK_FILES,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 500,
        "fps": fps,
        "splits": {"train": f"0:{len(rows)}"},
        "data_path": _DATA_PATH,
        "video_path": _VIDEO_PATH if episodes[0].videos else None,
        "features": _features(episodes[0], frame_size, fps),
    }
    _write_json(path / "meta/info.json", info)  # last, because it marks a complete dataset


def _tables(episodes: Sequence[RobotEpisode], tasks: list[str], fps: int) -> list[pa.Table]:
    """The rows of each episode."""
    tables, start = [], 0
    features = [*episodes[0].vectors], [*episodes[0].videos]
    number_of = {task: number for number, task in enumerate(tasks)}
    for number, episode in enumerate(episodes):
        lengths = {key: len(values) for key, values in episode.vectors.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"episode {number}: its vectors must be equally long, got {lengths}")
        if (own := ([*episode.vectors], [*episode.videos])) != features:
            raise ValueError(
                f"episode {number} has the vectors and videos {own}, but episode 0 has {features}"
            )
        n = next(iter(lengths.values()))
        texts = episode.instruction
        if isinstance(texts, str):
            texts = [texts] * n
        if len(texts) != n:
            raise ValueError(f"episode {number} has {n} frames, but {len(texts)} instructions")
        columns = {
            key: pa.FixedSizeListArray.from_arrays(
                pa.array(np.ascontiguousarray(values, np.float32).reshape(-1)), values.shape[1]
            )
            for key, values in episode.vectors.items()
        }
        columns |= {
            "timestamp": (np.arange(n) / fps).astype(np.float32),
            "frame_index": np.arange(n),
            "episode_index": np.full(n, number),
            "index": np.arange(start, start + n),
            "task_index": np.array([number_of[text] for text in texts]),
        }
        tables.append(pa.table(columns))
        start += n
    return tables


def _write_data(path: Path, tables: list[pa.Table], data_file_mb: float) -> list[int]:
    """Writes the rows, one row group per episode, and returns each episode's file number."""
    numbers, files, size = [], [], 0.0
    for table in tables:
        size += table.nbytes / 2**20
        if not files or size > data_file_mb:
            files.append([])
            size = table.nbytes / 2**20
        files[-1].append(table)
        numbers.append(len(files) - 1)
    for number, parts in enumerate(files):
        chunk, file = divmod(number, _CHUNK_FILES)
        _write_parquet(path / _DATA_PATH.format(chunk_index=chunk, file_index=file), *parts)
    return numbers


def _place_videos(path: Path, episodes: Sequence[RobotEpisode]) -> dict[tuple[str, Path], int]:
    """Links every video file into place; returns (feature, given path) -> file number."""
    numbers: dict[tuple[str, Path], int] = {}
    for episode in episodes:
        for key, part in episode.videos.items():
            if (key, part.path) in numbers:
                continue
            number = numbers[key, part.path] = sum(k == key for k, _ in numbers)
            chunk, file = divmod(number, _CHUNK_FILES)
            name = _VIDEO_PATH.format(video_key=key, chunk_index=chunk, file_index=file)
            _place_file(part.path, path / name)
    return numbers


def _features(episode: RobotEpisode, frame_size: tuple[int, int], fps: int) -> dict[str, Any]:
    """The features in info.json: columns and videos."""
    height, width = frame_size
    features = {
        key: {"dtype": "float32", "shape": [values.shape[1]], "names": None}
        for key, values in episode.vectors.items()
    }
    for key in episode.videos:
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
    own = {key: {"dtype": kind, "shape": [1], "names": None} for key, kind in _OWN_COLUMNS.items()}
    return features | own


def _tasks_table(tasks: list[str]) -> pa.Table:
    """Task numbers indexed by the task's text, in the layout of a pandas data frame."""

    def described(name: str | None, kind: str, numpy: str, metadata: dict | None = None) -> dict:
        about = {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy}
        return {**about, "metadata": metadata}

    pandas = {
        "index_columns": ["task"],
        "column_indexes": [described(None, "unicode", "object", {"encoding": "UTF-8"})],
        "columns": [
            described("task_index", "int64", "int64"),
            described("task", "unicode", "object"),
        ],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.0.0",
    }
    table = pa.table({"task_index": np.arange(len(tasks)), "task": tasks})
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def vector_stats(values: np.ndarray) -> Stats:
    """Statistics of [n, d] values, each of shape [d] (count: [1])."""
    values = values.astype(np.float64)
    quantiles = np.quantile(values, list(_QUANTILES.values()), axis=0)
    return {
        "min": values.min(0),
        "max": values.max(0),
        "mean": values.mean(0),
        "std": values.std(0),
        "count": np.array([len(values)]),
        **dict(zip(_QUANTILES, quantiles)),
    }


def frame_stats(frames: Sequence[np.ndarray]) -> Stats:
    """Statistics of uint8 [h, w, 3] frames, scaled to [0, 1].

    Returns:
        Per channel, each of shape [3, 1, 1]; count [1] is the number of frames.
    """
    stats = vector_stats(np.stack(frames).reshape(-1, 3) / 255.0)
    stats = {name: value.reshape(3, 1, 1) for name, value in stats.items() if name != "count"}
    return {**stats, "count": np.array([len(frames)])}


def _combined(parts: Sequence[Stats]) -> Stats:
    """Statistics of a union from those of its parts; quantiles are averaged, as in LeRobot."""
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
        **{name: average([part[name] for part in parts]) for name in _QUANTILES},
    }


def _column(table: pa.Table, key: str) -> np.ndarray:
    """[n, d] values of a column."""
    column = table[key].combine_chunks()
    if pa.types.is_fixed_size_list(column.type):
        column = column.flatten()
    return column.to_numpy().reshape(table.num_rows, -1)


def _write_parquet(path: Path, *tables: pa.Table) -> None:
    with atomic.replacing(path) as partial, pq.ParquetWriter(partial, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)


def _write_json(path: Path, content: dict) -> None:
    atomic.write_text(path, json.dumps(content, indent=4, ensure_ascii=False) + "\n")


# LIBERO's HDF5 layout, which robomimic and LIBERO train from.
#
#   data/                        attributes env_args, problem_info, num_demos, total, ...
#   data/demo_<i>/actions, states, robot_states, rewards, dones
#   data/demo_<i>/obs/<key>      pictures and proprioception

_ROBOSUITE = 1  # the number of this kind of environment in robomimic


@dataclass(frozen=True)
class Demonstration:
    """One successful attempt of T steps; a row is an action and the observation before it."""

    actions: np.ndarray  # [T, a]
    observations: Mapping[str, np.ndarray]  # LIBERO's names -> [T, ...]; pictures uint8
    states: np.ndarray  # of the simulator, flattened [T, s]; a replay starts from the first one
    robot_states: np.ndarray | None = None  # [T, r]
    model_file: str = ""  # the simulator's XML, for a replay

    def __post_init__(self):
        rows = {"states": self.states, **self.observations}
        if self.robot_states is not None:
            rows["robot_states"] = self.robot_states
        wrong = {key: len(array) for key, array in rows.items() if len(array) != len(self.actions)}
        if wrong or not len(self.actions):
            raise ValueError(
                f"a demonstration needs one value per action, got {len(self.actions)} actions and "
                f"values {wrong}"
            )


@dataclass(frozen=True)
class Scene:
    """The properties that all demonstrations of a file share."""

    instruction: str
    env_name: str  # the environment's class
    problem_name: str = ""  # LIBERO's, such as "libero_tabletop_manipulation"
    bddl_file: str = ""  # the task's definition, relative to LIBERO's folder of them
    control_freq: int = 20  # steps per second
    image_convention: str = "opengl"  # bottom row first, as LIBERO's own; "opencv": top row first
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)  # JSON values

    def __post_init__(self):
        if (given := self.image_convention) not in ("opengl", "opencv"):
            raise ValueError(f"image_convention must be 'opengl' or 'opencv', got {given!r}")


def write_hdf5(path: Path, demonstrations: Iterable[Demonstration], scene: Scene) -> int:
    """Writes demonstrations as demo_0, ..., with one in memory at a time; returns their number.

    LIBERO names such a file `<task>_demo.hdf5`.
    """
    with atomic.replacing(path) as partial, h5py.File(partial, "w") as file:
        data = file.create_group("data")
        _describe(data, scene)
        count = total = 0
        for demo in demonstrations:
            _write_demonstration(data.create_group(f"demo_{count}"), demo)
            count, total = count + 1, total + len(demo.actions)
        if count == 0:
            raise ValueError(f"{path}: no demonstrations to write")
        data.attrs["num_demos"], data.attrs["total"] = count, total
    return count


def _describe(data: h5py.Group, scene: Scene) -> None:
    env_args = {
        "type": _ROBOSUITE,
        "env_name": scene.env_name,
        "problem_name": scene.problem_name,
        "bddl_file": scene.bddl_file,
        "env_kwargs": {**scene.env_kwargs, "control_freq": scene.control_freq},
    }
    problem_info = {
        "problem_name": scene.problem_name,
        "domain_name": "robosuite",
        "language_instruction": scene.instruction,
    }
    data.attrs["env_name"] = scene.env_name
    data.attrs["env_args"] = json.dumps(env_args)
    data.attrs["problem_info"] = json.dumps(problem_info)
    data.attrs["bddl_file_name"] = scene.bddl_file
    data.attrs["macros_image_convention"] = scene.image_convention


def _write_demonstration(group: h5py.Group, demo: Demonstration) -> None:
    last = np.zeros(len(demo.actions), np.uint8)
    last[-1] = 1  # the attempt succeeds and ends
    arrays = {"actions": demo.actions, "states": demo.states, "rewards": last, "dones": last}
    if demo.robot_states is not None:
        arrays["robot_states"] = demo.robot_states
    arrays |= {f"obs/{key}": array for key, array in demo.observations.items()}
    for key, array in arrays.items():
        group.create_dataset(key, data=array)
    group.attrs["num_samples"] = len(demo.actions)
    group.attrs["init_state"] = demo.states[0]
    group.attrs["model_file"] = demo.model_file


# Folders of captioned videos, in Cosmos's layout.


def write_video_folder(path: Path, videos: Mapping[str, tuple[Path, str]]) -> None:
    """Links videos to `video/<id>.mp4` and writes captions to `metas/<id>.txt`.

    `videos` maps ids to (.mp4, caption). Existing files are replaced.
    """
    for name, (video, caption) in videos.items():
        atomic.write_text(path / "metas" / f"{name}.txt", caption + "\n")
        _place_file(video, path / "video" / f"{name}.mp4")


def _place_file(source: Path, target: Path) -> None:
    """Hard-links `source` to `target`, or copies it to another disk; replaces a file there."""
    if target.exists() and target.samefile(source):
        return  # a rename between two links of one file does nothing, and would leave both
    with atomic.replacing(target) as partial:
        try:
            os.link(source, partial)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, partial)
