"""The encoding job: episodes -> windows -> latents, once, before training.

Every anchor of every episode becomes one record: the latents of its clip (observed frames ending at
the anchor, future frames starting 1/fps later), its action chunk and its proprioception. Shards of
episodes are finished one by one, each by the process whose turn it is; a job that was killed
continues with the unfinished shards, in any number of processes. The tokenizer and the text encoder
are whatever has the right `encode`; no other file of the pipeline knows them.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict
from tqdm import tqdm

from data_pipelines.bad_share import BadShare
from data_pipelines.encoding.cutter import EpisodeCutter
from data_pipelines.encoding.finish import REMEDY, finish, is_complete, list_shards
from data_pipelines.encoding.plan import begin, encoding_settings
from data_pipelines.encoding.retry import forget_repaired
from data_pipelines.encoding.shard import (
    Cut,
    VideoTokenizer,
    count,
    encode_shard,
    finished_rows,
    forget,
    is_finished,
)
from data_pipelines.encoding.shared_folder import wait_until
from data_pipelines.encoding.text_table import StoredTexts, TextEncoder
from data_pipelines.episode import Episode
from data_pipelines.records.dataset import RecordDataset
from mvjax.clip import Clip

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
