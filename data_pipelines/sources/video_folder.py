"""Captioned videos as mimic-video and Cosmos-Predict2 fine-tune on them.

    <path>/video/<id>.mp4                     also .webm, .mkv, .mov, .m4v, .avi; Cosmos: videos/
    <path>/metas/<id>.txt                          one caption
    <path>/t5_xxl/<id>.pickle                      its T5 embedding (optional), or newer:
    <path>/language_embeddings/<id>.safetensors

Each video is an episode with one stream, "video". What lies beside them and is not read is counted
in a message.
"""

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, and so with safetensors)
import numpy as np
from safetensors import SafetensorError, safe_open

from data_pipelines.episode import EMBEDDING, Episode, LazyEpisodes, reason
from data_pipelines.pickles import read_array_pickle
from data_pipelines.sources.files import check_finished, read_text, walk, without_padding
from data_pipelines.video import VideoFile, VideoPool
from data_pipelines.video_index import VIDEO_SUFFIXES

log = logging.getLogger(__name__)

STREAM = "video"
FOLDERS = ("video", "videos")
_NAMED = 3  # files, in a message
_OF_SYSTEMS = ("thumbs.db", "desktop.ini")  # written by Windows
EMBEDDINGS = (("language_embeddings", ".safetensors"), ("t5_xxl", ".pickle"))
KEY = "encoded_text"  # of the embedding in a safetensors file


def recognises(path: Path) -> bool:
    """Whether this is a folder of captioned videos."""
    if not (path / "metas").is_dir():
        return False
    for folder in FOLDERS:
        if (path / folder).is_dir():
            with os.scandir(path / folder) as entries:
                if any(_is_video(entry.name) for entry in entries):
                    return True
    return False


def explain(path: Path) -> str:
    """Why this is no folder of captioned videos; "" if it has no videos."""
    folder = path if path.is_dir() else path.parent
    if path.is_file() and not _is_video(path.name):
        return ""
    for videos in (folder, *(folder / name for name in FOLDERS)):
        if name := next(filter(_is_video, sorted(_listed(videos))), None):
            place = f"move them into {folder / FOLDERS[0]} and " if videos == folder else ""
            example = folder / "metas" / f"{Path(name).stem}.txt"
            return f"{videos} has videos without captions; {place}write a text each ({example})"
    return ""


def open_video_folder(
    path: Path, *, name: str, embodiment: str, camera_in_name: bool = False, embeddings: bool = True
) -> Sequence[Episode]:
    """Opens a folder of captioned videos; files are read when an episode is accessed.

    A video without a caption, or with a damaged one, is an error of that episode only.

    Args:
        path: the folder that holds `video` or `videos`, and `metas`.
        name, embodiment: see `formats`.
        camera_in_name: the last character of a video's name is the number of the camera; all
            cameras share the caption and embedding named without it (mimic-video's Bridge).
        embeddings: read the text embeddings if the folder has them.

    Raises:
        ValueError: if there are no videos or captions, or both `video` and `videos` hold some, or
            the recording is not finished.
    """
    path = Path(path)
    check_finished(path)
    metas, found = path / "metas", {}
    for folder in FOLDERS:
        if names := sorted(filter(_is_video, _listed(path / folder))):
            found[path / folder] = names
    if not found:
        where = " or ".join(str(path / folder) for folder in FOLDERS)
        raise ValueError(f"{where}: there are no {', '.join(VIDEO_SUFFIXES)} files")
    if len(found) > 1:
        raise ValueError(f"{path} has videos in both {' and '.join(FOLDERS)}; keep one of them")
    ((videos, names),) = found.items()
    if not metas.is_dir():
        example = metas / f"{Path(names[0]).stem}.txt"
        raise ValueError(f"{path} has videos but no captions; write one text file each ({example})")
    captions: dict[str, list[str]] = {}
    for file in filter(_is_text, sorted(_listed(metas))):
        captions.setdefault(Path(file).stem, []).append(file)
    _report_unread(videos, names, metas, captions, camera_in_name)
    stored = [kind for kind in EMBEDDINGS if embeddings and (path / kind[0]).is_dir()]
    folder = _Folder(path, name, embodiment, videos, names, captions, stored, camera_in_name)
    return LazyEpisodes(len(names), folder.load)


