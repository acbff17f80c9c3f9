"""The parquet files of a LeRobot dataset: the rows of an episode, its numbers and images."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipelines.episode import reason
from data_pipelines.frames import ImageFrames
from data_pipelines.lru import LRU

_BATCH = 32  # rows read at a time: a row group can hold a million images


class Span(NamedTuple):
    """Consecutive rows of a row group: the `count` rows from `first` on."""

    path: Path
    group: int
    first: int
    count: int


@dataclass(frozen=True)
class Found:
    """The rows of an episode."""

    path: Path  # their file, or the first of them
    table: pa.Table  # the columns that can be read
    spans: list[Span]
    kinds: Mapping[str, pa.DataType]  # of all columns of the file
    absent: Mapping[str, str]  # wanted column that cannot be read -> why

    @classmethod
    def joined(cls, parts: Sequence["Found"]) -> "Found":
        """The rows in several files."""
        tables = [part.table for part in parts]
        names = [n for n in tables[0].column_names if all(n in t.column_names for t in tables)]
        return cls(
            parts[0].path,
            pa.concat_tables([table.select(names) for table in tables]),
            [span for part in parts for span in part.spans],
            parts[0].kinds,
            {name: why for part in parts for name, why in part.absent.items()},
        )

    def column(self, key: str) -> list:
        """The values; None if there is no such column."""
        if key in self.kinds and key in self.absent:
            raise ValueError(f"{self.path}: {key}: {self.absent[key]}")
        if key in self.absent:
            return [None] * self.table.num_rows
        values = self.table[key].to_pylist()
        return [v[0] if isinstance(v, list) and len(v) == 1 else v for v in values]

    def numbers(self, key: str, needed: bool = False) -> np.ndarray | None:
        """A number per row; None if there is no such column, or, unless `needed`, no numbers."""
        if key not in self.kinds:
            return None
        try:
            return self.array(key, ())
        except ValueError as error:
            if needed:
                raise ValueError(f"{key}: {error}") from None
            return None

    def array(self, key: str, shape: tuple[int, ...] | None) -> np.ndarray:
        """A column as [n, *shape] in its own dtype; ValueError says why it cannot be used."""
        if key in self.absent:
            raise ValueError(self.absent[key])
        return _as_array(self.table[key], shape)

    def no_images(self, key: str) -> str:
        """Why a column has no images; "" if it does."""
        if key not in self.kinds:
            return "its column is not in the file"
        kind = self.kinds[key]
        parts = {f.name for f in kind} if pa.types.is_struct(kind) else set()
        fits = "bytes" in parts or kind in (pa.binary(), pa.large_binary())
        return "" if fits else f"it holds {kind}, not images"


class Rows:
    """Reads columns of episodes; caches the last row group, which may hold the next episode, too.

    `pyarrow.dataset` could choose the row groups, but needs 5 ms to read one, this 1 ms. Safe to
    use from several threads; pickling drops the cache.
    """

    def __init__(self, numbers: Sequence[str], texts: Sequence[str]):
        """`numbers` and `texts` are columns; a column may be missing, or turn out as damaged."""
        self._numbers, self._texts = list(numbers), list(texts)
        self._files = LRU[Path, _File](1)
        self._groups = LRU[tuple[Path, int], tuple[pa.Table, dict[str, str]]](1)

    def read(self, path: Path, episode: int) -> Found:
        """The rows of an episode.

        Raises:
            ValueError: if the file is missing, cannot be read, or has no such rows.
        """
        with _named(path):
            return self._read(path, episode)

    def limits(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """The lowest and the highest episode of each row group."""
        with _named(path):
            return tuple(self._describe(path).limits)

    def _read(self, path: Path, episode: int) -> Found:
        file = self._files.get(path, lambda: self._describe(path))
        least, most = file.limits
        parts, spans, broken = [], [], {}
        for group in np.flatnonzero((least <= episode) & (episode <= most)).tolist():
            read = partial(file.read, path, group)
            table, faults = self._groups.get((path, group), read)
            at = np.flatnonzero(table["episode_index"].to_numpy() == episode)
            if len(at) == 0:
                continue
            if at[-1] - at[0] + 1 != len(at):
                raise ValueError(
                    f"{path}: the rows of episode {episode} are not consecutive; convert it again"
                )
            spans.append(Span(path, group, int(at[0]), len(at)))
            parts.append(table.slice(at[0], len(at)))
            broken |= faults
        if not parts:
            known = len(least) and np.isfinite([least, most]).all()
            has = f"episodes {least.min():g} to {most.max():g}" if known else "no rows, or others"
            raise ValueError(
                f"{path} does not match meta/episodes: it has no episode {episode}, but {has}; "
                "convert the dataset again"
            )
        whole = [name for name in file.columns if name not in broken]
        table = pa.concat_tables([part.select(whole) for part in parts])
        return Found(path, table, spans, file.kinds, {**file.absent, **broken})

    def _describe(self, path: Path) -> "_File":
        metadata = pq.read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
        kinds = dict(zip(schema.names, schema.types))
        if not pa.types.is_integer(kind := kinds.get("episode_index", pa.null())):
            found = f"holds {kind}, not integers" if "episode_index" in kinds else "is missing"
            raise ValueError(f"{path}: episode_index {found}; convert the dataset again")
        absent = {}
        for name in (*self._numbers, *self._texts):
            if name not in kinds:
                absent[name] = "its column is not in the file"
            elif name not in self._texts and not _is_numeric(kinds[name]):
                absent[name] = f"it holds {kinds[name]}, not numbers"
        names = dict.fromkeys((*self._numbers, *self._texts))
        columns = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
        place = columns.index("episode_index")
        limits = []
        for group in range(metadata.num_row_groups):
            found = metadata.row_group(group).column(place).statistics
            known = found is not None and found.has_min_max
            limits.append((found.min, found.max) if known else (-np.inf, np.inf))
        return _File(
            metadata,
            np.array(limits).reshape(-1, 2).T,
            kinds,
            [name for name in names if name not in absent],
            absent,
        )


class _File(NamedTuple):
    metadata: pq.FileMetaData
    limits: np.ndarray  # the lowest and highest episode of each row group [2, groups]
    kinds: dict[str, pa.DataType]
    columns: list[str]
    absent: dict[str, str]

    def read(self, path: Path, group: int) -> tuple[pa.Table, dict[str, str]]:
        """A row group, and the columns that are damaged with the reason."""
        with pq.ParquetFile(path, metadata=self.metadata) as file:
            try:
                return file.read_row_group(group, columns=self.columns), {}
            except (OSError, pa.ArrowException):  # one column must not cost the others
                table, broken = file.read_row_group(group, columns=["episode_index"]), {}
            for name in self.columns:
                try:
                    column = file.read_row_group(group, columns=[name])[name]
                except (OSError, pa.ArrowException) as error:
                    broken[name] = f"its column is damaged ({reason(path, error)})"
                else:
                    if name != "episode_index":
                        table = table.append_column(name, column)
        return table, broken


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns what pyarrow raises for a damaged file into a ValueError that names it."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"{path}: not a readable parquet file ({reason(path, error)}); copy it again"
        ) from error


@contextmanager
def of_file(path: Path) -> Iterator[None]:
    """Names the file in a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _is_numeric(kind: pa.DataType) -> bool:
    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif _is_list(kind):
            kind = kind.value_type
        else:
            types = pa.types
            return types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _as_array(column: pa.ChunkedArray, shape: tuple[int, ...] | None) -> np.ndarray:
    """A column as [n, *shape]; without a shape in the shape that the rows have."""
    rows, values, stored = len(column), column.combine_chunks(), []
    while True:
        if isinstance(values, pa.ExtensionArray):
            values = values.storage
            continue
        if values.null_count:
            raise ValueError("some of its values are missing")
        if not _is_list(values.type):
            break
        sizes = pc.min_max(pc.list_value_length(values)).as_py()
        if sizes["min"] != sizes["max"]:
            raise ValueError(f"its rows have {sizes['min']} to {sizes['max']} values, not the same")
        stored.append(sizes["min"] or 0)
        values = values.flatten()
    shape = tuple(stored) if shape is None else shape
    # One number per frame is a scalar to some writers, and has an axis to others.
    if [size for size in stored if size != 1] != [size for size in shape if size != 1]:
        raise ValueError(f"its rows are {stored}, but meta/info.json says {list(shape)}")
    # A copy, so that a few rows do not keep their whole row group in memory.
    return np.array(values.to_numpy(zero_copy_only=False)).reshape(rows, *shape)


