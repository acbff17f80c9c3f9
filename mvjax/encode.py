"""The encoding job: episodes -> windows -> latents, once, before training.

Every anchor of every episode becomes one record: the latents of its clip (observed frames ending at
the anchor, future frames starting 1/fps later), its action chunk and its proprioception. Where the
dataset is augmented, it becomes one for each variant of its pictures, in their order. The
processes of a job divide the shards among them; a job that was killed continues with the unfinished
shards, in any number of processes. The tokenizer and the text encoder are any objects with the
right `encode`.
"""

import json
import logging
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from data_pipelines.atomic import wait_until, write_npz
from data_pipelines.augment import Augment
from data_pipelines.clip import Clip
from data_pipelines.episode import BadShare, Episode
from data_pipelines.episode_cutter import LEAST_EPISODES, EpisodeCutter, Window, report_skipped
from data_pipelines.lock import run_lock
from data_pipelines.progress import Bar
from data_pipelines.provenance import difference, encoding_settings
from data_pipelines.records import RecordDataset, RecordWriter, entry
from data_pipelines.shards import (
    REMEDY,
    Row,
    StoredTexts,
    TextEncoder,
    begin,
    count,
    finish,
    finished_rows,
    is_complete,
    is_finished,
    list_shards,
    mark_unfinished,
)

log = logging.getLogger(__name__)

Cut = Callable[[int], tuple[Row, Iterator[Window]]]  # episode number -> its row and windows

_READ_AHEAD = 2  # episodes decoded while the accelerator is busy with earlier ones
# Limits per tokenizer call and device: 64 small clips, or one of 61 frames at 480x640.
_WINDOWS, _PIXEL_VALUES = 64, 1 << 24


class VideoTokenizer(Protocol):
    """Maps float32 video [b, 1 + 4k, h, w, 3] in [-1, 1] to latents [b, 1 + k, h/8, w/8, 16]."""

    def encode(self, video: np.ndarray) -> np.ndarray:
        """Computes latents, possibly asynchronously on a device."""
        ...


def encode_dataset(
    episodes: Sequence[Episode],
    dataset: ConfigDict,
    clip: ConfigDict,
    policy_io: ConfigDict,
    tokenizer: VideoTokenizer,
    text_encoder: TextEncoder | StoredTexts,
    path: str | Path,
    *,
    identity: Mapping[str, str],
    batch_size: int = 64,
    episodes_per_shard: int = 64,
    anchor_fps: float | None = None,
    validation_share: float = 0.05,
    max_bad_share: float = 0.05,
    retry_skipped: bool = False,
    process: int = 0,
    processes: int = 1,
    meet: Callable[[], object] = lambda: None,
) -> RecordDataset:
    """Encodes a dataset, or what is left of it, and opens the result.

    Episodes that cannot be read are reported, counted and named in the manifest with the reason.

    Args:
        dataset: `name`, `embodiment`, `video` and `views` (see `data_pipelines.cameras`), the
            parts of `action` and `proprio` ("" where absent; see `vectors.vector`), and `augment`
            (see `data_pipelines.augment`).
        clip: height, width, observed_frames, future_frames, fps, views.
        policy_io: Action and proprioception windows, see `cut_episode`.
        path: The records folder, shared by all processes.
        identity: Identifies the weights of tokenizer and text encoder, such as
            `{"tokenizer": "<checkpoint or hash>", "text_encoder": "..."}`.
        batch_size: Windows per tokenizer call; the last batch of a shard is padded to it.
        episodes_per_shard: Episodes per file, the unit of resuming.
        anchor_fps: Windows per second of video; None makes one per frame.
        validation_share: Share of the episodes in the validation split.
        max_bad_share: Share of unreadable episodes above which the job stops.
        retry_skipped: Also encode finished shards again that have a skipped episode which can be
            read now.
        process, processes: Index of this process, and their number; 0 writes the manifest.
        meet: Waits until every process has called it.

    Raises:
        StreamMismatch: If the config does not fit the episodes.
        TooManyBad: If more than `max_bad_share` of the episodes cannot be read.
        ValueError: If the folder was begun with other settings or from other data, or no episode
            could be read.
        OSError: If another job encodes into the folder.
    """
    path = Path(path)
    Clip(**clip)  # raises for impossible lengths before any data is read
    for view in dataset.get("views") or () if process == 0 else ():
        if view not in (clip.get("views") or ()):
            log.warning(
                "config.datasets.%s.views.%s is not used, because the model sees no such view: set "
                "config.clip.views.%s to its height and width if it is to see one.",
                *(dataset.name, view, view),
            )
    settings = encoding_settings(
        dataset,
        clip,
        policy_io,
        identity,
        anchor_fps=anchor_fps,
        validation_share=validation_share,
        episodes_per_shard=episodes_per_shard,
        episodes=len(episodes),
    )
    # Process 0 keeps other jobs out. Where nothing is left to do, the folder may be read-only.
    idle = is_complete(path, list_shards(path, settings)) and not retry_skipped
    with run_lock(path) if process == 0 and not idle else nullcontext():
        # The others begin when the folder is ours, and its plan is that of this job.
        if process == 0:
            settings = begin(path, settings, process)
        meet()
        if process != 0:
            settings = begin(path, settings, process)
        shards = list_shards(path, settings)
        ours = dict(list(shards.items())[process::processes])
        finished = [row for shard in filter(is_finished, ours) for row in finished_rows(shard)]
        fits = any(row["count"] for row in finished)
        cut = EpisodeCutter(
            episodes, dataset, clip, policy_io, anchor_fps, text_encoder, validation_share, fits
        )
        if process == 0:
            _check_same_data(path, shards, episodes, cut)
        if retry_skipped:
            _forget_repaired(ours, cut)
            meet()  # a process with nothing to do must not take the old manifest for the new one
        if not is_complete(path, shards):
            bad = BadShare(max_bad_share, f"episodes of {dataset.name!r}", LEAST_EPISODES, REMEDY)
            title = f"encode {dataset.name}" if process == 0 else ""
            variants = Augment.of(dataset).variants
            _encode(ours, cut, tokenizer, batch_size, variants, bad, title)
            if process == 0:
                wait_until(lambda: all(map(is_finished, shards)))
                return finish(path, settings, text_encoder, episodes, max_bad_share)
            wait_until(lambda: is_complete(path, shards))
        return RecordDataset(path)


