"""Captioned videos as mimic-video and Cosmos-Predict2 fine-tune on them.

    <path>/video/<id>.mp4    <path>/metas/<id>.txt (one caption)

Each file is an episode with one stream, "video".
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from data_pipelines.episode import Episode, LazyEpisodes, Stream
from data_pipelines.sources.finished import check_finished
from data_pipelines.video import VideoFile, VideoPool

STREAM = "video"


def recognises(path: Path) -> bool:
    """Whether this is a folder of captioned videos."""
    return (path / "metas").is_dir() and any((path / "video").glob("*.mp4"))


def open_video_folder(path: Path, *, name: str, embodiment: str) -> Sequence[Episode]:
    """Open a folder of captioned videos; files are read when an episode is asked for.

    Args:
        path: the folder that holds `video` and `metas`.
        name: of the dataset, becomes `Episode.source`.
        embodiment: whose body is seen, e.g. "human".

    Raises:
        ValueError: if a folder or a caption is missing, or the recording is not finished.
    """
    path = Path(path)
    check_finished(path)
    files = sorted((path / "video").glob("*.mp4"))
    if not files:
        raise ValueError(
            f"{path} is no folder of captioned videos: no .mp4 files in {path / 'video'}"
        )
    missing = [_caption(file) for file in files if not _caption(file).is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(files)} videos in {path} have no caption, the first is "
            f"{missing[0]}; write one line of text into each"
        )
    load = partial(_load, files, name, embodiment, VideoPool())
    return LazyEpisodes(len(files), load)


def _load(files: list[Path], name: str, embodiment: str, pool: VideoPool, index: int) -> Episode:
    video = VideoFile(files[index], pool=pool)
    caption = _caption(files[index]).read_text(encoding="utf-8").strip()
    return Episode(
        id=files[index].stem,
        source=name,
        embodiment=embodiment,
        instructions=(caption,),
        streams={STREAM: Stream(video.timestamps, video)},
        cameras=(STREAM,),
    )


def _caption(video: Path) -> Path:
    return video.parent.parent / "metas" / f"{video.stem}.txt"
