"""The episodes mimic-video's releases train the action decoder on, a file for each.

    <any folders>/<episode>.zarr           format 2, the first release
    <any folders>/<episode>.safetensors    the newer one

Either holds arrays `<key>` and `<key>_timestamps` (nanoseconds), `language_instruction` and
`language_embedding`. A stream has the array's name and values as they are stored: in LIBERO's
episodes rotations are quaternions (xyzw) and 3x3 matrices, in Bridge's poses are 4x4 matrices.
`paths.pkl` and the statistics beside them are not read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.episode import Episode, LazyEpisodes, Stream
from data_pipelines.sources.array_stores import (
    ArrayStore,
    SafetensorsStore,
    StoredFrames,
    ZarrStore,
    open_store,
)
from data_pipelines.sources.folders import Visit, glance, walk
from data_pipelines.sources.text import decode_text

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
