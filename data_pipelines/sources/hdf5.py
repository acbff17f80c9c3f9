"""HDF5 files of episodes: open files in a pool, their arrays, and the streams these make.

Arrays and groups may be links into other files. An array is always read by its path in the file
that was opened: HDF5 follows the links, and its path in the file they lead to may be another one.
"""

import json
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data_pipelines.episode import reason
from data_pipelines.frames import Frames, ImageFrames
from data_pipelines.lru import LRU
from data_pipelines.sources import pictures

FLIPS = {"none": np.s_[:], "vertical": np.s_[:, ::-1], "rotate": np.s_[:, ::-1, ::-1]}
_FAULTS = (OSError, KeyError, RuntimeError)  # what h5py raises for damage and for broken links
_AGAIN = "copy or write it again"
_REMEDIES = (
    (
        "unable to lock file",
        "if no other program writes it, its file system has no locks: set "
        "HDF5_USE_FILE_LOCKING=FALSE",
    ),
    ("already open for write", "its writer did not close it: wait, or run h5clear -s on a copy"),
)
_DEEPEST = 12  # groups within groups


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
    except _FAULTS as error:
        if placeholder := reason(path, ""):
            raise ValueError(f"{path}: {placeholder}") from error
        text = reason(path, error)
        remedy = next((remedy for words, remedy in _REMEDIES if words in text), _AGAIN)
        raise ValueError(f"{path}: not a readable HDF5 file ({text}); {remedy}") from error


class Hdf5Frames(Frames):
    """Frames of an array of pictures in an HDF5 file.

    Args:
        path: the file.
        key: the array's path in it.
        length: the number of pictures.
        pool: shared by the files of a dataset.
        order: the array's `pictures.axes`.
        flip: a key of `FLIPS`, applied to every frame.
        bgr: whether blue is stored first.
    """

    def __init__(
        self,
        path: Path,
        key: str,
        length: int,
        pool: Hdf5Pool,
        order: str = "hwc",
        flip: str = "none",
        bgr: bool = False,
    ):
        super().__init__(path, length)
        self._key, self._pool = key, pool
        self._order, self._flip, self._bgr = order, flip, bgr

    def _read(self, numbers: list[int]) -> np.ndarray:
        with self._pool.open(self.where) as file:
            array = file[self._key]
            frames = np.empty((len(numbers), *array.shape[1:]), np.uint8)
            for place, number in enumerate(numbers):
                array.read_direct(frames, np.s_[number], np.s_[place])
        return _turned(pictures.rgb(frames, self._order), self._flip, self._bgr)


class Hdf5Images(ImageFrames):
    """Frames of an array of JPEG, PNG or WebP files; the arguments are those of `Hdf5Frames`."""

    def __init__(
        self,
        path: Path,
        key: str,
        length: int,
        pool: Hdf5Pool,
        flip: str = "none",
        bgr: bool = False,
    ):
        super().__init__(path, length)
        self._key, self._pool = key, pool
        self._flip, self._bgr = flip, bgr

    def encoded(self, number: int) -> bytes:
        """One image as it is stored, perhaps with padding behind it."""
        with self._pool.open(self.where) as file:
            some = file[self._key][number : number + 1]
        # Of one element, NumPy would drop the zeros at the end, which may belong to the image.
        return _bytes(some[0] if some.dtype.hasobject else some)

    def name(self, number: int) -> str:
        """The file and the image in it."""
        return f"{self.where}: image {number} of {self._key}"

    def _read(self, numbers: list[int]) -> np.ndarray:
        return _turned(super()._read(numbers), self._flip, self._bgr)


def _turned(frames: np.ndarray, flip: str, bgr: bool) -> np.ndarray:
    frames = frames[FLIPS[flip]]
    return np.ascontiguousarray(frames[..., ::-1] if bgr else frames)


