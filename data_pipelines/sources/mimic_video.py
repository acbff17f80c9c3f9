"""The episodes on which mimic-video's releases train the action decoder, one file each.

    <any folders>/<episode>.zarr           the first release (format 2; format 3 is read as well)
    <any folders>/<episode>.safetensors    the newer one

Either holds arrays `<key>` and `<key>_timestamps` (nanoseconds), `language_instruction` and
`language_embedding`. A stream has the array's name and values as they are stored: in LIBERO's
episodes rotations are quaternions (xyzw) and 3x3 matrices, in Bridge's poses are 4x4 matrices.
Instructions with times of their own make the episode's sections. An array that is broken or has no
times is in `Episode.left_out`; `paths.pkl` and the statistics beside them are not read.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from data_pipelines.episode import EMBEDDING, Episode, LazyEpisodes, Section, Stream
from data_pipelines.frames import Frames
from data_pipelines.sources import pictures
from data_pipelines.sources.array_stores import TIMES, ArrayStore, ZarrStore, open_store
from data_pipelines.sources.files import (
    Visit,
    check_period,
    decode_text,
    glance,
    sections,
    walk,
    without_padding,
)

SUFFIXES = (".zarr", ".safetensors")
INSTRUCTION = "language_instruction"
_OTHER_UNIT = 500  # units of time differ by a factor of 1000
_ENCODED = "_embedding"  # text, and latents of windows that the newer release stores


def recognises(path: Path) -> bool:
    """Whether this is an episode of mimic-video, or a folder with some."""
    found = [path] if path.suffix in SUFFIXES else _episodes(glance(path))
    for file in itertools.islice(found, 3):
        with suppress(ValueError):
            shapes = open_store(file).shapes()
            if any(key + TIMES in shapes for key in shapes):
                return True
    return False


def explain(path: Path) -> str:
    """Why this is no episode of mimic-video, or folder of some; "" if it has no such files."""
    if path.name.endswith(".zarr.zip"):
        return f"{path} is a zipped zarr store; unpack it into a folder {path.stem}"
    found = path if path.suffix in SUFFIXES else next(_episodes(glance(path)), None)
    if found is None or recognises(path):
        return ""
    try:
        return _no_episode(open_store(found))
    except ValueError as error:
        return str(error)


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
    shapes, left_out = store.shapes(), store.missing()
    timed = [key for key in shapes if key + TIMES in shapes]
    if not timed:
        raise ValueError(_no_episode(store))
    streams: dict[str, Stream] = {}
    read = {INSTRUCTION, EMBEDDING, *(key + TIMES for key in timed)}
    for key in sorted(shapes.keys() - read):
        try:
            if key not in timed:
                raise ValueError(f"there is no array {key}{TIMES}")
            if key.endswith(_ENCODED):
                raise ValueError(
                    "latents of windows, which are made anew when the data are encoded"
                )
            streams[key] = _stream(store, key, shapes[key])
        except ValueError as error:
            left_out[key] = _why(store, key, error)
    _check_spans(streams, left_out)
    if not streams:
        key = next(key for key in left_out if key in timed)
        raise ValueError(f"{store.path} ({key}): {left_out[key]}; no other array can be used")
    texts, parts = _instructions(store, shapes)
    embeddings: dict[str, np.ndarray] = {}
    if EMBEDDING in shapes:
        try:
            embeddings = _embeddings(store, texts)
        except ValueError as error:
            left_out[EMBEDDING] = _why(store, EMBEDDING, error)
    return Episode(
        id=ids[index],
        source=name,
        embodiment=embodiment,
        instructions=parts[0],
        streams=streams,
        cameras=tuple(key for key, s in streams.items() if isinstance(s.values, Frames)),
        embeddings=embeddings,
        sections=parts[1],
        left_out=left_out,
        findings=store.findings(),
    )


def _check_spans(streams: dict[str, Stream], left_out: dict[str, str]) -> None:
    """Leaves out the streams whose times have another unit than those of the first camera."""
    spans = {key: int(s.timestamps[-1] - s.timestamps[0]) for key, s in streams.items()}
    cameras = [key for key, s in streams.items() if isinstance(s.values, Frames) and spans[key]]
    for key in [key for key, span in spans.items() if cameras and span]:
        ratio = spans[key] / spans[cameras[0]]
        if not 1 / _OTHER_UNIT < ratio < _OTHER_UNIT:
            left_out[key] = (
                f"it lasts {ratio:.3g} times as long as {cameras[0]}; are the times in another "
                "unit than nanoseconds? Convert them."
            )
            del streams[key]


def _why(store: ArrayStore, key: str, error: ValueError) -> str:
    """An error without the names of the file and of the array, as others may have the same."""
    text = str(error)
    return text.removeprefix(f"{store.path} ({key}): ").removeprefix(f"{store.path} ")


def _no_episode(store: ArrayStore) -> str:
    """What a store is, if it has no arrays with times."""
    shapes, text = store.shapes(), f"{store.path} is not an episode of mimic-video: "
    if isinstance(store, ZarrStore) and not shapes:
        if (store.path / "meta/episode_ends").is_dir():
            return (
                f"{text}it is a replay buffer, as diffusion policy and UMI write them, with all "
                "episodes in data/<key>, and neither times nor a rate; convert it to LeRobot"
            )
        found = sorted(p.name for p in store.path.iterdir() if not p.name.startswith("."))
        return f"{text}it has no arrays, but {found[:8]}"
    return f"{text}it has no arrays <key> and <key>{TIMES}, but {sorted(shapes)}"


def _stream(store: ArrayStore, key: str, shape: tuple[int, ...]) -> Stream:
    times = store.read(key + TIMES)
    dtype = store.dtype(key)
    order = pictures.axes(dtype, shape) if dtype == np.uint8 else ""
    values = StoredFrames(store, key, shape[0], order) if order else store.read(key)
    if values is not None and not order and values.dtype.kind not in "biuf":
        raise ValueError(f"{store.path} ({key}): {values.dtype}, not numbers")
    if times.dtype.kind == "f":  # in the newer release's Bridge: seconds times 1e9
        times = np.round(times)
    try:
        with np.errstate(invalid="raise"):
            stream = Stream(times.astype(np.int64), values)
    except (ValueError, FloatingPointError) as error:
        raise ValueError(f"{store.path} ({key}): {error}") from error
    if order:
        check_period(stream.timestamps, f"{store.path} ({key})", "nanoseconds")
    return stream


def _instructions(
    store: ArrayStore, shapes: dict[str, tuple[int, ...]]
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], tuple[Section, ...]]]:
    """The text of each row (byte strings, or the newer release's rows of bytes).

    Also the episode's instructions, and its sections if the texts have different times.
    """
    if INSTRUCTION not in shapes:
        return (), (("",), ())
    rows, where = store.read(INSTRUCTION), f"{store.path} ({INSTRUCTION})"
    kind = f"{rows.dtype} {list(rows.shape)}"
    if rows.dtype == np.uint8:
        rows = [row.tobytes().rstrip(b"\0") for row in np.atleast_2d(rows)]
    rows = np.atleast_1d(np.asarray(rows, object))
    if not all(isinstance(row, bytes | str) for row in rows):
        raise ValueError(f"{where}: {kind} is not text")
    texts = tuple(row if isinstance(row, str) else decode_text(row, where) for row in rows)
    times = store.read(INSTRUCTION + TIMES) if INSTRUCTION + TIMES in shapes else np.zeros(1)
    if len(set(texts)) > 1 and len(np.unique(times)) > 1:
        if len(times) != len(texts) or (np.diff(times.astype(np.float64)) <= 0).any():
            raise ValueError(f"{where}: {len(texts)} texts, but the times {times.tolist()}")
        steps = [(text,) if text else () for text in texts]
        return texts, sections(np.round(times).astype(np.int64), steps)
    return texts, (tuple(dict.fromkeys(texts)) or ("",), ())


def _embeddings(store: ArrayStore, texts: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The embeddings of the rows' texts, which are stored with 512 rows, without padding."""
    stored, where = store.read(EMBEDDING), f"{store.path} ({EMBEDDING})"
    if stored.ndim not in (2, 3) or stored.dtype.kind != "f":
        raise ValueError(
            f"{where}: {stored.dtype} {list(stored.shape)} is not an embedding; expected [n, "
            "tokens, width]"
        )
    rows = stored if stored.ndim == 3 else stored[None]
    if len(rows) != len(texts):
        raise ValueError(f"{where}: {len(rows)} embeddings of {len(texts)} texts")
    found = zip(texts, map(without_padding, rows))
    return {text: embedding for text, embedding in found if len(embedding)}


class StoredFrames(Frames):
    """A camera: an array of a store with these `pictures.axes`."""

    def __init__(self, store: ArrayStore, key: str, length: int, order: str):
        super().__init__(store.path, length)
        self._store, self._key, self._order = store, key, order

    def _read(self, numbers: list[int]) -> np.ndarray:
        return pictures.rgb(self._store.rows(self._key, np.array(numbers)), self._order)
