"""The episodes on which mimic-video's releases train the action decoder, one file each.

    <any folders>/<episode>.zarr           the first release (format 2; format 3 is read as well)
    <any folders>/<episode>.safetensors    the newer one

Either holds arrays `<key>` and `<key>_timestamps` (nanoseconds), `language_instruction` and
`language_embedding`. A stream has the array's name and values as they are stored: in LIBERO's
episodes rotations are quaternions (xyzw) and 3x3 matrices, in Bridge's poses are 4x4 matrices.
`paths.pkl` and the statistics beside them are not read.

The metadata of a zarr array is checked before zarr sees it: zarr fills missing chunks with zeros,
has codecs that execute code, and refuses the metadata that zarr 2 wrote for byte strings.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from data_pipelines.episode import Episode, LazyEpisodes, Stream, reason
from data_pipelines.frames import Frames
from data_pipelines.sources.files import Visit, decode_text, glance, walk, without_padding

SUFFIXES = (".zarr", ".safetensors")
TIMES = "_timestamps"
INSTRUCTION, EMBEDDING = "language_instruction", "language_embedding"
_ENCODED = "_embedding"  # text, and latents of windows that the newer release stores

# The codecs that may unpack a chunk. numcodecs has others, and one of them is pickle, which would
# execute code in the dataset (only the newest versions refuse that themselves).
CODECS = {"blosc", "lz4", "zstd", "gzip", "zlib", "bz2", "lzma", "shuffle", "delta", "vlen-bytes"}
CODECS |= {"bytes", "transpose", "crc32c", "sharding_indexed"}  # format 3's


def recognises(path: Path) -> bool:
    """Whether this is an episode of mimic-video, or a folder with some."""
    found = [path] if path.suffix in SUFFIXES else _episodes(glance(path))
    for file in itertools.islice(found, 3):
        with suppress(ValueError):
            shapes = open_store(file).shapes()
            if any(key + TIMES in shapes for key in shapes):
                return True
    return False


def open_mimic_episodes(
    path: Path, *, name: str, embodiment: str, sparse: bool = False
) -> Sequence[Episode]:
    """Opens a folder of episodes, or one; files are read when an episode is accessed.

    Args:
        path: an episode, or a folder that holds some at any depth.
        name, embodiment: see `formats`.
        sparse: read missing zarr chunks as zeros, which zarr 3 leaves out by default; otherwise a
            missing chunk is an error. The release's episodes are complete.

    Raises:
        ValueError: if there are no episodes, or two with one name.
    """
    path = Path(path)
    single = path.suffix in SUFFIXES
    root = path.parent if single else path
    files = [path] if single else sorted(_episodes(walk(path)))
    if not files:
        raise ValueError(f"{path} has no {' or '.join(SUFFIXES)} episodes")
    ids = [file.relative_to(root).with_suffix("").as_posix() for file in files]
    if len(set(ids)) < len(ids):
        twice = next(id for id in ids if ids.count(id) > 1)
        raise ValueError(f"{path} has {twice} as .zarr and as .safetensors; move one kind away")
    return LazyEpisodes(len(files), partial(_load, name, embodiment, sparse, files, ids))


def _episodes(visits: Iterator[Visit]) -> Iterator[Path]:
    for folder, folders, files in visits:
        yield from (folder / name for name in files if name.endswith(".safetensors"))
        yield from (folder / name for name in folders if name.endswith(".zarr"))
        folders[:] = [name for name in folders if not name.endswith(".zarr")]


def _load(
    name: str, embodiment: str, sparse: bool, files: list[Path], ids: list[str], index: int
) -> Episode:
    store = open_store(files[index], sparse)
    shapes = store.shapes()
    timed = [key for key in shapes if key + TIMES in shapes]
    keys = [key for key in timed if key != INSTRUCTION and not key.endswith(_ENCODED)]
    if not keys:
        raise ValueError(
            f"{store.path} is not an episode: it has no arrays <key> and <key>{TIMES}, but "
            f"{sorted(shapes)}"
        )
    images = [key for key in keys if len(shapes[key]) == 4 and shapes[key][-1] == 3]
    cameras = [key for key in images if store.is_uint8(key)]
    instructions = _instructions(store) if INSTRUCTION in shapes else ("",)
    return Episode(
        id=ids[index],
        source=name,
        embodiment=embodiment,
        instructions=tuple(dict.fromkeys(instructions)) or ("",),
        streams={key: _stream(store, key, shapes[key][0], key in cameras) for key in keys},
        cameras=tuple(cameras),
        embeddings=_embeddings(store, instructions) if EMBEDDING in shapes else {},
    )


def _stream(store: "ArrayStore", key: str, length: int, camera: bool) -> Stream:
    times = store.read(key + TIMES)
    values = StoredFrames(store, key, length) if camera else store.read(key)
    if times.dtype.kind == "f":  # in the newer release's Bridge: seconds times 1e9
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
        raise ValueError(f"{where}: {rows.dtype} {list(rows.shape)} is not text")
    return tuple(decode_text(row, where) for row in rows)


def _embeddings(store: "ArrayStore", instructions: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The embeddings of the instructions, which are stored with 512 rows, without padding."""
    stored = store.read(EMBEDDING)
    if stored.ndim < 2 or stored.dtype.kind != "f":
        raise ValueError(
            f"{store.path} ({EMBEDDING}): {stored.dtype} {list(stored.shape)} is not an embedding; "
            "expected [n, tokens, width]"
        )
    rows = map(without_padding, stored.reshape(-1, *stored.shape[-2:]))
    return {text: embedding for text, embedding in zip(instructions, rows) if len(embedding)}


