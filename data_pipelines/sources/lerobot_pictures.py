"""Cameras that are stored as single encoded pictures in the rows of a parquet file."""

import io
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from data_pipelines.sources.lerobot_rows import Span
from data_pipelines.unreadable import reason

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
