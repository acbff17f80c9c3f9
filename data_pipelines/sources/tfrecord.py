"""TFRecord files without TensorFlow: random access by an index of offsets, checksums verified.

A record is its length (uint64), the length's checksum, the payload, and the payload's checksum, all
little-endian; a checksum is a "masked" CRC32C (tensorflow/core/lib/io/record_writer.h).
"""

import os
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np

from data_pipelines.unreadable import reason

_HEADER, _FOOTER = 12, 4
_MASK_DELTA = 0xA282EAD8


@dataclass(frozen=True)
class TFRecordIndex:
    """Where the whole records of a file are.

    Attributes:
        starts: int64 [n], offsets of the payloads.
        sizes: int64 [n], their lengths in bytes.
        fault: what stops the file from being read further, or "" if it was read to its end.
    """

    starts: np.ndarray
    sizes: np.ndarray
    fault: str


def read_index(path: Path) -> TFRecordIndex:
    """Find the records of a file by going from header to header; payloads are not read."""
    starts, sizes, at, fault = [], [], 0, ""
    with open(path, "rb", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        while at < end and not fault:
            file.seek(at)
            header = file.read(_HEADER)
            size = int.from_bytes(header[:8], "little")
            if len(header) == _HEADER and not _intact(header[:8], header[8:]):
                fault = reason(path, f"the header of record {len(starts)} is damaged")
            elif len(header) < _HEADER or at + _HEADER + size + _FOOTER > end:
                fault = f"the file ends within record {len(starts)}"
            else:
                starts.append(at + _HEADER)
                sizes.append(size)
                at += _HEADER + size + _FOOTER
    return TFRecordIndex(np.array(starts, np.int64), np.array(sizes, np.int64), fault)


def read_record(path: Path, index: TFRecordIndex, number: int) -> bytes:
    """One payload.

    Raises:
        ValueError: if the file has no such record or its checksum is wrong.
    """
    if number >= len(index.starts):
        reason = index.fault or f"the file has {len(index.starts)} records"
        raise ValueError(f"{path}: no record {number}, {reason}; copy the file again")
    start, size = int(index.starts[number]), int(index.sizes[number])
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        payload, checksum = file.read(size), file.read(_FOOTER)
    if len(payload) < size or not _intact(payload, checksum):
        raise ValueError(f"{path}: record {number} is damaged (checksum); copy the file again")
    return payload


def _intact(data: bytes, checksum: bytes) -> bool:
    crc = google_crc32c.value(data)
    masked = (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF
    return masked == int.from_bytes(checksum, "little")
