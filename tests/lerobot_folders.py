"""Small LeRobot datasets, in which frame k of episode e shows the number 100 e + k."""

import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CAMERA = "observation.images.front"
BITS, BIT = 12, 8  # columns of a frame, and their width in pixels
FPS = 10
OWN = ("timestamp", "frame_index", "episode_index", "index", "task_index")


def write_numbers(path: Path, numbers: Sequence[int], pts: Sequence[int] | None = None) -> None:
    """An H.264 video whose frames show numbers; `pts` in frames of 1 / FPS."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=FPS, options={"crf": "12", "threads": "1"})
        video.height, video.width, video.pix_fmt = 16, BITS * BIT, "yuv420p"
        for place, number in enumerate(numbers):
            bits = [235 if number >> b & 1 else 20 for b in range(BITS)]
            frame = np.repeat(np.array(bits, np.uint8), BIT)[None, :, None]
            frame = np.ascontiguousarray(np.broadcast_to(frame, (16, BITS * BIT, 3)))
            frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
            frame.pts = place if pts is None else pts[place]
            frame.time_base = Fraction(1, FPS)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))


def shown(stream) -> list[int]:
    """The numbers that the frames of a stream show."""
    frames = stream.values.read(range(len(stream.values)))
    means = frames.reshape(len(frames), 16, BITS, BIT, 3).mean((1, 3, 4))
    return [sum(1 << b for b in range(BITS) if row[b] > 128) for row in means]


def numbers(episode: int, length: int) -> list[int]:
    """What the frames of an episode show."""
    return [100 * episode + k for k in range(length)]


def rows(episode: int, length: int, first: int = 0, **columns) -> pa.Table:
    """The rows of an episode; a column of None is left out."""
    at = np.arange(length)
    action = np.repeat(100 * episode + at, 2).astype(np.float32)
    table = {
        "action": pa.FixedSizeListArray.from_arrays(pa.array(action), 2),
        "timestamp": (at / FPS).astype(np.float32),
        "frame_index": at,
        "episode_index": np.full(length, episode),
        "index": first + at,
        "task_index": np.zeros(length, np.int64),
        **columns,
    }
    return pa.table({key: column for key, column in table.items() if column is not None})


def write_info(root: Path, version: str, total: int, **changes) -> None:
    """meta/info.json; `features` are added to the usual ones."""
    number = "{episode_chunk:03d}" if version == "v2.1" else "{chunk_index:03d}"
    file = "episode_{episode_index:06d}" if version == "v2.1" else "file-{file_index:03d}"
    folder = "chunk-{n}/{{video_key}}" if version == "v2.1" else "{{video_key}}/chunk-{n}"
    features = {"action": {"dtype": "float32", "shape": [2]}}
    features[CAMERA] = {"dtype": "video", "shape": [16, BITS * BIT, 3]}
    features |= {key: {"dtype": "int64", "shape": [1]} for key in OWN}
    info = {
        "codebase_version": version,
        "total_episodes": total,
        "fps": FPS,
        "data_path": f"data/chunk-{number}/{file}.parquet",
        "video_path": f"videos/{folder.format(n=number)}/{file}.mp4",
        **changes,
        "features": {**features, **changes.get("features", {})},
    }
    (root / "meta").mkdir(parents=True, exist_ok=True)
    (root / "meta/info.json").write_text(json.dumps(info))


def write_lines(file: Path, lines: Sequence[dict]) -> None:
    """A JSONL file."""
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_v2(
    root: Path,
    lengths: Sequence[int],
    *,
    table: Callable[..., pa.Table] = rows,
    video: bool = True,
    tasks: Sequence[str] = ("do it",),
    **info,
) -> Path:
    """A v2.1 dataset: `table(episode, length, first row)` gives the rows of an episode."""
    write_info(root, "v2.1", len(lengths), **info)
    listed = [{"episode_index": e, "tasks": [tasks[0]], "length": n} for e, n in enumerate(lengths)]
    write_lines(root / "meta/episodes.jsonl", listed)
    described = [{"task_index": i, "task": task} for i, task in enumerate(tasks)]
    write_lines(root / "meta/tasks.jsonl", described)
    (root / "data/chunk-000").mkdir(parents=True)
    for e, n in enumerate(lengths):
        file = root / f"data/chunk-000/episode_{e:06d}.parquet"
        pq.write_table(table(e, n, sum(lengths[:e])), file)
        if video:
            mp4 = root / f"videos/chunk-000/{CAMERA}/episode_{e:06d}.mp4"
            write_numbers(mp4, numbers(e, n))
    return root


def write_v3(
    root: Path,
    lengths: Sequence[int],
    *,
    starts: Sequence[float] | None = None,
    files: Sequence[int] | None = None,
    listed: dict | None = None,
    tasks: pa.Table | None = None,
    video: bool = True,
    **info,
) -> Path:
    """A v3.0 dataset with one video; `files` are the data files, `listed` changes the list."""
    write_info(root, "v3.0", len(lengths), **info)
    count, first = len(lengths), np.cumsum([0, *lengths])
    files = files or [0] * count
    start = [f / FPS for f in first[:-1].tolist()] if starts is None else list(starts)
    episodes = {
        "episode_index": list(range(count)),
        "length": list(lengths),
        "dataset_from_index": first[:-1],
        "data/chunk_index": [0] * count,
        "data/file_index": files,
        f"videos/{CAMERA}/chunk_index": [0] * count,
        f"videos/{CAMERA}/file_index": [0] * count,
        f"videos/{CAMERA}/from_timestamp": start,
        f"videos/{CAMERA}/to_timestamp": [s + n / FPS for s, n in zip(start, lengths)],
        **(listed or {}),
    }
    episodes = {key: column for key, column in episodes.items() if column is not None}
    for folder in ("meta/episodes/chunk-000", "data/chunk-000"):
        (root / folder).mkdir(parents=True)
    pq.write_table(pa.table(episodes), root / "meta/episodes/chunk-000/file-000.parquet")
    tasks = pa.table({"task_index": [0], "task": ["do it"]}) if tasks is None else tasks
    pq.write_table(tasks, root / "meta/tasks.parquet")
    for file in set(files):
        members = [e for e in range(count) if files[e] == file]
        tables = [rows(e, lengths[e], int(first[e])) for e in members]
        pq.write_table(pa.concat_tables(tables), root / f"data/chunk-000/file-{file:03d}.parquet")
    if video:
        every = [k for e, n in enumerate(lengths) for k in numbers(e, n)]
        write_numbers(root / f"videos/{CAMERA}/chunk-000/file-000.mp4", every)
    return root
