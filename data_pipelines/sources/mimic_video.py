"""The episodes mimic-video's releases train the action decoder on, a file for each.

    <any folders>/<episode>.zarr           the first release (format 2; format 3 is read as well)
    <any folders>/<episode>.safetensors    the newer one

Either holds arrays `<key>` and `<key>_timestamps` (nanoseconds), `language_instruction` and
`language_embedding`. A stream has the array's name and values as they are stored: in LIBERO's
episodes rotations are quaternions (xyzw) and 3x3 matrices, in Bridge's poses are 4x4 matrices.
`paths.pkl` and the statistics beside them are not read.

zarr is told what to read, and not left to find it out: it fills chunks that are not there with
zeros, runs codecs that run code, and refuses the description that zarr 2 gave to byte strings.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from data_pipelines.episode import Episode, LazyEpisodes, Stream, reason
from data_pipelines.frames import Frames
from data_pipelines.sources.files import Visit, decode_text, glance, walk

SUFFIXES = (".zarr", ".safetensors")
TIMES = "_timestamps"
INSTRUCTION, EMBEDDING = "language_instruction", "language_embedding"
_ENCODED = "_embedding"  # text, and latents of windows that the newer release keeps

# What may unpack a chunk. numcodecs knows others, and one of them is pickle: using it would be
# executing the dataset (only the newest versions refuse that themselves).
CODECS = {"blosc", "lz4", "zstd", "gzip", "zlib", "bz2", "lzma", "shuffle", "delta", "vlen-bytes"}
CODECS |= {"bytes", "transpose", "crc32c", "sharding_indexed"}  # format 3's


def recognises(path: Path) -> bool:
    """Whether this is such an episode, or a folder with some."""
    found = [path] if path.suffix in SUFFIXES else _episodes(glance(path))
    return any(_has_timestamps(file) for file in itertools.islice(found, 3))


def _has_timestamps(path: Path) -> bool:
    try:
        shapes = open_store(path).shapes()
    except ValueError:
        return False
    return any(key + TIMES in shapes for key in shapes)


def open_mimic_episodes(
    path: Path, *, name: str, embodiment: str, sparse: bool = False
) -> Sequence[Episode]:
    """Opens a folder of episodes, or one; files are read when an episode is asked for.

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


def _episodes(visits: Iterator[Visit]) -> Iterator[Path]:
    for folder, folders, files in visits:
        yield from (folder / name for name in files if name.endswith(".safetensors"))
        yield from (folder / name for name in folders if name.endswith(".zarr"))
        folders[:] = [name for name in folders if not name.endswith(".zarr")]


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
        pictures = [key for key in keys if len(shapes[key]) == 4 and shapes[key][-1] == 3]
        cameras = [key for key in pictures if store.is_uint8(key)]
        instructions = _instructions(store) if INSTRUCTION in shapes else ("",)
        return Episode(
            id=self.ids[index],
            source=self.name,
            embodiment=self.embodiment,
            instructions=tuple(dict.fromkeys(instructions)) or ("",),
            streams={key: _stream(store, key, shapes[key][0], key in cameras) for key in keys},
            cameras=tuple(cameras),
            embeddings=_embeddings(store, instructions) if EMBEDDING in shapes else {},
        )


def _stream(store: "ArrayStore", key: str, length: int, camera: bool) -> Stream:
    times = store.read(key + TIMES)
    values = StoredFrames(store, key, length) if camera else store.read(key)
    if times.dtype.kind == "f":  # the newer release's Bridge: seconds times 1e9
        times = np.round(times)
    try:
        with np.errstate(invalid="raise"):
            return Stream(times.astype(np.int64), values)
    except (ValueError, FloatingPointError) as error:
        raise ValueError(f"{store.path} ({key}): {error}") from error


def _instructions(store: "ArrayStore") -> tuple[str, ...]:
    """One per row: byte strings, or the newer release's rows of bytes."""
    rows, where = store.read(INSTRUCTION), f"{store.path} ({INSTRUCTION})"
    if rows.dtype == np.uint8:
        rows = [row.tobytes().rstrip(b"\0") for row in np.atleast_2d(rows)]
    if not all(isinstance(row, bytes) for row in rows):
        raise ValueError(f"{where}: {rows.dtype} {list(rows.shape)} is no text")
    return tuple(decode_text(row, where) for row in rows)


def _embeddings(store: "ArrayStore", instructions: tuple[str, ...]) -> dict[str, np.ndarray]:
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


class StoredFrames(Frames):
    """A camera: an array of a store, uint8 [n, h, w, 3]."""

    def __init__(self, store: "ArrayStore", key: str, length: int):
        super().__init__(store.path, length)
        self._store, self._key = store, key

    def _read(self, numbers: list[int]) -> np.ndarray:
        return self._store.rows(self._key, np.array(numbers))


# Named arrays of one episode.
#
# Nothing stays open: each read opens what it needs, so that the stores can be sent to other
# processes and be used by several threads. What a library says of a fault becomes a ValueError
# that names the file and the array.


def open_store(path: Path, sparse: bool = False) -> "ArrayStore":
    """The arrays of a `<name>.zarr` or `<name>.safetensors`."""
    return ZarrStore(path, sparse) if path.suffix == ".zarr" else SafetensorsStore(path)


_FAULTS = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)
_FAULTS += (ArithmeticError, SafetensorError)


@contextmanager
def _named(path: Path, key: str = "") -> Iterator[None]:
    try:
        yield
    except _FAULTS as error:
        if str(error).startswith(str(path)):
            raise
        where = f"{path} ({key})" if key else path
        raise ValueError(f"{where}: {reason(path, error)}") from error


