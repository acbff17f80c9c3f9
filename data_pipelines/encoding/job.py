"""The encoding job: episodes -> windows -> latents, once, before training.

Every anchor of every episode becomes one record: the latents of its clip (observed frames ending at
the anchor, future frames starting 1/fps later), its action chunk and its proprioception. Shards of
episodes are finished one by one, each by the process whose turn it is; a job that was killed
continues with the unfinished shards, in any number of processes. The tokenizer and the text encoder
are whatever has the right `encode`; no other file of the pipeline knows them.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from data_pipelines.bad_share import BadShare
from data_pipelines.clips import EpisodeWindows, StreamMismatch, cut_episode
from data_pipelines.encoding.finish import finish, list_shards
from data_pipelines.encoding.plan import begin, encoding_settings
from data_pipelines.encoding.shard import (
    Cut,
    Row,
    VideoTokenizer,
    Window,
    count,
    encode_shard,
    finished_rows,
    is_finished,
)
from data_pipelines.encoding.shared_folder import wait_until
from data_pipelines.encoding.text_table import StoredTexts, TextEncoder
from data_pipelines.episode import Episode
from data_pipelines.records.dataset import RecordDataset
from mvjax.clip import Clip

LEAST_EPISODES = 20  # before the share of bad ones stops the job


def split_of(episode_id: str, validation_share: float) -> str:
    """Split by md5 of the id (the release's stage 1), so that adding data moves no episode."""
    bucket = int(hashlib.md5(episode_id.encode()).hexdigest(), 16) % 10_000
    return "validation" if bucket < round(validation_share * 10_000) else "train"


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
    process: int = 0,
    processes: int = 1,
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
        process: which of the processes this is; 0 writes the manifest when all are done.
        processes: how many share the work.

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
    bad = BadShare(max_bad_share, f"episodes of {dataset.name!r}", LEAST_EPISODES)
    fits = False  # the config, as an episode has shown

    def windows_of(episode: Episode) -> EpisodeWindows:
        if isinstance(text_encoder, StoredTexts):
            for text in _instructions(episode):
                text_encoder.embedding(episode, text)  # its absence is noticed here, not at the end
        cuts = cut_episode(episode, dataset, clip, policy_io, anchor_fps)
        for name, column in cuts.columns.items():
            if not np.all(np.isfinite(column)):
                raise ValueError(f"{name} hold numbers that are not finite (NaN or infinity)")
        return cuts

    def cut(index: int) -> tuple[Row, Iterator[Window]]:
        """One episode as its manifest row and its windows; a broken one has a reason and none."""
        nonlocal fits
        row = {"id": f"number {index}", "instructions": [], "count": 0}
        try:
            episode = episodes[index]
            row["id"], row["instructions"] = episode.id, _instructions(episode)
            cuts = windows_of(episode)
        except Exception as error:  # decoders raise types of their own
            if isinstance(error, StreamMismatch) and not fits:
                raise  # else it is this episode that is wrong
            row["reason"] = f"{type(error).__name__}: {error}"
        row["split"] = split_of(row["id"], validation_share)
        if "reason" in row:
            return row, iter(())
        fits = True
        row |= {"count": len(cuts.clips), "digest": cuts.digest()}
        texts = len(row["instructions"])
        return row, (
            (
                cuts.frames[shown],
                {name: column[i] for name, column in cuts.columns.items()}
                # Windows of an episode with several instructions take them in turn.
                | {"episode": np.int64(index), "text": np.int64(i % texts)},
            )
            for i, shown in enumerate(cuts.clips)
        )

    shards = list_shards(path, settings)
    manifest = path / "manifest.json"
    if process == 0:
        _check_same_data(path, cut)
        if manifest.exists() and not all(is_finished(shard) for shard in shards):
            manifest.unlink()  # a damaged shard was deleted, to be made again
    if manifest.exists():
        return RecordDataset(path)
    ours = range(process, len(shards), processes)
    for number in ours:
        if is_finished(shards[number]):
            for row in finished_rows(shards[number]):
                fits = fits or "reason" not in row
                count(row, bad)
    spans = [
        range(i * episodes_per_shard, min((i + 1) * episodes_per_shard, len(episodes)))
        for i in range(len(shards))
    ]
    total = sum(len(spans[number]) for number in ours)
    title = f"encode {dataset.name}"
    with tqdm(total=total, desc=title, unit="episode", disable=process != 0) as progress:
        for number in ours:
            if is_finished(shards[number]):
                progress.update(len(spans[number]))
            else:
                encode_shard(
                    shards[number], cut, spans[number], tokenizer, batch_size, bad, progress
                )
    if process != 0:
        wait_until(manifest.exists)
        return RecordDataset(path)
    wait_until(lambda: all(is_finished(shard) for shard in shards))
    return finish(path, settings, text_encoder, episodes, max_bad_share)


def _instructions(episode: Episode) -> list[str]:
    return list(episode.instructions) or [""]


def _check_same_data(path: Path, cut: Cut) -> None:
    # One episode is enough to notice data that was recorded or converted again under the same path.
    first = path / "shard_00000.arrayrecord"
    if not is_finished(first):
        return
    for index, row in enumerate(finished_rows(first)):
        if row["count"]:
            now, _ = cut(index)
            if (now["id"], now.get("digest")) != (row["id"], row["digest"]):
                raise ValueError(
                    f"{path} was made from other data: episode {row['id']!r} is no longer what it "
                    "was. Choose another folder, or delete this one to encode again."
                )
            return
