"""The encoding job: episodes -> windows -> latents, once, before training.

Every anchor of every episode becomes one record: the latents of its clip (observed frames ending at
the anchor, future frames starting 1/fps later), its action chunk and its proprioception. Shards of
episodes are finished one by one, each by the process whose turn it is; a job that was killed
continues with the unfinished shards, in any number of processes. The tokenizer and the text encoder
are whatever has the right `encode`; no other file of the pipeline knows them.
"""

import hashlib
import json
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from tqdm import tqdm

from data_pipelines.atomic import write_json, write_npz
from data_pipelines.clip import Clip
from data_pipelines.clips import EpisodeWindows, StreamMismatch, cut_episode
from data_pipelines.episode import BadShare, Episode, split_of
from data_pipelines.records import (
    RecordDataset,
    RecordWriter,
    read_columns,
    write_texts,
)
from data_pipelines.settings import differences, plain

# Processes that meet through the files of a folder they share, without a connection.


_POLL_SECONDS = 0.2


def wait_until(condition: Callable[[], bool]) -> None:
    """Waits for what another process leaves in the folder; if that dies, its launcher ends us."""
    while not condition():
        time.sleep(_POLL_SECONDS)


# What an encoding job is asked to do, kept beside its records, so that no two are mixed.


_TRAINING_ONLY = ("mask_padding",)  # settings of policy_io that decide nothing here


def encoding_settings(
    dataset: ConfigDict,
    clip: ConfigDict,
    policy_io: ConfigDict,
    identity: Mapping[str, str],
    **rest: Any,
) -> dict[str, Any]:
    """Everything that decides what is in the records; the arguments of `encode_dataset`."""
    names = ("name", "video", "action", "proprio", "embodiment")
    windows = policy_io if dataset.action or dataset.proprio else {}
    settings = {
        "dataset": {name: dataset[name] for name in names if name in dataset},
        "clip": clip,
        "policy_io": recorded_policy_io(windows),
        "identity": identity,
    }
    return plain(settings | rest)


