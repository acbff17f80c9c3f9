"""Open HDF5 files, shared safely, and pictures that stay in them until they are asked for."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from data_pipelines.unreadable import reason

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
