"""Folders as `tfds` prepares them: which files a split has, and its records by number.

dataset_info.json                              file format, splits, records per file
features.json                                  names, shapes and dtypes
<name>-<split>.tfrecord-00000-of-00002         or .array_record-...: one episode per record
"""

import json
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from data_pipelines.sources.tfrecord import TFRecordIndex, read_index, read_record

INFO, FEATURES = "dataset_info.json", "features.json"
FORMATS = ("tfrecord", "array_record")
_VERSION = "[0-9]*.[0-9]*.[0-9]*"
_READ_AT_ONCE = 16 * 2**20  # about an episode; smaller buffers take four times as long
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


@dataclass(frozen=True)
class RecordFiles:
    """The records of one split; safe to use from several threads.

    Attributes:
        files: the split's files, in order.
        lengths: the number of records in each.
    """

    files: tuple[Path, ...]
    lengths: tuple[int, ...]
    _indices: dict[int, TFRecordIndex] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(self.lengths)

    def place(self, number: int) -> tuple[int, int]:
        """The file of a record, and the record's number within it."""
        ends = list(accumulate(self.lengths))
        shard = int(np.searchsorted(ends, number, side="right"))
        return shard, number - (ends[shard] - self.lengths[shard])

    def read(self, shard: int, number: int) -> bytes:
        """A record of a file.

        Raises:
            ValueError: if the file is missing or damaged there.
        """
        path = self.files[shard]
        if not path.is_file():
            raise ValueError(f"{path} is missing; copy it again")
        if ".tfrecord" in path.name:
            if shard not in self._indices:
                self._indices[shard] = read_index(path)
            return read_record(path, self._indices[shard], number)
        try:
            # Opened for each read (half a millisecond): datasets have more files than may be open.
            reader = array_record_module.ArrayRecordReader(
                str(path),
                "readahead_buffer_size:0,max_parallelism:0",
                file_reader_buffer_size=_READ_AT_ONCE,
            )
            (data,) = reader.read([number])
            reader.close()
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"{path}: record {number} cannot be read ({error}); copy the file again"
            ) from error
        return data


@dataclass(frozen=True)
class PreparedFolder:
    """A folder and what its `dataset_info.json` says.

    Attributes:
        path: the version's folder.
        info: the content of `dataset_info.json`.
    """

    path: Path
    info: dict

    @property
    def name(self) -> str:
        """The dataset's name."""
        return self.info["name"]

    @property
    def file_format(self) -> str:
        """How records are kept: "tfrecord", "array_record", or another of TFDS's ways."""
        return self.info.get("fileFormat") or "tfrecord"

    @property
    def splits(self) -> dict[str, RecordFiles]:
        """The splits by name."""
        return {row["name"]: self._files(row) for row in self.info["splits"]}

    def split(self, name: str) -> RecordFiles:
        """One split.

        Raises:
            ValueError: if there is none of that name; says which there are.
        """
        if name not in self.splits:
            raise ValueError(
                f"{self.path} has no split {name!r}, but {', '.join(self.splits)}; set "
                "dataset.options.split"
            )
        return self.splits[name]

    def _files(self, row: dict) -> RecordFiles:
        lengths = tuple(int(length) for length in row["shardLengths"])
        files = []
        for shard in range(len(lengths)):
            fields = {"DATASET": self.name, "SPLIT": row["name"], "FILEFORMAT": self.file_format}
            fields |= {"SHARD_INDEX": f"{shard:05d}", "NUM_SHARDS": f"{len(lengths):05d}"}
            fields["SHARD_X_OF_Y"] = f"{shard:05d}-of-{len(lengths):05d}"
            file = row.get("filepathTemplate") or _TEMPLATE
            for key, value in fields.items():
                file = file.replace("{" + key + "}", value)
            files.append(self.path / Path(file).name)
        return RecordFiles(tuple(files), lengths)


def version_folders(path: Path) -> list[Path]:
    """The path itself if it is a prepared folder, or those directly below it."""
    direct = (path / INFO).is_file()
    folders = [path] if direct else [file.parent for file in path.glob(f"{_VERSION}/{INFO}")]
    # Other libraries write a dataset_info.json too.
    return sorted(
        folder
        for folder in folders
        if (folder / FEATURES).is_file() or any(_records(folder, format) for format in FORMATS)
    )


def open_folder(path: Path) -> PreparedFolder:
    """Read what a prepared folder says about itself.

    Args:
        path: `<name>/<version>`, or `<name>` if it holds one version.

    Raises:
        ValueError: if it is no such folder, holds several, or is of another file format.
    """
    folders = version_folders(Path(path))
    if len(folders) != 1:
        found = f"several versions, {[f.name for f in folders]}" if folders else "none"
        raise ValueError(
            f"{path} should be one folder prepared by TFDS, with {INFO} and {FEATURES}, but there "
            f"is {found}; give <name>/<version>"
        )
    try:
        info = json.loads((folders[0] / INFO).read_text(encoding="utf-8-sig"))
        folder = PreparedFolder(folders[0], info)
        _ = folder.name, folder.splits
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{folders[0] / INFO} is damaged ({type(error).__name__}: {error}); copy it again"
        ) from error
    if folder.file_format not in FORMATS:
        raise ValueError(
            f"{folder.path} is kept as {folder.file_format}; tfrecord and array_record can be "
            "read, and `tfds convert_format` (with TensorFlow) converts to them"
        )
    return folder


def _records(folder: Path, format: str) -> bool:
    return any(folder.glob(f"*.{format}-*-of-*"))
