"""Where things are in LeRobot v2.0 and v2.1: a parquet file and a video per episode.

    meta/episodes.jsonl    per episode: episode_index, tasks, length
    meta/tasks.jsonl       task_index, task
    data/chunk-000/episode_000000.parquet
    videos/chunk-000/<key>/episode_000000.mp4

The two differ only in where statistics are, which are not read (`meta/stats.json` in v2.0,
`meta/episodes_stats.jsonl` in v2.1).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.sources.lerobot_meta import Listing, Place, video_features


def read_listing(path: Path, info: dict) -> Listing:
    """The episodes of a v2 dataset.

    Raises:
        ValueError: if meta/episodes.jsonl is missing.
    """
    if not (path / "meta/episodes.jsonl").is_file():
        raise ValueError(f"{path} is not complete: meta/episodes.jsonl is missing; copy it again")
    known: dict[str, str] = {}  # 50,000 episodes of one task share one text

    def episode(line: dict) -> tuple[int, tuple[int, tuple[str, ...]]]:
        texts = line.get("tasks") or ()
        tasks = tuple(known.setdefault(str(text), str(text)) for text in texts)
        return int(line["episode_index"]), (int(line["length"]), tasks)

    def task(line: dict) -> tuple[int, str]:
        return int(line["task_index"]), str(line["task"])

    faults: list[str] = []
    episodes = _read_lines(path / "meta/episodes.jsonl", episode, faults)
    tasks = _read_lines(path / "meta/tasks.jsonl", task, faults)
    numbers = sorted(episodes)
    files = _Files(path, info, [(number, *episodes[number]) for number in numbers])
    return Listing(numbers, files.place, tasks, faults)


@dataclass(frozen=True)
class _Files:
    path: Path
    info: dict
    episodes: list[tuple[int, int, tuple[str, ...]]]  # episode_index, length, tasks

    def place(self, index: int) -> Place:
        number, length, tasks = self.episodes[index]
        at = {"episode_index": number}
        at["episode_chunk"] = number // self.info.get("chunks_size", 1000)
        videos = {}
        for key in video_features(self.info):
            file = self.path / self.info["video_path"].format(video_key=key, **at)
            videos[key] = file, 0.0, length / self.info["fps"]
        return Place(number, length, tasks, self.path / self.info["data_path"].format(**at), videos)


def _read_lines(
    file: Path, item: Callable[[dict], tuple[int, Any]], faults: list[str]
) -> dict[int, Any]:
    """The lines of a JSONL file by number, the later of two (as LeRobot does); notes bad lines."""
    if not file.is_file():
        faults.append(f"{file} is missing")
        return {}
    items = {}
    for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not line.strip():
            continue
        try:
            key, value = item(json.loads(line.decode("utf-8")))
        except (KeyError, TypeError, ValueError) as error:
            if len(faults) < 5:
                faults.append(f"{file} line {number}: {type(error).__name__}: {error}")
        else:
            items[key] = value
    return items
