"""Shared by the formats: folders, ids, text files, text embeddings, HDF5 files in a pool."""

import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import h5py
import numpy as np

from data_pipelines.episode import reason
from data_pipelines.frames import Frames
from data_pipelines.lru import LRU

Visit = tuple[Path, list[str], list[str]]
_SKIPPED = "lost+found"  # at the root of a file system, readable by root only

# `launch.record` writes the one when it starts, and the other when it ends.
UNFINISHED, MANIFEST = "unfinished", "recording.json"


def walk(path: Path) -> Iterator[Visit]:
    """Each folder with the sorted names of its folders and files; hidden ones are left out.

    As with `os.walk`, folders that the caller removes from the first list are not entered. Links
    are followed, for datasets spread over disks, but no folder is entered twice.

    Raises:
        OSError: if a folder cannot be read, as its episodes would be missing silently.
    """
    entered = set()
    for folder, folders, files in os.walk(path, onerror=_raise, followlinks=True):
        status = os.stat(folder)
        if (place := (status.st_dev, status.st_ino)) in entered:
            folders.clear()
            continue
        entered.add(place)
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n != _SKIPPED)
        yield Path(folder), folders, sorted(name for name in files if not name.startswith("."))


def glance(path: Path, most: int = 200) -> Iterator[Visit]:
    """The first folders of `walk`: enough to recognise a dataset of any size."""
    return islice(walk(path), most)


def _raise(error: OSError) -> None:
    if not isinstance(error, NotADirectoryError):  # a file has no folders
        raise error


def check_finished(path: Path) -> None:
    """Raises ValueError if the folder is a recording that was interrupted."""
    if (path / UNFINISHED).exists() and not (path / MANIFEST).exists():
        raise ValueError(f"{path} is an unfinished recording; run its command again to resume it")


def repeat_marks(names: Iterable[str]) -> dict[int, str]:
    """What makes ids unique: index of each name that came before -> " #2", " #3", ..."""
    seen: Counter[str] = Counter()
    marks = {}
    for index, name in enumerate(names):
        seen[name] += 1
        if seen[name] > 1:
            marks[index] = f" #{seen[name]}"
    return marks


def read_text(path: Path) -> str:
    """The stripped text of a UTF-8 file; ValueError if it cannot be read or decoded."""
    try:
        return decode_text(path.read_bytes(), path).strip()
    except OSError as error:
        raise ValueError(f"{path}: the text cannot be read ({error.strerror})") from error


def decode_text(data: bytes, where: object) -> str:
    """Decodes UTF-8, with or without a byte-order mark.

    Args:
        data: the encoded text.
        where: the file, for messages.

    Raises:
        ValueError: if it has another encoding. No other is tried, because a wrong guess would go
            unnoticed into training.
    """
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}); convert "
            "it, for example with iconv -f latin1 -t utf-8"
        ) from None


def without_padding(embedding: np.ndarray) -> np.ndarray:
    """A text embedding [n, d] without the zero rows at its end."""
    filled = np.flatnonzero(embedding.any(axis=1))
    return embedding[: filled[-1] + 1 if len(filled) else 0]


FLIPS = {"none": np.s_[:], "vertical": np.s_[:, ::-1], "rotate": np.s_[:, ::-1, ::-1]}


class Hdf5Frames(Frames):
    """Frames of an array in an HDF5 file, uint8 [n, h, w, 3].

    Args:
        path: the file.
        key: the array's path in it.
        shape: of the array.
        flip: a key of `FLIPS`, applied to every frame.
        pool: shared by the files of a dataset.
    """

    def __init__(self, path: Path, key: str, shape: tuple[int, ...], flip: str, pool: "Hdf5Pool"):
        super().__init__(path, shape[0])
        self._key, self._shape = key, shape
        self._flip, self._pool = flip, pool

    def _read(self, numbers: list[int]) -> np.ndarray:
        frames = np.empty((len(numbers), *self._shape[1:]), np.uint8)
        with self._pool.open(self.where) as file:
            array = file[self._key]
            for place, number in enumerate(numbers):
                array.read_direct(frames, np.s_[number], np.s_[place])
        return np.ascontiguousarray(frames[FLIPS[self._flip]])


class Hdf5Pool:
    """A bounded number of open files, used by one thread at a time (HDF5 itself allows no more).

    Pickling keeps the limit and drops the files.
    """

    def __init__(self, max_open: int = 16):
        self._max_open = max_open
        self._lock = threading.RLock()
        self._files = LRU[Path, h5py.File](max_open, h5py.File.close)

    def __reduce__(self):
        return Hdf5Pool, (self._max_open,)

    @contextmanager
    def open(self, path: Path) -> Iterator[h5py.File]:
        """The file, for use inside the `with`; a fault there is a ValueError, too."""
        # A compressed chunk holds several frames. With a large cache it is unpacked once, not for
        # each of them.
        with self._lock, named_faults(path):
            yield self._files.get(path, lambda: h5py.File(path, "r", rdcc_nbytes=16 * 2**20))


@contextmanager
def named_faults(path: Path) -> Iterator[None]:
    """Turns what h5py raises for a missing or damaged file into a ValueError that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{path}: the file is missing; copy it again") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} holds text that is not UTF-8 ({error})") from error
    except (OSError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"{path}: not a readable HDF5 file ({reason(path, error)}); copy or write it again"
        ) from error
