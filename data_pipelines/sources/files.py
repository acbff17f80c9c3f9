"""Walk through a dataset's folders, in an order that no file system decides."""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import h5py
import numpy as np

from data_pipelines.episode import reason

_NOT_OURS = "lost+found"  # the file system's, at the root of a disk; only root may read it
Visit = tuple[Path, list[str], list[str]]


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


# Tell a recording that is still being made (`mvjax.evaluation.record`) from a finished dataset.


MANIFEST = "recording.json"  # written last
UNFINISHED = "unfinished"  # holds the parts until then


def check_finished(path: Path) -> None:
    """Raise ValueError if the folder is a recording that was stopped before its end."""
    if (path / UNFINISHED).exists() and not (path / MANIFEST).exists():
        raise ValueError(
            f"{path} is a recording that is not finished; give the command that began it again "
            "(python -m mvjax.evaluation.record --out ...) and it goes on where it stopped"
        )


# Open HDF5 files, shared safely, and pictures that stay in them until they are asked for.


FLIPS = {
    "none": np.s_[:],
    "vertical": np.s_[:, ::-1],
    "rotate": np.s_[:, ::-1, ::-1],
}


class Hdf5Pool:
    """A bounded number of open files, used by one thread at a time (HDF5 itself allows no more).

    Pickling keeps the limit and drops the files.
    """

    def __init__(self, max_open: int = 16):
        self._max_open = max_open
        self._lock = threading.RLock()
        self._files: OrderedDict[Path, h5py.File] = OrderedDict()

    def __reduce__(self):
        return Hdf5Pool, (self._max_open,)

    @contextmanager
    def open(self, path: Path) -> Iterator[h5py.File]:
        """The file, for use inside the `with`.

        Raises:
            ValueError: if it cannot be read, also where that shows only inside the `with`.
        """
        with self._lock, named_faults(path):
            file = self._files.pop(path, None) or _open(path)
            self._files[path] = file  # most recent last
            while len(self._files) > self._max_open:
                self._files.popitem(last=False)[1].close()
            yield file


@contextmanager
def named_faults(path: Path) -> Iterator[None]:
    """What h5py raises where a file is damaged becomes a ValueError that names the file."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{path}: the file is missing; copy it again") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} holds text that is not UTF-8 ({error}); write it as UTF-8"
        ) from error
    except (OSError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"{path}: not a readable HDF5 file ({reason(path, error)}); copy or write it again"
        ) from error


def _open(path: Path) -> h5py.File:
    # The cache keeps compressed chunks of several frames, which are otherwise unpacked for each.
    return h5py.File(path, "r", rdcc_nbytes=16 * 2**20)


class Hdf5Frames:
    """A `FrameReader` over an array of a file, uint8 [n, h, w, 3].

    Args:
        path: the file.
        key: the array's path in it.
        shape: of the array.
        flip: a key of `FLIPS`, done to every picture.
        pool: shared by the files of a dataset.
    """

    def __init__(
        self,
        path: Path,
        key: str,
        shape: tuple[int, ...],
        flip: str = "none",
        pool: Hdf5Pool | None = None,
    ):
        self.path = path
        self.key = key
        self.shape = shape
        self._flip = flip
        self._pool = pool or Hdf5Pool(max_open=1)

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Frames at `indices` (any order, repeats allowed): uint8 [k, h, w, 3]."""
        indices = np.asarray(indices, np.int64)
        if not len(indices):
            raise ValueError(f"{self.path}: no frame indices were given")
        bad = indices[(indices < 0) | (indices >= len(self))]
        if len(bad):
            raise IndexError(f"{self.path}: frame {bad[0]} asked for, but there are {len(self)}")
        frames = np.empty((len(indices), *self.shape[1:]), np.uint8)
        with self._pool.open(self.path) as file:
            array = file[self.key]
            for i, frame in enumerate(indices):
                array.read_direct(frames, np.s_[int(frame)], np.s_[i])
        return np.ascontiguousarray(frames[FLIPS[self._flip]])


# Text files of datasets: UTF-8 or nothing, because a guess would be trained on unseen.


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
    """Decode UTF-8, with or without a byte-order mark.

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
