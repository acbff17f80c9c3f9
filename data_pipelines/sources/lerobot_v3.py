"""Where things are in LeRobot v3.0: many episodes per parquet file and per video.

    meta/tasks.parquet                      task_index by task text
    meta/episodes/chunk-*/file-*.parquet    per episode: tasks, length, file numbers, video times
    data/chunk-000/file-000.parquet
    videos/<key>/chunk-000/file-000.mp4

A video's part is where its first frame is and as long as the rows, as LeRobot's own reader has it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.sources.lerobot_meta import Listing, Place, video_features
from data_pipelines.unreadable import reason


def read_listing(path: Path, info: dict) -> Listing:
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
    files = _Files(path, info, table.take(order).combine_chunks())
    return Listing(numbers[order].tolist(), files.place, _read_tasks(path, faults), faults)


@dataclass(frozen=True)
class _Files:
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
