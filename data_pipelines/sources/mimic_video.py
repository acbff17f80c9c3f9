"""The episodes mimic-video's releases train the action decoder on, a file for each.

    <any folders>/<episode>.zarr           format 2, the first release
    <any folders>/<episode>.safetensors    the newer one

Either holds arrays `<key>` and `<key>_timestamps` (nanoseconds), `language_instruction` and
`language_embedding`. A stream has the array's name and values as they are stored: in LIBERO's
episodes rotations are quaternions (xyzw) and 3x3 matrices, in Bridge's poses are 4x4 matrices.
`paths.pkl` and the statistics beside them are not read.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numcodecs
import numpy as np
from safetensors import SafetensorError, safe_open

from data_pipelines.episode import Episode, LazyEpisodes, Stream, reason
from data_pipelines.sources.files import Visit, decode_text, glance, walk

# Named arrays of one episode, in a zarr (format 2) folder or in a safetensors file.
#
# Nothing stays open: each read opens what it needs, so that the stores can be sent to other
# processes and be used by several threads.


# What may unpack a chunk. numcodecs knows others, and one of them is pickle: using it would be
# executing the dataset (only the newest versions refuse that themselves).
CODECS = {"blosc", "lz4", "zstd", "gzip", "zlib", "bz2", "lzma", "shuffle", "delta"}
_BYTES = "vlen-bytes"
_FAULTS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ArithmeticError, SafetensorError)


class ArrayStore(Protocol):
    """Arrays by name."""

    path: Path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array."""
        ...

    def dtype(self, key: str) -> np.dtype:
        """Of an array; object for byte strings."""
        ...

    def read(self, key: str) -> np.ndarray:
        """A whole array."""
        ...

    def rows(self, key: str, indices: np.ndarray) -> np.ndarray:
        """Some rows of an array, any order, repeats allowed."""
        ...

    def check(self, key: str) -> None:
        """Raise ValueError if part of an array is missing; reads next to nothing."""
        ...


def open_store(path: Path, sparse: bool) -> ArrayStore:
    """The store that a path names by its suffix.

    Args:
        path: `<name>.zarr` or `<name>.safetensors`.
        sparse: whether a chunk that zarr does not find is a chunk of zeros, or a fault.
    """
    return ZarrStore(path, sparse) if path.suffix == ".zarr" else SafetensorsStore(path)


@dataclass(frozen=True)
class ZarrStore:
    """A zarr group of format 2 in a folder.

    Keeps the last chunk that `rows` unpacked of each array, as neighbouring rows share it: a chunk
    of pictures can be 65 of them, and take longer to unpack than all that is done with a few. Safe
    to use from several threads; pickling drops the chunks.
    """

    path: Path
    sparse: bool = False
    _unpacked: dict[str, tuple[int, np.ndarray]] = field(default_factory=dict, repr=False)

    def __reduce__(self):
        return ZarrStore, (self.path, self.sparse)

    @cached_property
    def _described(self) -> dict[str, dict]:
        with _named(self.path):
            files = sorted(self.path.glob("*/.zarray"))
            return {f.parent.name: json.loads(f.read_text(encoding="utf-8")) for f in files}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array."""
        with _named(self.path):
            return {key: tuple(about["shape"]) for key, about in self._described.items()}

    def dtype(self, key: str) -> np.dtype:
        """Of an array; object for byte strings."""
        with _named(self.path, key):
            return np.dtype(self._described[key]["dtype"])

    def read(self, key: str) -> np.ndarray:
        """A whole array."""
        with _named(self.path, key):
            if self._described[key]["dtype"] == "|O":
                return self._byte_strings(key)
            return self._array(key)[()]

    def rows(self, key: str, indices: np.ndarray) -> np.ndarray:
        """Some rows of an array."""
        with _named(self.path, key):
            about = self._described[key]
            out = np.empty((len(indices), *about["shape"][1:]), about["dtype"])
            size = about["chunks"][0]
            for number in np.unique(indices // size):
                wanted = np.flatnonzero(indices // size == number)
                out[wanted] = self._chunk(key, int(number))[indices[wanted] - number * size]
            return out

    def _chunk(self, key: str, number: int) -> np.ndarray:
        kept, block = self._unpacked.get(key, (None, None))
        if kept != number:
            del block
            self._unpacked.pop(key, None)  # not two in memory at a time
            size = self._described[key]["chunks"][0]
            block = self._array(key)[number * size : (number + 1) * size]
            self._unpacked[key] = number, block
        return block

    def check(self, key: str) -> None:
        """Raise ValueError if a chunk is missing or cut off.

        zarr itself reads zeros for missing chunks, and Blosc reads past the end of cut ones.
        """
        with _named(self.path, key):
            about = self._described[key]
            counts = [-(-n // size) for n, size in zip(about["shape"], about["chunks"])]
            separator = about.get("dimension_separator", ".")
            for place in itertools.product(*map(range, counts)):
                name = separator.join(map(str, place)) or "0"
                try:
                    _check_chunk(self.path / key / name, about)
                except FileNotFoundError:
                    if not self.sparse:
                        raise ValueError(
                            f"chunk {name} is missing; copy it again, or set the option "
                            "sparse=True if its writer left out chunks of zeros, as zarr 3 does"
                        ) from None

    def _array(self, key: str) -> Any:
        _check_codecs(self._described[key])
        self.check(key)
        import zarr  # half a second, which most commands do without

        return zarr.open_array(self.path / key, mode="r", zarr_format=2)

    def _byte_strings(self, key: str) -> np.ndarray:
        """Byte strings in one chunk; zarr 3 refuses the fill value that zarr 2 gave them."""
        about = self._described[key]
        codecs = _check_codecs(about, also={_BYTES})
        if about["filters"] is None or about["shape"] != about["chunks"]:
            raise ValueError("objects other than byte strings in one chunk are not read")
        self.check(key)
        data = (self.path / key / ".".join("0" for _ in about["shape"])).read_bytes()
        for codec in codecs:
            data = numcodecs.get_codec(codec).decode(data)
        return np.asarray(data, object).reshape(about["shape"])


@dataclass(frozen=True)
class SafetensorsStore:
    """A safetensors file; rows are read without the rest."""

    path: Path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array."""
        with _named(self.path), safe_open(self.path, "numpy") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in sorted(file.keys())}

    def dtype(self, key: str) -> np.dtype:
        """Of an array."""
        with _named(self.path, key), safe_open(self.path, "numpy") as file:
            return np.dtype(_DTYPES.get(file.get_slice(key).get_dtype(), "O"))

    def read(self, key: str) -> np.ndarray:
        """A whole array."""
        with _named(self.path, key), safe_open(self.path, "numpy") as file:
            return file.get_tensor(key)

    def rows(self, key: str, indices: np.ndarray) -> np.ndarray:
        """Some rows of an array."""
        with _named(self.path, key), safe_open(self.path, "numpy") as file:
            part = file.get_slice(key)
            return np.concatenate([part[int(i) : int(i) + 1] for i in indices])

    def check(self, key: str) -> None:
        """Nothing to do: the library compares the file's length with its header at opening."""