def recorded_policy_io(policy_io: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The windows of actions and proprioception without what only training reads."""
    return {
        name: {key: value for key, value in window.items() if key not in _TRAINING_ONLY}
        for name, window in plain(policy_io).items()
    }


def begin(path: Path, settings: dict[str, Any], process: int) -> None:
    """Writes the plan, or compares it with the one that is there.

    Raises:
        ValueError: if the folder has records that were made with other settings.
    """
    plan = path / "plan.json"
    # A plan of which nothing was made, because of a mistake in it, binds nobody.
    if process == 0 and not any(path.glob("shard_*.npz")):
        path.mkdir(parents=True, exist_ok=True)
        write_json(plan, settings)
    wait_until(plan.exists)
    found = json.loads(plan.read_text())
    if found == settings:
        return
    keys = sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key))
    advice = "Choose another folder, or delete this one to encode again"
    if keys == ["identity"] and _same_tokenizer(found["identity"], settings["identity"]):
        advice += "; --only=text changes the text embeddings alone"
    changed = "; ".join(differences(found, settings))
    raise ValueError(f"{path} was begun with other settings ({changed}). {advice}.")


def _same_tokenizer(a: Mapping[str, str], b: Mapping[str, str]) -> bool:
    return a.get("tokenizer") == b.get("tokenizer")


# Where the embeddings of the instructions come from: a text encoder, or the dataset itself.


_BATCH = 64


class TextEncoder(Protocol):
    """Maps n instructions to float32 [n, length, dim], zeros past the text's end."""

    def encode(self, texts: list[str]) -> np.ndarray:
        """Embeddings."""
        ...


class StoredTexts:
    """In place of a text encoder: the embeddings that the dataset holds (`Episode.embeddings`)."""

    def __init__(self, length: int, dim: int):
        """Takes the size of the padded table: `config.text`."""
        self._length, self._dim = length, dim
        self.identity = f"stored {length}x{dim}"

    def embedding(self, episode: Episode, text: str) -> np.ndarray:
        """Of an instruction of an episode: float32 [length, dim], zeros past the text's end.

        Raises:
            ValueError: if the episode has none, or one of another size.
        """
        where = f"episode {episode.id!r} of {episode.source!r}"
        if text not in episode.embeddings:
            raise ValueError(
                f"{where} stores no embedding of its instruction {text!r}; name a text encoder as "
                "config.text_encoder instead of 'stored'"
            )
        stored = np.asarray(episode.embeddings[text], np.float32)
        if stored.ndim != 2 or stored.shape[1] != self._dim or len(stored) > self._length:
            raise ValueError(
                f"{where} stores an embedding of shape {list(stored.shape)}, but config.text has "
                f"length {self._length} and dim {self._dim}"
            )
        return np.pad(stored, ((0, self._length - len(stored)), (0, 0)))


def embed(
    instructions: Mapping[str, int], encoder: TextEncoder | StoredTexts, episodes: Sequence[Episode]
) -> np.ndarray:
    """The embeddings of distinct instructions.

    Args:
        instructions: each with the number of an episode that has it.
        encoder: where they come from.
        episodes: the source; only read for stored ones.

    Returns:
        float32 [n, length, dim].
    """
    if isinstance(encoder, StoredTexts):
        return np.stack([encoder.embedding(episodes[i], text) for text, i in instructions.items()])
    texts = list(instructions)
    groups = [texts[i : i + _BATCH] for i in range(0, len(texts), _BATCH)]
    return np.concatenate([np.asarray(encoder.encode(group), np.float32) for group in groups])


# One shard of the encoding job: episodes are read ahead, cut into windows and tokenised.


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


# The end of the encoding job: the text table and the manifest, from shards that are all there.


REMEDY = "Repair them and encode with --retry_skipped"


def finish(
    path: Path,
    settings: dict,
    text_encoder: TextEncoder | StoredTexts,
    episodes: Sequence[Episode],
    max_bad_share: float = 1.0,
) -> RecordDataset:
    """Writes the text table and the manifest of a folder whose shards are all finished.

    Args:
        path: the records folder.
        settings: of its plan.
        text_encoder: instructions to embeddings.
        episodes: the source; only read for stored embeddings.
        max_bad_share: share of unreadable episodes that is too much.
    """
    name = settings["dataset"]["name"]
    bad = BadShare(max_bad_share, f"episodes of {name!r}", settings["episodes"] + 1, REMEDY)
    rows, skipped, first = [], [], 0
    texts: dict[str, int] = {}  # distinct instructions; here -> an episode that has it
    shards = list_shards(path, settings)
    for shard in shards:
        rows += finished_rows(shard)
    for index, row in enumerate(rows):
        count(row, bad)
        if "reason" in row:
            skipped.append({"id": row["id"], "reason": row.pop("reason")})
        row["first"], first = first, first + row["count"]
        for text in row["instructions"]:
            # Only episodes with windows: the others may not even open.
            if row["count"] or not isinstance(text_encoder, StoredTexts):
                texts.setdefault(text, index)
    if first == 0:
        raise ValueError(
            f"no episode of {name!r} could be read; the first failed with "
            f"{skipped[0] if skipped else 'nothing: the source is empty'}"
        )
    bad.check()
    numbers = {text: number for number, text in enumerate(texts)}
    for row in rows:
        row["instructions"] = [numbers[text] for text in row["instructions"] if text in numbers]
    table = embed(texts, text_encoder, episodes)
    write_texts(path / "texts.npz", list(texts), table)
    content = json.dumps([settings, list(texts), rows], sort_keys=True).encode()
    if isinstance(text_encoder, StoredTexts):  # which its identity does not tell from others
        content += table.tobytes()
    manifest = {"settings": settings, "fingerprint": hashlib.sha256(content).hexdigest()}
    manifest |= {"shards": [shard.name for shard in shards], "skipped": skipped, "episodes": rows}
    write_json(path / "manifest.json", manifest)
    return RecordDataset(path)


def encode_texts(
    path: str | Path,
    text_encoder: TextEncoder | StoredTexts,
    identity: str,
    episodes: Sequence[Episode] = (),
) -> RecordDataset:
    """Makes the text embeddings of finished records again; latents and numbers are not touched.

    Killed on the way, the folder is unfinished, and the same call or the encoding job ends it.

    Args:
        path: the records folder.
        text_encoder: instructions to embeddings.
        identity: of the text encoder.
        episodes: the source; only read for stored embeddings.

    Raises:
        ValueError: if the latents are not finished yet.
    """
    path = Path(path)
    plan, manifest = path / "plan.json", path / "manifest.json"
    settings = json.loads(plan.read_text()) if plan.exists() else None
    if settings is None or not all(map(is_finished, list_shards(path, settings))):
        raise ValueError(f"{path} is not finished; encode without --only first.")
    if settings["identity"]["text_encoder"] != identity:
        settings["identity"]["text_encoder"] = identity
        manifest.unlink(missing_ok=True)
        write_json(plan, settings)
    if manifest.exists():
        return RecordDataset(path)
    return finish(path, settings, text_encoder, episodes)


def list_shards(path: Path, settings: Mapping[str, int]) -> dict[Path, range]:
    """The files of a plan, in order, and the numbers of the episodes in each."""
    size, episodes = settings["episodes_per_shard"], settings["episodes"]
    return {
        path / f"shard_{number:05d}.arrayrecord": range(first, min(first + size, episodes))
        for number, first in enumerate(range(0, episodes, size))
    }


def is_complete(path: Path, shards: Iterable[Path]) -> bool:
    """Whether nothing is left to do: a manifest outlives none of its shards (`shard.forget`)."""
    return (path / "manifest.json").exists() and all(map(is_finished, shards))


# Episodes that were skipped and have been repaired since: their shards are made again.


def forget_repaired(shards: Mapping[Path, range], cut: Cut) -> None:
    """Makes shards unfinished that have a skipped episode which can be read now.

    Killed on the way, the encoding job goes on with what is unfinished.

    Args:
        shards: the files, and the numbers of the episodes in each.
        cut: gives the windows of an episode.
    """
    for shard, span in shards.items():
        if is_finished(shard):
            skipped = (i for i, row in zip(span, finished_rows(shard)) if "reason" in row)
            if any("reason" not in cut(index)[0] for index in skipped):
                forget(shard)


# One episode of the encoding job as its row of the manifest and its windows.


@dataclass
class EpisodeCutter:
    """Cuts episodes by their number; one that cannot be read has a reason and no windows.

    Attributes:
        episodes: the source.
        dataset, clip, policy_io, anchor_fps: of `cut_episode`.
        text_encoder: instructions to embeddings; one that finds them in the episodes is asked here.
        validation_share: share of the episodes in the validation split.
        config_fits: some episode has shown that the config fits this dataset. Before, a stream that
            is not as the config says is the config's fault and stops the job; then the episode's.
    """

    episodes: Sequence[Episode]
    dataset: ConfigDict
    clip: ConfigDict
    policy_io: ConfigDict
    anchor_fps: float | None
    text_encoder: TextEncoder | StoredTexts | None
    validation_share: float
    config_fits: bool = False

    def __call__(self, index: int) -> tuple[Row, Iterator[Window]]:
        """The row and the windows of an episode.

        Raises:
            StreamMismatch: if the config does not fit it, and did not yet fit any other.
        """
        row: Row = {"id": f"number {index}", "instructions": [], "count": 0}
        cuts = None
        try:
            episode = self.episodes[index]
            row["id"], row["instructions"] = episode.id, list(episode.instructions) or [""]
            cuts = self._cut(episode, row["instructions"])
        except Exception as error:  # decoders raise types of their own
            if isinstance(error, StreamMismatch) and not self.config_fits:
                raise
            row["reason"] = f"{type(error).__name__}: {error}"
        row["split"] = split_of(row["id"], self.validation_share)
        if cuts is None:
            return row, iter(())
        self.config_fits = True
        row |= {"count": len(cuts.clips), "digest": cuts.digest()}
        return row, _windows(index, cuts, len(row["instructions"]))

    def _cut(self, episode: Episode, instructions: Sequence[str]) -> EpisodeWindows:
        if isinstance(self.text_encoder, StoredTexts):
            for text in instructions:  # what is missing is noticed here, not at the end
                self.text_encoder.embedding(episode, text)
        cuts = cut_episode(episode, self.dataset, self.clip, self.policy_io, self.anchor_fps)
        for name, column in cuts.columns.items():
            if not np.all(np.isfinite(column)):
                raise ValueError(f"{name} hold numbers that are not finite (NaN or infinity)")
        return cuts


def _windows(index: int, cuts: EpisodeWindows, texts: int) -> Iterator[Window]:
    for i, shown in enumerate(cuts.clips):
        numbers = {name: column[i] for name, column in cuts.columns.items()}
        # Windows of an episode with several instructions take them in turn.
        numbers |= {"episode": np.int64(index), "text": np.int64(i % texts)}
        yield cuts.frames[shown], numbers


LEAST_EPISODES = 20  # before the share of bad ones stops the job


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
        episodes: the source.
        dataset: `name`, `embodiment`, the stream `video`, and what `action` and `proprio` are made
            of ("" where absent; see `vectors.vector`).
        clip: height, width, observed_frames, future_frames, fps.
        policy_io: action and proprioception windows, see `cut_episode`.
        tokenizer: video to latents.
        text_encoder: instructions to embeddings.
        path: the records folder, which all processes share.
        identity: tells the weights of these networks from others, such as
            `{"tokenizer": "<checkpoint or hash>", "text_encoder": "..."}`.
        batch_size: windows per tokenizer call; the last batch of a shard is padded to it.
        episodes_per_shard: episodes per file, the unit of resuming.
        anchor_fps: windows per second of video; None makes one per frame.
        validation_share: share of the episodes in the validation split.
        max_bad_share: share of unreadable episodes above which the job stops.
        retry_skipped: also makes finished shards again that have a skipped episode which can be
            read now.
        process: which of the processes this is; 0 writes the manifest when all are done.
        processes: how many share the work.
        meet: waits until every process has called it; only needed to retry in several.

    Raises:
        StreamMismatch: if the config does not fit the episodes.
        TooManyBad: if more than `max_bad_share` of the episodes cannot be read.
        ValueError: if the folder was begun with other settings or from other data, or no episode
            could be read.
    """
    path = Path(path)
    Clip(**clip)  # impossible lengths are said before any data is read
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
    begin(path, settings, process)
    shards = list_shards(path, settings)
    ours = dict(list(shards.items())[process::processes])
    fits = any(
        "reason" not in row for shard in filter(is_finished, ours) for row in finished_rows(shard)
    )
    cut = EpisodeCutter(
        episodes, dataset, clip, policy_io, anchor_fps, text_encoder, validation_share, fits
    )
    if process == 0:
        _check_same_data(path, shards, cut)
    if retry_skipped:
        forget_repaired(ours, cut)
        meet()  # else one that has nothing to do would take the old manifest for the new one
    if not is_complete(path, shards):
        bad = BadShare(max_bad_share, f"episodes of {dataset.name!r}", LEAST_EPISODES, REMEDY)
        title = f"encode {dataset.name}" if process == 0 else ""
        _encode(ours, cut, tokenizer, batch_size, bad, title)
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
    bad: BadShare,
    title: str,
) -> None:
    """Makes those shards that are not finished; `title` is of the progress bar, if any."""
    finished = dict.fromkeys(filter(is_finished, shards))
    for shard in finished:
        for row in finished_rows(shard):
            count(row, bad)
    total = sum(len(span) for span in shards.values())
    with tqdm(total=total, desc=title, unit="episode", disable=not title) as progress:
        for shard, span in shards.items():
            if shard in finished:
                progress.update(len(span))
            else:
                forget(shard)  # of which a file was deleted, to be made again
                encode_shard(shard, cut, span, tokenizer, batch_size, bad, progress)


def _check_same_data(path: Path, shards: Mapping[Path, range], cut: Cut) -> None:
    # One episode is enough to notice data that was recorded or converted again under the same path.
    for shard in filter(is_finished, shards):
        for index, row in zip(shards[shard], finished_rows(shard)):
            if row["count"]:
                now, _ = cut(index)
                if (now["id"], now.get("digest")) != (row["id"], row["digest"]):
                    raise ValueError(
                        f"{path} was made from other data: episode {row['id']!r} is no longer what "
                        "it was. Choose another folder, or delete this one to encode again."
                    )
                return


# A tokenizer on all accelerators of this process, each of which encodes a part of every batch.


_VALUES = 1 << 24  # of video per call and device: 64 small clips, or one of 61 frames at 480x640
_WINDOWS = 64


class LocalTokenizer:
    """A `VideoTokenizer`; the other processes of a run have theirs."""

    def __init__(self, tokenizer: Any):
        """Copies the tokenizer, a pytree with a jitted `encode`, to every device."""
        mesh = Mesh(np.array(jax.local_devices()), ("batch",))
        self._tokenizer = jax.device_put(tokenizer, NamedSharding(mesh, PartitionSpec()))
        self._split = NamedSharding(mesh, PartitionSpec("batch"))

    def encode(self, video: np.ndarray) -> jax.Array:
        """Latents of video [b, t, h, w, 3]; b is a multiple of the devices."""
        return self._tokenizer.encode(jax.device_put(video, self._split))


def local_batch_size(frames: int, height: int, width: int) -> int:
    """Windows per call: what fills the devices without filling their memory."""
    each = max(1, min(_WINDOWS, _VALUES // (frames * height * width * 3)))
    return each * jax.local_device_count()
