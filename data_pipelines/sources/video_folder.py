"""Captioned videos as mimic-video and Cosmos-Predict2 fine-tune on them.

    <path>/video/<id>.mp4                          also .webm, .mkv, .mov, .avi
    <path>/metas/<id>.txt                          one caption
    <path>/t5_xxl/<id>.pickle                      its T5 embedding (optional), or newer:
    <path>/language_embeddings/<id>.safetensors

Each video is an episode with one stream, "video".
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, and so with safetensors)
import numpy as np
from safetensors import SafetensorError, safe_open

from data_pipelines.episode import Episode, LazyEpisodes, reason
from data_pipelines.pickles import read_array_pickle
from data_pipelines.sources.files import check_finished, read_text, without_padding
from data_pipelines.video import VideoFile, VideoPool
from data_pipelines.video_index import VIDEO_SUFFIXES

STREAM = "video"
EMBEDDINGS = (("language_embeddings", ".safetensors"), ("t5_xxl", ".pickle"))
KEY = "encoded_text"  # of the embedding in a safetensors file


def recognises(path: Path) -> bool:
    """Whether this is a folder of captioned videos."""
    if not (path / "metas").is_dir() or not (path / "video").is_dir():
        return False
    with os.scandir(path / "video") as entries:
        return any(_is_video(entry.name) for entry in entries)


def open_video_folder(
    path: Path, *, name: str, embodiment: str, camera_in_name: bool = False, embeddings: bool = True
) -> Sequence[Episode]:
    """Opens a folder of captioned videos; files are read when an episode is accessed.

    A video without a caption, or with a damaged one, is an error of that episode only.

    Args:
        path: the folder that holds `video` and `metas`.
        name, embodiment: see `formats`.
        camera_in_name: the last character of a video's name is the number of the camera; all
            cameras share the caption and embedding named without it (mimic-video's Bridge).
        embeddings: read the text embeddings if the folder has them.

    Raises:
        ValueError: if there are no videos or captions, or the recording is not finished.
    """
    path = Path(path)
    check_finished(path)
    videos, metas = path / "video", path / "metas"
    names = sorted(filter(_is_video, os.listdir(videos) if videos.is_dir() else ()))
    if not names:
        raise ValueError(f"{videos} has no {', '.join(VIDEO_SUFFIXES)} files")
    if not metas.is_dir():
        example = metas / f"{Path(names[0]).stem}.txt"
        raise ValueError(f"{path} has videos but no captions; write one text file each ({example})")
    stored = [kind for kind in EMBEDDINGS if embeddings and (path / kind[0]).is_dir()]
    load = partial(_load, path, name, embodiment, VideoPool(), names, camera_in_name, stored)
    return LazyEpisodes(len(names), load)


def _load(
    path: Path,
    name: str,
    embodiment: str,
    pool: VideoPool,
    names: list[str],
    camera_in_name: bool,
    stored: list[tuple[str, str]],
    index: int,
) -> Episode:
    file = path / "video" / names[index]
    key = file.stem[:-1] if camera_in_name else file.stem
    caption = read_text(path / "metas" / f"{key}.txt")
    files = (path / folder / f"{key}{suffix}" for folder, suffix in stored)
    embedding = next((file for file in files if file.is_file()), None)
    return Episode(
        # Names that differ in the suffix only need it; .mp4 is left out, as the writers do.
        id=file.stem if file.suffix == ".mp4" else file.name,
        source=name,
        embodiment=embodiment,
        instructions=(caption,),
        streams={STREAM: VideoFile(file, pool=pool).stream()},
        cameras=(STREAM,),
        embeddings={caption: read_text_embedding(embedding)} if embedding else {},
    )


def _is_video(name: str) -> bool:
    # Names that begin with a dot are files being written, or macOS's resource forks.
    return name.lower().endswith(VIDEO_SUFFIXES) and not name.startswith(".")


def read_text_embedding(path: Path) -> np.ndarray:
    """The T5 embedding of one caption, without padding: float [n, d], in the stored dtype.

    Args:
        path: a `.pickle` (a list that holds one array; it is read without being executed), or a
            `.safetensors` with the key "encoded_text".

    Raises:
        ValueError: if the file is damaged, or holds anything else.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "numpy") as file:
                if KEY not in file.keys():
                    raise ValueError(f"{path} has the keys {file.keys()}; {KEY!r} is expected")
                value: Any = file.get_tensor(KEY)
        except (SafetensorError, OSError, TypeError) as error:  # TypeError: a dtype NumPy lacks
            raise ValueError(
                f"{path}: not a readable safetensors file ({reason(path, error)}); copy it again"
            ) from error
    else:
        value = read_array_pickle(path.read_bytes(), path)
        if isinstance(value, list | tuple) and len(value) == 1:
            value = value[0]
    if isinstance(value, np.ndarray) and value.ndim == 3 and len(value) == 1:
        value = value[0]
    if not isinstance(value, np.ndarray) or value.ndim != 2 or value.dtype.kind in "biuc":
        array = isinstance(value, np.ndarray)
        found = f"{value.dtype} {list(value.shape)}" if array else type(value).__name__
        raise ValueError(f"{path} holds {found}; one float array [tokens, width] is expected")
    if not value.any():
        raise ValueError(f"{path} holds only zeros; make the embedding again")
    return without_padding(value)