def _bytes(value: np.ndarray | np.void | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.tobytes()


def place(node: h5py.Group | h5py.Dataset) -> tuple[str, int]:
    """What is equal for two names of one group or array: the real file, and the address in it."""
    return os.path.realpath(node.file.filename), h5py.h5o.get_info(node.id).addr


def follow(group: h5py.Group, name: str) -> h5py.Group | h5py.Dataset:
    """A member of a group; ValueError if its link leads nowhere."""
    try:
        return group[name]
    except _FAULTS as error:
        link = group.get(name, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            where = f"to {link.path} in the file {link.filename}"
        else:
            where = f"to {link.path}" if isinstance(link, h5py.SoftLink) else "to a damaged place"
        raise ValueError(
            f"its link, {where}, leads nowhere; fetch the file or link again"
        ) from error


def arrays(group: h5py.Group) -> tuple[dict[str, h5py.Dataset], dict[str, str]]:
    """All arrays below a group by their paths, and why the others cannot be reached."""
    found: dict[str, h5py.Dataset] = {}
    left_out: dict[str, str] = {}
    for path, node in _members(group, "", [place(group)]):
        if isinstance(node, str):
            left_out[path] = node
        else:
            found[path] = node
    return found, left_out


def _members(
    group: h5py.Group, prefix: str, around: list[tuple[str, int]]
) -> Iterator[tuple[str, h5py.Dataset | str]]:
    """The arrays below a group, or why there is none; `around` are the groups that hold it."""
    for name in sorted(group):
        path = prefix + name
        try:
            node = follow(group, name)
        except ValueError as error:
            yield path, str(error)
            continue
        if isinstance(node, h5py.Dataset):
            yield path, node
        elif isinstance(node, h5py.Group):
            if (here := place(node)) in around or len(around) > _DEEPEST:
                yield path, "its link leads back to a group around it"
            else:
                yield from _members(node, f"{path}/", [*around, here])


def values(
    array: h5py.Dataset,
    where: tuple[Path, str, Hdf5Pool],
    steps: int,
    flip: str = "none",
    bgr: bool = False,
) -> np.ndarray | Frames:
    """The values of a stream with one per step: numbers, or the frames of a camera.

    Args:
        array: the array.
        where: the file that was opened, the array's path in it, and the pool to read frames from.
        steps: the length that it should have.
        flip, bgr: see `Hdf5Frames`.

    Raises:
        ValueError: if it is no stream; the text says why.
    """
    if array.shape is None or not array.shape:
        raise ValueError("a single value, not one per step")
    _check_length(len(array), steps)
    if why := _unreadable(array):
        raise ValueError(why)
    path, key, pool = where
    place = path, key, len(array), pool
    inner = h5py.check_vlen_dtype(array.dtype)  # `str` for text
    one_byte = inner in (np.uint8, np.int8)
    opaque = array.dtype.kind in "SV" and not array.dtype.names
    if array.ndim == 1 and (one_byte or opaque):
        first = _bytes(array[0])
        if array.dtype.kind == "S" and not pictures.is_encoded(first):
            raise ValueError("text, which is not a stream")
        if why := pictures.encoded_fault(first):
            raise ValueError(why)
        return Hdf5Images(*place, flip, bgr)
    if array.dtype.names or array.dtype.kind not in "biuf":
        raise ValueError(_not_numbers(array.dtype))
    if array.ndim == 2 and array.dtype == np.uint8 and array.shape[1] > len(pictures.PNG):
        starts = [array[row, :32].tobytes() for row in (0, len(array) // 2, len(array) - 1)]
        if any(map(pictures.is_encoded, starts)):  # padded to the longest one
            if why := pictures.encoded_fault(starts[0] if any(starts[0]) else b""):
                raise ValueError(why)
            return Hdf5Images(*place, flip, bgr)
    if order := pictures.axes(array.dtype, array.shape):
        return Hdf5Frames(*place, order, flip, bgr)
    try:
        return array[()]
    except _FAULTS as error:
        raise ValueError(f"it cannot be read ({reason(place[0], error)})") from error


def _check_length(length: int, steps: int) -> None:
    if length == steps:
        return
    if length == steps + 1:
        raise ValueError(
            "it has one value more than there are actions; whether the first or the last one "
            "belongs to no action is not said"
        )
    raise ValueError(
        "it has one value, not one per action"
        if length == 1
        else f"it has {length} values for {steps} actions"
    )


def _not_numbers(dtype: np.dtype) -> str:
    if h5py.check_string_dtype(dtype):
        return "text, which is not a stream"
    if h5py.check_vlen_dtype(dtype):
        return "rows of varying length"
    if h5py.check_ref_dtype(dtype):
        return "references to other parts of the file"
    return "compound values" if dtype.names else f"{dtype.name}, not numbers"


def _unreadable(array: h5py.Dataset) -> str:
    """Why HDF5 could not read the values, or would read zeros in their place; "" if it can."""
    if array.external:
        return (
            f"its values are outside of the HDF5 file, in {array.external[0][0]}; such files are "
            "not read, copy the array into the HDF5 file"
        )
    properties = array.id.get_create_plist()
    for number in range(properties.get_nfilters()):
        code, _, _, name = properties.get_filter(number)
        if not h5py.h5z.filter_avail(code):
            return (
                f"it is compressed with a filter that is not installed ({name.decode()}, {code}); "
                "write it with gzip, for example with h5repack -f GZIP=4"
            )
    return _virtual_fault(array) if array.is_virtual else _unwritten(array)


def _unwritten(array: h5py.Dataset) -> str:
    """Why HDF5 would read its fill value in parts of an array: a writer that ended early.

    What was never written of a chunk that holds other values is not known.
    """
    if array.chunks:
        counts = (-(-n // size) for n, size in zip(array.shape, array.chunks))
        chunks = math.prod(counts)
        missing = chunks - array.id.get_num_chunks()
        part = f"{missing} of its {chunks} chunks"
    else:
        missing, part = array.size and not array.id.get_storage_size(), "all of it"
    if not missing:
        return ""
    instead = "nothing" if array.fillvalue is None else array.fillvalue
    return f"its writer left out {part}, where HDF5 would read {instead}; write the file again"


def _virtual_fault(array: h5py.Dataset) -> str:
    """Why parts of a virtual dataset are missing, for which HDF5 reads the fill value."""
    filled = 0
    for part in array.virtual_sources():
        own = part.file_name == "."
        path = Path(array.file.filename)
        path = path if own else path.parent / part.file_name
        filled += part.vspace.get_select_npoints()
        try:
            with h5py.File(path, "r") as file:
                source = file[part.dset_name]
                if why := _unreadable(source):
                    return why
                taken = part.src_space
                if taken.get_select_type() == h5py.h5s.SEL_ALL or not taken.shape:
                    short = source.size < part.vspace.get_select_npoints()
                else:
                    last = taken.get_select_bounds()[1]
                    short = any(int(end) >= n for end, n in zip(last, source.shape))
        except (*_FAULTS, AttributeError) as error:
            return (
                f"its part {part.dset_name} in the file {part.file_name} cannot be read "
                f"({reason(path, error)}); fetch that file"
            )
        if short:
            return f"its part {part.dset_name} in the file {part.file_name} is too short"
    return "" if filled == array.size else "it is a virtual dataset whose parts do not fill it"


def listed(group: h5py.Group, most: int = 8) -> str:
    """The names of a group's first members, and how many there are besides."""
    names = sorted(group)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}" if names else "nothing"


def other_layout(file: h5py.File) -> str:
    """What a file in another layout is, and what can be done with it."""
    if "traj_0/actions" in file:
        return (
            ". It is a trajectory file of ManiSkill, whose rate and cameras are described in a "
            "JSON file beside it; convert it to LeRobot"
        )
    if "observation/timestamp" in file and "action/cartesian_position" in file:
        return ". It is a raw trajectory of DROID; use DROID's RLDS or LeRobot release"
    if "transforms/camera" in file:
        return ". It is a pose file of EgoDex; give the folder with the videos"
    return ""


_CLOCKS = ("timestamp", "timestamps")
_PADDING = ("mask", "pad_mask", "padding_mask", "is_pad", "action_is_pad", "valid", "is_valid")
_UNITS = 10.0 ** np.array([0, -3, -6, -9])  # seconds


def step_findings(arrays: dict[str, h5py.Dataset], steps: int, rate: float | None) -> Iterator[str]:
    """Where a file's own times of its steps are not even ones at this rate, or it marks steps."""
    for key, array in arrays.items():
        name = key.rpartition("/")[2].lower()
        if array.shape not in ((steps,), (steps, 1)) or array.dtype.kind not in "biuf":
            continue
        if name in _PADDING and len(np.unique(array[()])) == 2:
            yield f"{key} tells some steps from others, perhaps as padding, but all are used"
        if name not in _CLOCKS:
            continue
        gaps = np.diff(array[()].ravel().astype(np.float64))
        usual = np.median(gaps) if len(gaps) else 0.0
        if not usual > 0 or rate is None:
            continue
        if not (np.abs(usual * _UNITS * rate - 1) < 0.1).any():
            yield f"{key} says another rate than {rate:g} steps per second, which is taken"
        elif gaps.max() > 2.5 * usual:
            yield f"{key} has pauses, but the steps are taken as even"


def json_attribute(group: h5py.Group, key: str) -> dict[str, Any]:
    """A JSON object in an attribute; empty if it is missing or something else."""
    text = string(group.attrs.get(key, "{}"))  # outside `try`: another encoding is an error
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def string(value: Any) -> str:
    """A text that h5py may return as bytes, as str, or in an array of one."""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
