"""The rows of one episode out of a parquet file that may hold many."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.unreadable import reason

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
