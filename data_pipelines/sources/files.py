"""What the formats share: folders, text files, HDF5 files that stay open in a pool."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import h5py
import numpy as np

from data_pipelines.episode import reason
from data_pipelines.frames import Frames
from data_pipelines.lru import LRU

Visit = tuple[Path, list[str], list[str]]
_NOT_OURS = "lost+found"  # the file system's, at the root of a disk; only root may read it

# A recording (`launch.record`) has the one from its beginning, the other at its end.
UNFINISHED, MANIFEST = "unfinished", "recording.json"


def walk(path: Path) -> Iterator[Visit]:
    """Each folder with the sorted names of its folders and of its files; hidden ones left out.

    As with `os.walk`, folders that the caller removes from the first list are not entered. Links
    are followed, for datasets spread over disks; a folder that two lead to is entered once.

    Raises:
        OSError: if a folder cannot be read; its episodes would be missing without a word.
    """
    entered = set()
    for folder, folders, files in os.walk(path, onerror=_raise, followlinks=True):
        status = os.stat(folder)
        if (place := (status.st_dev, status.st_ino)) in entered:
            folders.clear()
            continue
        entered.add(place)
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n != _NOT_OURS)
        yield Path(folder), folders, sorted(name for name in files if not name.startswith("."))


def glance(path: Path, most: int = 200) -> Iterator[Visit]:
    """The first folders of `walk`: enough to recognise a dataset, however large it is."""
    return islice(walk(path), most)


def _raise(error: OSError) -> None:
    if not isinstance(error, NotADirectoryError):  # a file has no folders
        raise error


def check_finished(path: Path) -> None:
    """Raises ValueError if the folder is a recording that was stopped before its end."""
    if (path / UNFINISHED).exists() and not (path / MANIFEST).exists():
        raise ValueError(
            f"{path} is a recording that is not finished; run the command that began it again, "
            "and it continues where it stopped"
        )


# Text files: UTF-8 or an error, because nobody would see a wrong guess before it is trained on.


def read_text(path: Path) -> str:
    """The stripped text of a file.

    Raises:
        ValueError: if the file is missing, cannot be read, or is not UTF-8.
    """
    try:
        return decode_text(path.read_bytes(), path).strip()
    except FileNotFoundError:
        raise ValueError(f"{path}: the text is missing; write it, in UTF-8") from None
    except OSError as error:
        raise ValueError(f"{path}: the text cannot be read ({error.strerror})") from error


def decode_text(data: bytes, where: object) -> str:
    """Decodes UTF-8, with or without a byte-order mark.

    Args:
        data: the bytes.
        where: the file, for the message.

    Raises:
        ValueError: if it is another encoding.
    """
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}); convert "
            "it, for example with iconv -f latin1 -t utf-8"
        ) from None


# How the pictures of a file are turned.
FLIPS = {
    "none": np.s_[:],
    "vertical": np.s_[:, ::-1],
    "rotate": np.s_[:, ::-1, ::-1],
}


class Hdf5Frames(Frames):
    """Frames of an array in an HDF5 file, uint8 [n, h, w, 3].

    Args:
        path: the file.
        key: the array's path in it.
        shape: of the array.
        flip: a key of `FLIPS`, done to every frame.
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
        """The file, for use inside the `with`.

        Raises:
            ValueError: if it cannot be read, also where that shows only inside the `with`.
        """
        # The cache keeps compressed chunks of several frames, otherwise unpacked for each frame.
        with self._lock, named_faults(path):
            yield self._files.get(path, lambda: h5py.File(path, "r", rdcc_nbytes=16 * 2**20))


@contextmanager
def named_faults(path: Path) -> Iterator[None]:
    """What h5py raises where a file is damaged becomes a ValueError that names the file."""
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
