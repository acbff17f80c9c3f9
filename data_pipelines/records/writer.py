"""Writing a records folder: files that appear under their name only when they are complete."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from data_pipelines.records.codec import encode_record


class RecordWriter:
    """Writes one ArrayRecord file that appears under its name only when it is complete."""

    def __init__(self, path: Path):
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        # group_size 1 makes every record addressable by its own index.
        self._writer = array_record_module.ArrayRecordWriter(
            str(self._partial), "group_size:1,uncompressed"
        )

    def write(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Appends one record."""
        self._writer.write(encode_record(arrays))

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        self._writer.close()
        if error_type is None:
            os.replace(self._partial, self.path)
        else:
            self._partial.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """Writes JSON so that `path` never holds half a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1))
    os.replace(partial, path)


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """Writes an uncompressed .npz so that `path` never holds half a file."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    os.replace(partial, path)


def write_texts(path: Path, instructions: Sequence[str], embeddings: np.ndarray) -> None:
    """Stores instruction embeddings float32 [n, length, dim] without their trailing zero rows."""
    used = np.any(embeddings != 0, axis=-1)
    lengths = np.where(used.any(1), used.shape[1] - np.argmax(used[:, ::-1], axis=1), 0)
    write_npz(
        path,
        instructions=np.asarray(instructions, dtype=np.str_),
        rows=np.concatenate([text[:n] for text, n in zip(embeddings, lengths)]).astype(np.float32),
        lengths=lengths.astype(np.int64),
        padded_length=np.int64(embeddings.shape[1]),
    )