class ZarrStore:
    """A zarr group in a folder.

    Keeps the last chunk that `rows` unpacked of each array, as neighbouring rows share it: a chunk
    of pictures can be 65 of them, and take longer to unpack than all that is done with a few.

    Args:
        path: the folder.
        sparse: whether a chunk that is not there is a chunk of zeros, or a fault.
    """

    def __init__(self, path: Path, sparse: bool):
        self.path, self._sparse = path, sparse
        self._unpacked: dict[str, tuple[int, np.ndarray]] = {}

    def __reduce__(self):
        return ZarrStore, (self.path, self._sparse)

    @cached_property
    def _described(self) -> dict[str, dict]:
        """Each array's own description; a consolidated one of the group only repeats them."""
        with _named(self.path):
            files = sorted([*self.path.glob("*/.zarray"), *self.path.glob("*/zarr.json")])
            found = {f.parent.name: json.loads(f.read_text(encoding="utf-8")) for f in files}
            return {key: about for key, about in found.items() if about.get("node_type") != "group"}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array."""
        described = self._described
        with _named(self.path):
            return {key: tuple(about["shape"]) for key, about in described.items()}

    def is_uint8(self, key: str) -> bool:
        """Whether an array, which is checked to be whole, has numbers of that type."""
        with _named(self.path, key):
            return self._checked(key).dtype == np.uint8

    def read(self, key: str) -> np.ndarray:
        """A whole array; byte strings as objects."""
        with _named(self.path, key):
            return self._checked(key)[()]

    def rows(self, key: str, numbers: np.ndarray) -> np.ndarray:
        """Some rows of an array."""
        with _named(self.path, key):
            array = self._array(key)
            out = np.empty((len(numbers), *array.shape[1:]), array.dtype)
            size = array.chunks[0]
            for chunk in np.unique(numbers // size).tolist():
                kept, block = self._unpacked.get(key, (None, None))
                if kept != chunk:
                    del block
                    self._unpacked.pop(key, None)  # not two in memory at a time
                    block = self._checked(key)[chunk * size : (chunk + 1) * size]
                    self._unpacked[key] = chunk, block
                wanted = np.flatnonzero(numbers // size == chunk)
                out[wanted] = block[numbers[wanted] - chunk * size]
            return out

    def _checked(self, key: str) -> Any:
        """The array, unless a chunk of it is missing or cut off.

        zarr itself reads zeros for missing chunks, and Blosc reads past the end of cut ones.
        """
        array = self._array(key)
        blosc = _codecs(self._described[key])[-1:] == ["blosc"]
        counts = (-(-n // size) for n, size in zip(array.shape, array.shards or array.chunks))
        for place in itertools.product(*map(range, counts)):
            name = array.metadata.encode_chunk_key(place)
            file = self.path / key / name
            try:
                size = file.stat().st_size
                with file.open("rb") as chunk:
                    header = chunk.read(16) if blosc else b""
            except FileNotFoundError:
                if self._sparse:
                    continue
                raise ValueError(
                    f"chunk {name} is missing; copy it again, or set the option sparse=True if "
                    "its writer left out chunks of zeros, as zarr 3 does"
                ) from None
            if size == 0 or (blosc and int.from_bytes(header[12:16], "little") != size):
                raise ValueError(f"chunk {name} is cut off after {size} bytes; copy it again")
        return array

    def _array(self, key: str) -> Any:
        """A `zarr.Array`; of zarr's functions that open one, none takes a description."""
        about = self._described[key]
        codecs = _codecs(about)
        if unknown := [codec for codec in codecs if codec not in CODECS]:
            raise ValueError(
                f"it is packed with {unknown[0]!r}, which is refused; known are {sorted(CODECS)}"
            )
        if about.get("dtype") == "|O":
            if "vlen-bytes" not in codecs:
                raise ValueError("it holds objects, not numbers")
            about = about | {"fill_value": ""}  # zarr 2 gave byte strings a 0
        import zarr  # half a second, which most commands do without
        from zarr.storage import LocalStore, StorePath

        place = StorePath(LocalStore(self.path, read_only=True), key)
        return zarr.Array(zarr.AsyncArray(metadata=about, store_path=place))


def _codecs(about: dict) -> list[str]:
    """The names of what packs a chunk, the last step last."""
    if about["zarr_format"] == 2:
        return [codec["id"] for codec in [*(about["filters"] or []), about["compressor"]] if codec]
    names = []
    for codec in about["codecs"]:
        names.append(codec["name"].removeprefix("numcodecs."))
        inside = codec.get("configuration", {})  # of a shard: its chunks, and its index
        for part in ("codecs", "index_codecs"):
            names[:0] = _codecs({"zarr_format": 3, "codecs": inside.get(part, [])})
    return names


class SafetensorsStore:
    """A safetensors file, which the library finds whole at opening; rows are read by themselves."""

    def __init__(self, path: Path):
        self.path = path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array."""
        with _named(self.path), safe_open(self.path, "numpy") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in sorted(file.keys())}

    def is_uint8(self, key: str) -> bool:
        """Whether an array's numbers are of that type."""
        with _named(self.path, key), safe_open(self.path, "numpy") as file:
            return file.get_slice(key).get_dtype() == "U8"

    def read(self, key: str) -> np.ndarray:
        """A whole array."""
        with _named(self.path, key), safe_open(self.path, "numpy") as file:
            return file.get_tensor(key)

    def rows(self, key: str, numbers: np.ndarray) -> np.ndarray:
        """Some rows of an array."""
        with _named(self.path, key), safe_open(self.path, "numpy") as file:
            part = file.get_slice(key)
            return np.concatenate([part[int(i) : int(i) + 1] for i in numbers])


ArrayStore = ZarrStore | SafetensorsStore
