"""The arrays of one episode in a zarr folder or a safetensors file.

Nothing stays open: each read opens what it needs, so that a store can be pickled and used by
several threads.

The metadata of a zarr array is checked before zarr sees it: zarr fills missing chunks with zeros,
has codecs that execute code, and refuses the metadata that zarr 2 wrote for byte strings.
"""

import itertools
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from data_pipelines.episode import reason

TIMES = "_timestamps"  # behind an array's name: the array of its times
_GRIDS = ("chunks", "chunk_grid")  # of format 2, of format 3

# The codecs that may unpack a chunk. numcodecs has others, and one of them is pickle, which would
# execute code in the dataset (only the newest versions refuse that themselves).
CODECS = {"blosc", "lz4", "zstd", "gzip", "zlib", "bz2", "lzma", "shuffle", "delta"}
TEXTS = {"vlen-bytes", "vlen-utf8"}
CODECS |= TEXTS | {"bytes", "transpose", "crc32c", "sharding_indexed"}  # format 3's


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
    def _described(self) -> tuple[dict[str, dict], dict[str, str]]:
        """The metadata of each array, and why those of others cannot be read."""
        with _named(self.path):
            files = sorted([*self.path.glob("*/.zarray"), *self.path.glob("*/zarr.json")])
        found, faults = {}, {}
        for file in files:
            try:
                about = _json(file)
                if about.get("node_type") != "group":
                    tuple(about["shape"])
                    found[file.parent.name] = about
            except (ValueError, OSError, LookupError, TypeError, AttributeError) as error:
                faults[file.parent.name] = f"{file}: {reason(file, error)}"
        return found, faults

    @property
    def _metadata(self) -> dict[str, dict]:
        return self._described[0]

    @cached_property
    def _consolidated(self) -> dict[str, dict]:
        """What the group's metadata repeat of the arrays'."""
        with _named(self.path):
            if (file := self.path / ".zmetadata").is_file():
                found = _json(file).get("metadata", {})
                suffix = "/.zarray"
                names = [name for name in found if name.endswith(suffix)]
                return {name.removesuffix(suffix): found[name] for name in names}
            file = self.path / "zarr.json"
            found = (_json(file) if file.is_file() else {}).get("consolidated_metadata") or {}
            arrays = found.get("metadata", {}).items()
            return {name: about for name, about in arrays if about.get("node_type") == "array"}

    def missing(self) -> dict[str, str]:
        """The arrays that are listed but not there, or not described, and why."""
        found, faults = self._described
        gone = self._consolidated.keys() - found.keys() - faults.keys()
        names = {key.removesuffix(TIMES) for key in gone if "/" not in key}
        listed = "the store's consolidated metadata list it, but it is missing"
        return faults | dict.fromkeys(sorted(names), listed)

    def findings(self) -> tuple[str, ...]:
        """Where the group says something else than an array."""
        listed, own = self._consolidated, self._metadata
        keys = [key for key in own if key in listed and _differ(own[key], listed[key])]
        return tuple(
            f"the consolidated metadata and the array {key} disagree about its shape, dtype or "
            "chunks; the array's own are taken"
            for key in keys
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every array."""
        with _named(self.path):
            return {key: tuple(about["shape"]) for key, about in self._metadata.items()}

    def dtype(self, key: str) -> np.dtype:
        """The dtype of an array; also checks its chunks."""
        with _named(self.path, key):
            return np.dtype(self._checked(key).dtype)

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
        array, about = self._array(key), self._metadata[key]
        blosc = _codecs(about)[-1:] == ["blosc"]
        plain = set(_codecs(about)) <= {"bytes", "transpose"}  # not compressed
        whole = math.prod(array.chunks) * array.dtype.itemsize
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
            if not self._sparse and (lost := _lost_in_shard(file, about, place)):
                raise ValueError(
                    f"{lost} chunks in the shard {name} are missing; copy it again, or set the "
                    "option sparse=True if chunks of zeros were left out, as zarr 3 does"
                )
            stated = int.from_bytes(header[12:16], "little") if blosc else whole if plain else size
            if size == 0 or stated != size:
                if placeholder := reason(file, ""):
                    raise ValueError(f"chunk {name}: {placeholder}")
                raise ValueError(f"chunk {name} is truncated after {size} bytes; copy it again")
        return array

    def _array(self, key: str) -> Any:
        """A `zarr.Array`; zarr's own functions that open one do not take metadata."""
        about = self._metadata[key]
        codecs = _codecs(about)
        if unknown := [codec for codec in codecs if codec not in CODECS]:
            raise ValueError(f"the codec {unknown[0]!r} is refused; allowed are {sorted(CODECS)}")
        if about.get("dtype") == "|O":
            if not TEXTS.intersection(codecs):
                raise ValueError("it has objects, not numbers")
            about = about | {"fill_value": ""}  # zarr 2 wrote 0 for byte strings
        import zarr  # takes half a second, and most commands do not need it
        from zarr.storage import LocalStore, StorePath

        place = StorePath(LocalStore(self.path, read_only=True), key)
        return zarr.Array(zarr.AsyncArray(metadata=about, store_path=place))


def _lost_in_shard(file: Path, about: dict, place: tuple[int, ...]) -> int:
    """The number of chunks that a shard lacks, but for those beyond the array's end."""
    codecs = {codec["name"]: codec for codec in about.get("codecs", ())}
    if list(codecs) != ["sharding_indexed"]:
        return 0
    inside = codecs["sharding_indexed"]["configuration"]
    shard = np.array(about["chunk_grid"]["configuration"]["chunk_shape"])
    counts = shard // inside["chunk_shape"]
    begins = np.indices(counts).reshape(len(counts), -1).T * inside["chunk_shape"]
    wanted = (begins + np.array(place) * shard < about["shape"]).all(axis=1)
    # The index has the place and the size of each chunk, 2**64 - 1 if there is none.
    length = 16 * len(wanted)
    names = [codec["name"] for codec in inside.get("index_codecs", ())]
    with file.open("rb") as content:
        if inside.get("index_location", "end") == "end":
            end = content.seek(0, os.SEEK_END)
            content.seek(max(end - length - 4 * ("crc32c" in names), 0))
        data = content.read(length)
    if len(data) < length:
        return 0  # zarr says what is wrong
    index = np.frombuffer(data, "<u8").reshape(-1, 2)
    return int((wanted & (index == 2**64 - 1).all(axis=1)).sum())


def _json(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: {reason(file, error)}") from error


def _differ(one: dict, other: dict) -> bool:
    return any(one.get(k) != other.get(k) for k in ("shape", "dtype", "data_type", *_GRIDS))


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

    def dtype(self, key: str) -> np.dtype:
        """The dtype of an array; only "uint8" is told apart from the others."""
        with _named(self.path, key), safe_open(self.path, "numpy") as file:
            return np.dtype("u1" if file.get_slice(key).get_dtype() == "U8" else "V1")

    def missing(self) -> dict[str, str]:
        """None, as the file itself lists its arrays."""
        return {}

    def findings(self) -> tuple[str, ...]:
        """None, as the file says everything once."""
        return ()

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