def _encode(
    shards: Mapping[Path, range],
    cut: Cut,
    tokenizer: VideoTokenizer,
    batch_size: int,
    variants: int,
    bad: BadShare,
    title: str,
) -> None:
    """Encodes the unfinished shards; `title` is that of the progress bar, if any."""
    finished = dict.fromkeys(filter(is_finished, shards))  # in order
    for shard in finished:
        for row in finished_rows(shard):
            count(row, bad)
    total = sum(len(span) for span in shards.values())
    with Bar(total=total, desc=title, unit="episode", disable=not title) as progress:
        for shard, span in shards.items():
            if shard in finished:
                progress.update(len(span))
            else:
                mark_unfinished(shard)  # one of its two files may have been deleted
                _encode_shard(shard, cut, span, tokenizer, batch_size, variants, bad, progress)


def _check_same_data(
    path: Path, shards: Mapping[Path, range], episodes: Sequence[Episode], cut: EpisodeCutter
) -> None:
    rows = (
        (index, row["id"], row["digest"])
        for shard in filter(is_finished, shards)
        for index, row in zip(shards[shard], finished_rows(shard))
        if row["count"]
    )
    if (first := next(rows, None)) is None:
        return
    try:
        what = difference(*first, episodes, lambda episode: cut.windows(episode).digest())
    except Exception as error:  # decoders raise types of their own
        what = f"episode {first[1]!r} cannot be read ({type(error).__name__}: {error})"
    if what:
        raise ValueError(
            f"{path} was made from other data: {what}. Choose another folder, or delete this one "
            "to encode again."
        )


def _forget_repaired(shards: Mapping[Path, range], cut: Cut) -> None:
    """Marks shards as unfinished that have a skipped episode which can be read now."""
    for shard, span in shards.items():
        if is_finished(shard):
            skipped = (i for i, row in zip(span, finished_rows(shard)) if "reason" in row)
            if any("reason" not in cut(index)[0] for index in skipped):
                mark_unfinished(shard)


def _encode_shard(
    shard: Path,
    cut: Cut,
    indices: range,
    tokenizer: VideoTokenizer,
    batch_size: int,
    variants: int,
    bad: BadShare,
    progress: Bar,
) -> None:
    """Writes both files of a shard."""
    rows: list[Row] = []

    def windows() -> Iterator[Window]:
        for row, cuts in _read_ahead(cut, indices):
            rows.append(row)
            report_skipped(row, progress)
            count(row, bad)
            yield from cuts
            progress.update()

    columns = defaultdict(list)
    with RecordWriter(shard) as writer:
        encoded = _tokenise(windows(), tokenizer, batch_size)
        for record, (latents, numbers) in enumerate(encoded):
            writer.write({**latents, **numbers})
            if record % variants:  # the numbers of variant 0 are those of all
                continue
            for name, value in numbers.items():
                columns[name].append(value)
    # The rows come last and in one file: a shard is finished exactly when this file exists.
    write_npz(
        shard.with_suffix(".npz"),
        rows=np.asarray(json.dumps(rows)),
        **{name: np.stack(values) for name, values in columns.items() if name != "text"},
    )


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
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """The latents of every window by the entry of its record, and its numbers."""
    running = deque()  # results are fetched one batch late, so that the device never waits
    batch: list[Window] = []

    def encoded(view: str) -> Any:
        padded = batch + [batch[-1]] * (batch_size - len(batch))
        video = np.stack([pictures[view] for pictures, _ in padded]).astype(np.float32)
        video /= 127.5
        video -= 1.0
        return tokenizer.encode(video)

    def submit() -> None:
        latents = {entry(view): encoded(view) for view in batch[0][0]}
        running.append((latents, [numbers for _, numbers in batch]))
        batch.clear()

    def fetch() -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
        latents, numbers = running.popleft()
        latents = {key: np.asarray(x).astype(ml_dtypes.bfloat16) for key, x in latents.items()}
        for i, columns in enumerate(numbers):
            yield {key: x[i] for key, x in latents.items()}, columns

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


class LocalTokenizer:
    """A `VideoTokenizer` on all devices of this process; other processes have their own."""

    def __init__(self, tokenizer: Any):
        """Copies the tokenizer, a pytree with a jitted `encode`, to every device."""
        mesh = Mesh(np.array(jax.local_devices()), ("batch",))
        self._tokenizer = jax.device_put(tokenizer, NamedSharding(mesh, PartitionSpec()))
        self._split = NamedSharding(mesh, PartitionSpec("batch"))

    def encode(self, video: np.ndarray) -> jax.Array:
        """Latents of video [b, t, h, w, 3]; b is a multiple of the number of devices."""
        return self._tokenizer.encode(jax.device_put(video, self._split))


def local_batch_size(frames: int, height: int, width: int) -> int:
    """Windows per tokenizer call: enough to keep the devices busy, within their memory."""
    each = max(1, min(_WINDOWS, _PIXEL_VALUES // (frames * height * width * 3)))
    return each * jax.local_device_count()