def _listed(folder: Path) -> list[str]:
    """The names in a folder, without those of the system."""
    names = os.listdir(folder) if folder.is_dir() else ()
    # Names that begin with a dot are files being written, or macOS's resource forks.
    return [name for name in names if not name.startswith(".") and name.lower() not in _OF_SYSTEMS]


def _report_unread(
    videos: Path,
    names: Sequence[str],
    metas: Path,
    captions: Mapping[str, list[str]],
    camera_in_name: bool,
) -> None:
    """Says once what lies in the folders and is not read, or is read twice."""
    stems = Counter(Path(name).stem for name in names)
    keys = {stem[:-1] if camera_in_name else stem for stem in stems}
    further = sorted({*_listed(videos)} - {*names})
    folders = [name for name in further if (videos / name).is_dir()]
    others = [f"{videos.name}/{name}" for name in further if name not in folders]
    others += [f"metas/{name}" for name in sorted(_listed(metas)) if not _is_text(name)]
    for what, found in (
        (
            "folders with videos are not read; move the videos up",
            filter(_holds_videos, (videos / name for name in folders)),
        ),
        ("files of unknown endings are not read", others),
        ("captions have no video", sorted(captions.keys() - keys)),
        ("videos have no caption, so that they cannot be read", sorted(keys - captions.keys())),
        (
            "captions have several videos, which are all read",
            [stem for stem, count in sorted(stems.items()) if count > 1],
        ),
    ):
        if found := list(map(str, found)):
            more = f" and {len(found) - _NAMED:,} more" if len(found) > _NAMED else ""
            log.warning(
                "%s: %d %s: %s%s", videos.parent, len(found), what, ", ".join(found[:_NAMED]), more
            )


def _holds_videos(folder: Path) -> bool:
    return any(_is_video(name) for _, _, names in walk(folder) for name in names)


def _is_text(name: str) -> bool:
    return name.lower().endswith(".txt")


@dataclass(frozen=True)
class _Folder:
    path: Path
    name: str
    embodiment: str
    videos: Path
    names: Sequence[str]
    captions: Mapping[str, list[str]]  # of a video's name without its ending: files in `metas`
    stored: Sequence[tuple[str, str]]  # of `EMBEDDINGS`
    camera_in_name: bool
    pool: VideoPool = field(default_factory=VideoPool)

    def load(self, index: int) -> Episode:
        """Reads one episode."""
        file = self.videos / self.names[index]
        key = file.stem[:-1] if self.camera_in_name else file.stem
        captions = self.captions.get(key, [f"{key}.txt"])
        if len(captions) > 1:
            raise ValueError(f"{self.path}/metas has two captions of {key}: {captions}; keep one")
        caption = read_text(self.path / "metas" / captions[0])
        files = (self.path / folder / f"{key}{suffix}" for folder, suffix in self.stored)
        embeddings, left_out = {}, {}
        if file_of_text := next((file for file in files if file.is_file()), None):
            try:
                embeddings[caption] = read_text_embedding(file_of_text)
            except ValueError as error:
                left_out[EMBEDDING] = str(error)
        return Episode(
            # Names that differ in the suffix only need it; .mp4 is left out, as the writers do.
            id=file.stem if file.suffix == ".mp4" else file.name,
            source=self.name,
            embodiment=self.embodiment,
            instructions=(caption,),
            streams={STREAM: VideoFile(file, pool=self.pool).stream()},
            cameras=(STREAM,),
            embeddings=embeddings,
            left_out=left_out,
        )


def _is_video(name: str) -> bool:
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
