"""The descriptive files of a LeRobot v3.0 dataset: `meta/info.json`, `meta/tasks.parquet`."""

import json
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

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