_DTYPES = {"U8": "u1", "F16": "f2", "F32": "f4", "F64": "f8", "I64": "i8", "U64": "u8"}
_DTYPES |= {"BOOL": "?", "I8": "i1", "I16": "i2", "U16": "u2", "I32": "i4", "U32": "u4"}


class StoredFrames:
    """A `FrameReader` over an array of a store, uint8 [n, h, w, 3]."""

    def __init__(self, store: ArrayStore, key: str, length: int):
        self.store = store
        self.key = key
        self._length = length

    def __len__(self) -> int:
        return self._length

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Frames at `indices` (any order, repeats allowed): uint8 [k, h, w, 3]."""
        indices = np.asarray(indices, np.int64)
        if not len(indices):
            raise ValueError(f"{self.store.path}: no frame indices were given")
        bad = indices[(indices < 0) | (indices >= self._length)]
        if len(bad):
            raise IndexError(
                f"{self.store.path}: frame {bad[0]} asked for, but there are {self._length}"
            )
        return self.store.rows(self.key, indices)


def _check_codecs(about: dict, also: set[str] = frozenset()) -> list[dict]:
    """How to unpack a chunk, first step first."""
    codecs = [about["compressor"]] if about["compressor"] else []
    codecs += reversed(about["filters"] or [])
    if about["dtype"] == "|O" and _BYTES not in also:
        raise ValueError("it holds objects, not numbers")
    unknown = [codec["id"] for codec in codecs if codec["id"] not in CODECS | also]
    if unknown:
        raise ValueError(
            f"it is packed with {unknown[0]!r}, which is refused; known are {sorted(CODECS)}"
        )
    return codecs


def _check_chunk(file: Path, about: dict) -> None:
    with file.open("rb") as chunk:
        header = chunk.read(16)
    blosc = (about["compressor"] or {}).get("id") == "blosc"
    size = file.stat().st_size
    if size == 0 or (blosc and int.from_bytes(header[12:16], "little") != size):
        raise ValueError(f"chunk {file.name} is cut off after {size} bytes; copy it again")


@contextmanager
def _named(path: Path, key: str = "") -> Iterator[None]:
    """Faults of any library become ValueErrors that name the file and the array."""
    try:
        yield
    except _FAULTS as error:
        if str(error).startswith(str(path)):
            raise
        where = f"{path} ({key})" if key else path
        raise ValueError(f"{where}: {reason(path, error)}") from error


SUFFIXES = (".zarr", ".safetensors")
TIMES = "_timestamps"
INSTRUCTION, EMBEDDING = "language_instruction", "language_embedding"
_ENCODED = "_embedding"  # text, and latents of windows that the newer release keeps


def recognises(path: Path) -> bool:
    """Whether this is such an episode, or a folder with some."""
    found = [path] if path.suffix in SUFFIXES else _episodes(glance(path))
    return any(_has_timestamps(file) for file, _ in zip(found, range(3)))


def open_mimic_episodes(
    path: Path, *, name: str, embodiment: str, sparse: bool = False
) -> Sequence[Episode]:
    """Open a folder of episodes, or one; files are read when an episode is asked for.

    Args:
        path: the folder, which holds them at any depth.
        name: of the dataset, becomes `Episode.source`.
        embodiment: the robot, becomes `Episode.embodiment`.
        sparse: whether zarr chunks that are not there are zeros that their writer left out, as
            zarr 3 does by default; otherwise such an episode is broken. The release's are complete.

    Raises:
        ValueError: if there are no episodes, or two of one name.
    """
    path = Path(path)
    single = path.suffix in SUFFIXES
    root = path.parent if single else path
    files = [path] if single else sorted(_episodes(walk(path)))
    if not files:
        raise ValueError(f"{path} holds no {' or '.join(SUFFIXES)} episodes")
    ids = [file.relative_to(root).with_suffix("").as_posix() for file in files]
    if len(set(ids)) < len(ids):
        twice = next(id for id in ids if ids.count(id) > 1)
        raise ValueError(f"{path} has {twice} as .zarr and as .safetensors; move one kind away")
    return LazyEpisodes(len(files), _Dataset(name, embodiment, sparse, files, ids).load)


@dataclass(frozen=True)
class _Dataset:
    name: str
    embodiment: str
    sparse: bool
    files: list[Path]
    ids: list[str]

    def load(self, index: int) -> Episode:
        store = open_store(self.files[index], self.sparse)
        shapes = store.shapes()
        timed = [key for key in shapes if key + TIMES in shapes]
        keys = [key for key in timed if key != INSTRUCTION and not key.endswith(_ENCODED)]
        if not keys:
            raise ValueError(
                f"{store.path} is no episode: it has no arrays <key> and <key>{TIMES}, but "
                f"{sorted(shapes)}"
            )
        cameras = [key for key in keys if _is_camera(store, key, shapes[key])]
        instructions = _instructions(store) if INSTRUCTION in shapes else ("",)
        return Episode(
            id=self.ids[index],
            source=self.name,
            embodiment=self.embodiment,
            instructions=tuple(dict.fromkeys(instructions)) or ("",),
            streams={key: _stream(store, key, shapes[key], key in cameras) for key in keys},
            cameras=tuple(cameras),
            embeddings=_embeddings(store, instructions) if EMBEDDING in shapes else {},
        )


def _stream(store: ArrayStore, key: str, shape: tuple[int, ...], camera: bool) -> Stream:
    times = store.read(key + TIMES)
    if camera:
        store.check(key)
    values = StoredFrames(store, key, shape[0]) if camera else store.read(key)
    if times.dtype.kind == "f":  # the newer release's Bridge: seconds times 1e9
        times = np.round(times)
    try:
        with np.errstate(invalid="raise"):
            return Stream(times.astype(np.int64), values)
    except (ValueError, FloatingPointError) as error:
        raise ValueError(f"{store.path} ({key}): {error}") from error


def _is_camera(store: ArrayStore, key: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and shape[-1] == 3 and store.dtype(key) == np.uint8


def _instructions(store: ArrayStore) -> tuple[str, ...]:
    """One per row: byte strings, or the newer release's rows of bytes."""
    rows, where = store.read(INSTRUCTION), f"{store.path} ({INSTRUCTION})"
    if rows.dtype == np.uint8:
        rows = [row.tobytes().rstrip(b"\0") for row in np.atleast_2d(rows)]
    if not all(isinstance(row, bytes) for row in rows):
        raise ValueError(f"{where}: {rows.dtype} {list(rows.shape)} is no text")
    return tuple(decode_text(row, where) for row in rows)


def _embeddings(store: ArrayStore, instructions: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The rows of the tokens, without the zeros that fill up to 512."""
    stored = store.read(EMBEDDING)
    if stored.ndim < 2 or stored.dtype.kind != "f":
        raise ValueError(
            f"{store.path} ({EMBEDDING}): {stored.dtype} {list(stored.shape)} is no embedding; "
            "[n, tokens, width] is expected"
        )
    found = {}
    for instruction, rows in zip(instructions, stored.reshape(-1, *stored.shape[-2:])):
        used = np.flatnonzero(rows.any(axis=-1))
        if len(used):
            found[instruction] = rows[: used[-1] + 1]
    return found


def _episodes(visits: Iterator[Visit]) -> Iterator[Path]:
    for folder, folders, files in visits:
        yield from (folder / name for name in files if name.endswith(".safetensors"))
        yield from (folder / name for name in folders if name.endswith(".zarr"))
        folders[:] = [name for name in folders if not name.endswith(".zarr")]


def _has_timestamps(path: Path) -> bool:
    store = ZarrStore(path) if path.suffix == ".zarr" else SafetensorsStore(path)
    try:
        shapes = store.shapes()
    except ValueError:
        return False
    return any(key + TIMES in shapes for key in shapes)
