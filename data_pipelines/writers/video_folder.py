"""Write captioned videos, `video/<id>.mp4` and `metas/<id>.txt`, as Cosmos reads them."""

from collections.abc import Mapping
from pathlib import Path

from data_pipelines.writers.lerobot import place_file


def write_video_folder(path: Path, videos: Mapping[str, tuple[Path, str]]) -> None:
    """Link encoded videos into the folder and write their captions.

    Args:
        path: the dataset's folder; files of the same names are replaced.
        videos: id -> (the .mp4, its caption).

    Raises:
        OSError: if the folder cannot be written.
    """
    (path / "metas").mkdir(parents=True, exist_ok=True)
    for name, (video, caption) in videos.items():
        (path / "metas" / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")
        place_file(video, path / "video" / f"{name}.mp4")
