"""The records of a split of an RLDS dataset, in TFRecord or ArrayRecord files.

TFDS needs TensorFlow for TFRecord files, so they are read here: an index of offsets gives random
access, and checksums are verified.
"""

import os
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path

import google_crc32c
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from data_pipelines.episode import reason


@dataclass(frozen=True)
class RecordFiles:
    """The records of one split, in TFRecord or ArrayRecord files; safe to use from threads."""

    files: tuple[Path, ...]
    ends: tuple[int, ...]  # the number of records up to the end of each file
    _indices: dict[int, tuple[np.ndarray, str]] = field(default_factory=dict)
    _counts: dict[int, int] = field(default_factory=dict)  # of records, in ArrayRecord files

    def place(self, number: int) -> tuple[int, int]:
        """The file of a record, and the record's number within it."""
        shard = bisect_right(self.ends, number)
        return shard, number - (self.ends[shard - 1] if shard else 0)

    def finding(self, shard: int) -> str:
        """How the number of records in a file differs from what is listed; "" if it does not."""
        listed = self.ends[shard] - (self.ends[shard - 1] if shard else 0)
        held = self._held(shard)
        if held <= listed:  # a missing one is an error where it is read
            return ""
        return (
            f"{self.files[shard].name} holds {held} records, but dataset_info.json lists {listed}; "
            f"the first {listed} are taken"
        )

    def _index(self, shard: int) -> tuple[np.ndarray, str]:
        if shard not in self._indices:
            self._indices[shard] = read_index(self.files[shard])
        return self._indices[shard]

    def _held(self, shard: int) -> int:
        if ".tfrecord" in self.files[shard].name:
            return len(self._index(shard)[0])
        if shard not in self._counts:
            reader = ArrayRecordReader(str(self.files[shard]))
            self._counts[shard] = reader.num_records()
            reader.close()
        return self._counts[shard]

    def read(self, shard: int, number: int) -> bytes:
        """A record of a file; ValueError if the file is missing or damaged there."""
        path = self.files[shard]
        if not path.is_file():
            raise ValueError(f"{path} is missing; copy it again")
        if ".tfrecord" in path.name:
            return read_record(path, self._index(shard), number)
        try:
            # Opened for each read (0.5 ms), as datasets have more files than may be open at once.
            # The buffer holds about an episode; with a smaller one a read takes four times as long.
            options = "readahead_buffer_size:0,max_parallelism:0"
            reader = ArrayRecordReader(str(path), options, file_reader_buffer_size=16 * 2**20)
            (data,) = reader.read([number])
            reader.close()
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"{path}: record {number} cannot be read ({error}); copy the file again"
            ) from error
        return data


# A record of a TFRecord file is its length (uint64), the length's checksum, the payload, and the
# payload's checksum, all little-endian (tensorflow/core/lib/io/record_writer.h).
_HEADER, _FOOTER = 12, 4


def read_index(path: Path) -> tuple[np.ndarray, str]:
    """Finds the records of a TFRecord file by their headers; payloads are not read.

    Returns:
        Offset and length of each payload in bytes, int64 [n, 2]; and why no more records can be
        found, "" at the regular end.
    """
    places, at, fault = [], 0, ""
    with open(path, "rb", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        while at < end and not fault:
            header = os.pread(file.fileno(), _HEADER, at)
            start, size = at + _HEADER, int.from_bytes(header[:8], "little")
            if len(header) == _HEADER and not _intact(header[:8], header[8:]):
                fault = reason(path, f"the header of record {len(places)} is damaged")
            elif start + size + _FOOTER > end:  # the header itself may be truncated, too
                fault = f"the file ends within record {len(places)}"
            else:
                places.append((start, size))
                at = start + size + _FOOTER
    return np.array(places, np.int64).reshape(-1, 2), fault


def read_record(path: Path, index: tuple[np.ndarray, str], number: int) -> bytes:
    """One payload; ValueError if the file has no such record or its checksum is wrong."""
    places, fault = index
    if number >= len(places):
        fault = fault or f"the file has {len(places)} records"
        raise ValueError(f"{path}: no record {number}, {fault}; copy the file again")
    start, size = places[number].tolist()
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        payload, checksum = file.read(size), file.read(_FOOTER)
    if len(payload) < size or not _intact(payload, checksum):
        raise ValueError(f"{path}: record {number} is damaged (checksum); copy the file again")
    return payload


def _intact(data: bytes, checksum: bytes) -> bool:
    """Compares with a "masked" CRC32C: rotated, plus a constant."""
    crc = google_crc32c.value(data)
    masked = (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
    return masked == int.from_bytes(checksum, "little")