class StoredFrames(Frames):
    """A camera: an array of a store, uint8 [n, h, w, 3]."""

    def __init__(self, store: "ArrayStore", key: str, length: int):
        super().__init__(store.path, length)
        self._store, self._key = store, key

    def _read(self, numbers: list[int]) -> np.ndarray:
        return self._store.rows(self._key, np.array(numbers))


# The arrays of one episode. Nothing stays open: each read opens what it needs, so that a store can
# be pickled and used by several threads.


def open_store(path: Path, sparse: bool = False) -> "ArrayStore":
    """The arrays of a `<name>.zarr` or `<name>.safetensors`."""
    return ZarrStore(path, sparse) if path.suffix == ".zarr" else SafetensorsStore(path)


_FAULTS = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)
_FAULTS += (ArithmeticError, SafetensorError)


@contextmanager
def _named(path: Path, key: str = "") -> Iterator[None]:
    """Turns what a library raises into a ValueError that names the file and the array."""
    try:
        yield
    except _FAULTS as error:
        if str(error).startswith(str(path)):
            raise
        where = f"{path} ({key})" if key else path
        raise ValueError(f"{where}: {reason(path, error)}") from error


class ZarrStore:
    """A zarr group in a folder; see `open_mimic_episodes` for `sparse`.

    `rows` caches the last chunk of each array, as neighbouring rows share it: a chunk of 65 images
    takes longer to unpack than all that is done with a few of them.
    """

    def __init__(self, path: Path, sparse: bool):
        self.path, self._sparse = path, sparse
        self._cached: dict[str, tuple[int, np.ndarray]] = {}

    def __reduce__(self):
        return ZarrStore, (self.path, self._sparse)

    @cached_property
    def _metadata(self) -> dict[str, dict]:
        """The metadata of each array; consolidated metadata of the group only repeats it."""
        with _named(self.path):
            files = sorted([*self.path.glob("*/.zarray"), *self.path.glob("*/zarr.json")])
            found = {f.parent.name: json.loads(f.read_text(encoding="utf-8")) for f in files}
            return {key: about for key, about in found.items() if about.get("node_type") != "group"}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array."""
        with _named(self.path):
            return {key: tuple(about["shape"]) for key, about in self._metadata.items()}

    def is_uint8(self, key: str) -> bool:
        """Whether the dtype of an array is uint8; also checks its chunks."""
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
                kept, block = self._cached.get(key, (None, None))
                if kept != chunk:
                    del block
                    self._cached.pop(key, None)  # only one in memory at a time
                    block = self._checked(key)[chunk * size : (chunk + 1) * size]
                    self._cached[key] = chunk, block
                wanted = np.flatnonzero(numbers // size == chunk)
                out[wanted] = block[numbers[wanted] - chunk * size]
            return out

    def _checked(self, key: str) -> Any:
        """The array, if no chunk of it is missing or truncated.

        zarr itself reads missing chunks as zeros, and Blosc reads past the end of truncated ones.
        """
        array = self._array(key)
        blosc = _codecs(self._metadata[key])[-1:] == ["blosc"]
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
                    "chunks of zeros were left out, as zarr 3 does"
                ) from None
            if size == 0 or (blosc and int.from_bytes(header[12:16], "little") != size):
                raise ValueError(f"chunk {name} is truncated after {size} bytes; copy it again")
        return array

    def _array(self, key: str) -> Any:
        """A `zarr.Array`; zarr's own functions that open one do not take metadata."""
        about = self._metadata[key]
        codecs = _codecs(about)
        if unknown := [codec for codec in codecs if codec not in CODECS]:
            raise ValueError(f"the codec {unknown[0]!r} is refused; allowed are {sorted(CODECS)}")
        if about.get("dtype") == "|O":
            if "vlen-bytes" not in codecs:
                raise ValueError("it has objects, not numbers")
            about = about | {"fill_value": ""}  # zarr 2 wrote 0 for byte strings
        import zarr  # takes half a second, and most commands do not need it
        from zarr.storage import LocalStore, StorePath

        place = StorePath(LocalStore(self.path, read_only=True), key)
        return zarr.Array(zarr.AsyncArray(metadata=about, store_path=place))


def _codecs(about: dict) -> list[str]:
    """The names of the codecs that pack a chunk, in order."""
    if about["zarr_format"] == 2:
        return [codec["id"] for codec in [*(about["filters"] or []), about["compressor"]] if codec]
    names = []
    for codec in about["codecs"]:
        names.append(codec["name"].removeprefix("numcodecs."))
        inside = codec.get("configuration", {})  # a shard has codecs for its chunks and its index
        for part in ("codecs", "index_codecs"):
            names[:0] = _codecs({"zarr_format": 3, "codecs": inside.get(part, [])})
    return names


class SafetensorsStore:
    """A safetensors file; the library checks its size when it is opened."""

    def __init__(self, path: Path):
        self.path = path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array."""
        with _named(self.path), safe_open(self.path, "numpy") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in sorted(file.keys())}

    def is_uint8(self, key: str) -> bool:
        """Whether the dtype of an array is uint8."""
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
