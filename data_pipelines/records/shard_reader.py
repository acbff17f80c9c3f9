"""Random access to the records of several ArrayRecord files, of which some may be damaged.

Every record has a checksum. What is damaged spoils only itself: one record, or one file whose end
is missing.
"""

import bisect
import itertools
import threading
from collections.abc import Sequence
from pathlib import Path

from array_record.python import array_record_module

# Records are read one by one, in any order: reading ahead would be wasted.
_OPTIONS = "readahead_buffer_size:0"
_BUFFER = 1 << 15


class DamagedRecord(ValueError):
    """A record's bytes are not what was written."""


class ShardReader:
    """The records of all files, counted through; safe to use from several threads."""

    def __init__(self, shards: Sequence[Path], counts: Sequence[int]):
        """Opens nothing yet.

        Args:
            shards: the files.
            counts: records in each; the files are not asked, since a damaged one does not know.
        """
        self._shards = list(shards)
        self._ends = list(itertools.accumulate(counts))
        self._readers: dict[int, array_record_module.ArrayRecordReader] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, index: int) -> bytes:
        """One record.

        Raises:
            DamagedRecord: if it cannot be read; the others still can.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} asked for, but there are {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        position = index - (self._ends[shard - 1] if shard else 0)
        try:
            return self._reader(shard).read([position])[0]
        except Exception as error:  # the library's types differ between versions
            path = self._shards[shard]
            raise DamagedRecord(
                f"record {position} of {path} is damaged ({_first_line(error)}); delete that file "
                "and the .npz beside it, and run the encoding job again"
            ) from error

    def _reader(self, shard: int) -> array_record_module.ArrayRecordReader:
        with self._lock:
            if shard not in self._readers:
                path, count = self._shards[shard], self._ends[shard]
                count -= self._ends[shard - 1] if shard else 0
                if not path.exists():
                    raise FileNotFoundError("the file is missing")
                reader = array_record_module.ArrayRecordReader(
                    str(path), options=_OPTIONS, file_reader_buffer_size=_BUFFER
                )
                found = reader.num_records()
                if found != count:
                    raise ValueError(f"the file holds {found} records instead of {count}")
                self._readers[shard] = reader  # only a sound one: a network drive may recover
            return self._readers[shard]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