class ParquetImages(ImageFrames):
    """A camera that is stored as a column of PNG or JPEG images.

    Args:
        root: the dataset's folder, which holds images that are not in the column itself.
        key: the column.
        spans: the rows.
        cache: of the rows of the last episodes, shared by a dataset.
    """

    def __init__(self, root: Path, key: str, spans: Sequence[Span], cache: LRU):
        super().__init__(f"{spans[0].path}: {key}", sum(span.count for span in spans))
        self._root, self._key, self._cache = root, key, cache
        self._places = [(span, at) for span in spans for at in range(span.count)]

    def encoded(self, number: int) -> bytes | Path:
        """One image as it is stored."""
        span, at = self._places[number]
        image = self._cache.get((self._key, span), lambda: self._column(span))[at]
        if isinstance(image, dict):
            path = (image.get("path") or "").replace("\\", "/")  # written on Windows
            if not image["bytes"] and path and (self._root / path).is_file():
                return self._root / path
            image = image["bytes"]
        if not image:
            raise ValueError(
                f"{self.name(number)} is not in the file; write the dataset again with its images"
            )
        return image

    def _column(self, span: Span) -> list[dict | bytes | None]:
        """Rows {bytes, path}, or bytes."""
        rows, start, stop = [], 0, span.first + span.count
        # Page by page: by default pyarrow reads the whole column of the row group at once.
        with (
            _named(span.path),
            pq.ParquetFile(span.path, buffer_size=1 << 20, pre_buffer=False) as file,
        ):
            for batch in file.iter_batches(_BATCH, row_groups=[span.group], columns=[self._key]):
                first, last = max(span.first - start, 0), min(stop - start, batch.num_rows)
                if first < last:
                    rows += batch.slice(first, last - first).column(self._key).to_pylist()
                start += batch.num_rows
                if start >= stop:
                    break
        return rows
