"""One shard of the encoding job: episodes are read ahead, cut into windows and tokenised."""

import json
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from tqdm import tqdm

from data_pipelines.bad_share import BadShare
from data_pipelines.records.columns import read_columns
from data_pipelines.records.writer import RecordWriter, write_npz

_READ_AHEAD = 2  # episodes decoded while the accelerator is busy with earlier ones

Row = dict[str, Any]  # of an episode: id, instructions, count, digest, and "reason" if it is bad
Window = tuple[np.ndarray, dict[str, np.ndarray]]  # frames uint8 [t, h, w, 3], numeric columns
Cut = Callable[[int], tuple[Row, Iterator[Window]]]  # episode number -> its row and windows


class VideoTokenizer(Protocol):
    """Maps float32 video [b, 1 + 4k, h, w, 3] in [-1, 1] to latents [b, 1 + k, h/8, w/8, 16]."""

    def encode(self, video: np.ndarray) -> np.ndarray:
        """Latents, possibly still being computed on a device."""
        ...


def is_finished(shard: Path) -> bool:
    """Whether both files of a shard are there."""
    return shard.with_suffix(".npz").exists() and shard.exists()


def finished_rows(shard: Path) -> list[Row]:
    """The episodes of a finished shard."""
    return json.loads(str(read_columns(shard, "rows")["rows"]))


def forget(shard: Path) -> None:
    """Makes a shard unfinished; the folder, too, until the job has made it again."""
    (shard.parent / "manifest.json").unlink(missing_ok=True)
    shard.with_suffix(".npz").unlink(missing_ok=True)


def encode_shard(
    shard: Path,
    cut: Cut,
    indices: range,
    tokenizer: VideoTokenizer,
    batch_size: int,
    bad: BadShare,
    progress: tqdm,
) -> None:
    """Writes both files of a shard.

    Args:
        shard: the .arrayrecord.
        cut: gives the windows of an episode.
        indices: the episodes of this shard.
        tokenizer: video to latents.
        batch_size: windows per call of it; the last batch is padded to it.
        bad: counts the episodes.
        progress: counts them on the screen.

    Raises:
        TooManyBad: of `bad`.
    """
    rows: list[Row] = []

    def windows() -> Iterator[Window]:
        for row, cuts in _read_ahead(cut, indices):
            rows.append(row)
            say_skipped(row, progress)
            count(row, bad)
            yield from cuts
            progress.update()

    columns = defaultdict(list)
    with RecordWriter(shard) as writer:
        for latents, numbers in _tokenise(windows(), tokenizer, batch_size):
            writer.write({"latents": latents, **numbers})
            for name, value in numbers.items():
                columns[name].append(value)
    # The rows come last and in one file: a shard is finished exactly when this file exists.
    write_npz(
        shard.with_suffix(".npz"),
        rows=np.asarray(json.dumps(rows)),
        **{name: np.stack(values) for name, values in columns.items() if name != "text"},
    )


def count(row: Row, bad: BadShare) -> None:
    """Counts an episode as read or as bad."""
    if "reason" in row:
        bad.is_bad(row["id"], row["reason"])
    else:
        bad.good()


def say_skipped(row: Row, progress: tqdm) -> None:
    """Names a bad episode on the screen."""
    if "reason" in row:
        progress.write(f"skipped episode {row['id']}: {row['reason']}", file=sys.stderr)


def _read_ahead(cut: Cut, indices: range) -> Iterator[tuple[Row, Iterator[Window]]]:
    # One thread, because sources keep a decoder open between neighbouring episodes.
    with ThreadPoolExecutor(1) as pool:
        waiting = deque()
        for index in indices:
            waiting.append(pool.submit(cut, index))
            if len(waiting) > _READ_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _tokenise(
    windows: Iterator[Window], tokenizer: VideoTokenizer, batch_size: int
) -> Iterator[Window]:
    running = deque()  # results are fetched one batch late, so that the device never waits
    batch: list[Window] = []

    def submit() -> None:
        padded = batch + [batch[-1]] * (batch_size - len(batch))
        video = np.stack([frames for frames, _ in padded]).astype(np.float32)
        video /= 127.5
        video -= 1.0
        running.append((tokenizer.encode(video), [numbers for _, numbers in batch]))
        batch.clear()

    def fetch() -> Iterator[Window]:
        latents, numbers = running.popleft()
        yield from zip(np.asarray(latents).astype(ml_dtypes.bfloat16), numbers)

    for window in windows:
        batch.append(window)
        if len(batch) == batch_size:
            submit()
            if len(running) > 1:
                yield from fetch()
    if batch:
        submit()
    while running:
        yield from fetch()
