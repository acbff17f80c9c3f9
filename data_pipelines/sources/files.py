"""What the formats share: folders and text files, readers of stored frames, open HDF5 files.

A camera of an `Episode` is a `FrameReader`. Readers of single frames derive from `Frames` here,
those whose frames are JPEG or PNG pictures from `Pictures`. They keep names and numbers only, so
that they can be pickled; open files stay in a pool, which pickling empties.
"""

import io
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import h5py
import numpy as np
from PIL import Image, ImageOps

from data_pipelines.episode import reason
from data_pipelines.lru import LRU

# Folders.

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


# Frames that stay on disk until they are asked for.


class Frames(ABC):
    """Base of the `FrameReader`s: a subclass reads frames in increasing order, each once.

    Args:
        where: the file or folder, for messages.
        length: the number of frames.
    """

    def __init__(self, where: object, length: int):
        self.where = where
        self._length = length

    def __len__(self) -> int:
        return self._length

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Frames at `indices` (any order, repeats allowed): uint8 [k, h, w, 3].

        Raises:
            IndexError: for a frame that does not exist.
            ValueError: for no indices, or frames that are damaged or differ in size.
        """
        indices = np.asarray(indices, np.int64)
        if not len(indices):
            raise ValueError(f"{self.where}: no frame indices were given")
        bad = indices[(indices < 0) | (indices >= len(self))]
        if len(bad):
            raise IndexError(f"{self.where}: frame {bad[0]} asked for, but there are {len(self)}")
        unique, places = np.unique(indices, return_inverse=True)
        frames = self._read(unique.tolist())
        return frames if np.array_equal(unique, indices) else frames[places]

    @abstractmethod
    def _read(self, numbers: list[int]) -> np.ndarray:
        """Frames at increasing numbers, all of which exist: uint8 [k, h, w, 3]."""


class Pictures(Frames):
    """Base of the readers of frames that are stored as JPEG or PNG pictures."""

    upright = False  # whether pictures are turned as their EXIF tag says

    @abstractmethod
    def encoded(self, number: int) -> bytes | Path:
        """A picture as it is stored, or the file that holds it."""

    def name(self, number: int) -> str:
        """Of a picture, for messages."""
        return f"{self.where}: picture {number}"

    def _read(self, numbers: list[int]) -> np.ndarray:
        frames = [decode_picture(self.encoded(n), self.name(n), self.upright) for n in numbers]
        if len(sizes := {frame.shape for frame in frames}) > 1:
            raise ValueError(f"{self.where}: the pictures have different sizes, {sorted(sizes)}")
        return np.stack(frames)


def decode_picture(picture: bytes | Path, where: object, upright: bool = False) -> np.ndarray:
    """Decodes a picture of any kind that Pillow knows: uint8 [h, w, 3].

    Args:
        picture: the encoded bytes, or the file.
        where: for messages.
        upright: turn it as its EXIF tag says.

    Raises:
        ValueError: if it is damaged, or has more than 8 bits, which Pillow would cut off.
    """
    try:
        with Image.open(picture if isinstance(picture, Path) else io.BytesIO(picture)) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError("it has more than 8 bits; depth is not read")
            return np.asarray((ImageOps.exif_transpose(image) if upright else image).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's
        raise ValueError(f"{where}: not a readable picture ({error}); copy it again") from error


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
