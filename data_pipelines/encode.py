"""The encoding job: episodes -> windows -> latents, once, before training.

Every anchor of every episode becomes one record: the latents of its clip (observed frames ending at
the anchor, future frames starting 1/fps later), its action chunk and its proprioception. Shards of
episodes are finished one after another; a job that was killed continues with the first unfinished
shard. The tokenizer and the text encoder are whatever has the right `encode`; no other file of the
pipeline knows them.
"""

import hashlib
import json
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from data_pipelines.clips import StreamMismatch, cut_episode
from data_pipelines.episode import Episode
from data_pipelines.records import RecordDataset, RecordWriter, write_json, write_npz, write_texts
from mvjax.clip import Clip

_READ_AHEAD = 2  # episodes decoded while the accelerator is busy with earlier ones
_TEXT_BATCH = 64

Window = tuple[np.ndarray, dict[str, np.ndarray]]  # frames uint8 [t, h, w, 3], numeric columns


class VideoTokenizer(Protocol):
    """Maps float32 video [b, 1 + 4k, h, w, 3] in [-1, 1] to latents [b, 1 + k, h/8, w/8, 16]."""

    def encode(self, video: np.ndarray) -> np.ndarray:
        """Latents, possibly still being computed on a device."""
        ...


class TextEncoder(Protocol):
    """Maps n instructions to float32 [n, length, dim], zeros past the text's end."""

    def encode(self, texts: list[str]) -> np.ndarray:
        """Embeddings."""
        ...


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
    text_encoder: TextEncoder,
    path: str | Path,
    *,
    identity: Mapping[str, str],
    batch_size: int = 64,
    episodes_per_shard: int = 64,
    anchor_fps: float | None = None,
    validation_share: float = 0.05,
) -> RecordDataset:
    """Encodes a dataset, or what is left of it, and opens the result.

    Episodes that cannot be read are reported, counted and named in the manifest with the reason.

    Args:
        episodes: the source.
        dataset: `name` and the streams `video`, `action`, `proprio` ("" where absent).
        clip: height, width, observed_frames, future_frames, fps.
        policy_io: action and proprioception windows, see `cut_episode`.
        tokenizer: video to latents.
        text_encoder: instructions to embeddings.
        path: the records folder.
        identity: tells the weights of these networks from others, such as
            `{"tokenizer": "<checkpoint or hash>", "text_encoder": "..."}`.
        batch_size: windows per tokenizer call; the last batch of a shard is padded to it.
        episodes_per_shard: episodes per file, the unit of resuming.
        anchor_fps: windows per second of video; None makes one per frame.
        validation_share: share of the episodes in the validation split.

    Raises:
        StreamMismatch: if the config does not fit the episodes.
        ValueError: if the folder was begun with other settings or from other data, or no episode
            could be read.
    """
    path = Path(path)
    Clip(**clip)  # impossible lengths are said before any data is read
    settings = {
        "dataset": {key: dataset[key] for key in ("name", "video", "action", "proprio")},
        "clip": clip.to_dict(),
        "policy_io": policy_io.to_dict() if dataset.action or dataset.proprio else {},
        "identity": dict(identity),
        "anchor_fps": anchor_fps,
        "validation_share": validation_share,
        "episodes_per_shard": episodes_per_shard,
        "episodes": len(episodes),
    }
    _begin(path, settings)

    def cut(index: int) -> tuple[dict, Iterator[Window]]:
        """One episode as its manifest row and its windows; a broken one has a reason and none."""
        row = {"id": f"number {index}", "instructions": [], "count": 0}
        try:
            episode = episodes[index]
            row["id"], row["instructions"] = episode.id, list(episode.instructions) or [""]
            cuts = cut_episode(episode, dataset, clip, policy_io, anchor_fps)
        except StreamMismatch:
            raise
        except Exception as error:  # decoders raise types of their own
            return row | {"reason": f"{type(error).__name__}: {error}"}, iter(())
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

    _check_same_data(path, cut)
    if (path / "manifest.json").exists():
        return RecordDataset(path)
    shards = []
    with tqdm(total=len(episodes), desc=f"encode {dataset.name}", unit="episode") as progress:
        for first in range(0, len(episodes), episodes_per_shard):
            shard = path / f"shard_{len(shards):05d}.arrayrecord"
            shards.append(shard)
            indices = range(first, min(first + episodes_per_shard, len(episodes)))
            if shard.with_suffix(".npz").exists():
                progress.update(len(indices))
            else:
                _encode_shard(shard, cut, indices, tokenizer, batch_size, progress)
    return _finish(path, shards, settings, text_encoder)


def _begin(path: Path, settings: dict) -> None:
    plan = path / "plan.json"
    if not plan.exists():
        path.mkdir(parents=True, exist_ok=True)
        write_json(plan, settings)
    found = json.loads(plan.read_text())
    wanted = json.loads(json.dumps(settings))
    if found != wanted:
        changed = "; ".join(
            f"{key}: {found.get(key)} there, {wanted.get(key)} now"
            for key in sorted(found.keys() | wanted.keys())
            if found.get(key) != wanted.get(key)
        )
        raise ValueError(
            f"{path} was begun with other settings ({changed}). Choose another folder, or delete "
            "this one to encode again."
        )


def _check_same_data(path: Path, cut: Callable[[int], tuple[dict, Iterator[Window]]]) -> None:
    # One episode is enough to notice data that was recorded or converted again under the same path.
    first = path / "shard_00000.npz"
    if not first.exists():
        return
    with np.load(first) as columns:
        rows = json.loads(str(columns["rows"]))
    for index, row in enumerate(rows):
        if row["count"]:
            now, _ = cut(index)
            if (now["id"], now.get("digest")) != (row["id"], row["digest"]):
                raise ValueError(
                    f"{path} was made from other data: episode {row['id']!r} is no longer what it "
                    "was. Choose another folder, or delete this one to encode again."
                )
            return


def _encode_shard(
    shard: Path,
    cut: Callable[[int], tuple[dict, Iterator[Window]]],
    indices: range,
    tokenizer: VideoTokenizer,
    batch_size: int,
    progress: tqdm,
) -> None:
    rows: list[dict] = []

    def windows() -> Iterator[Window]:
        for row, cuts in _read_ahead(cut, indices):
            rows.append(row)
            if "reason" in row:
                progress.write(f"skipped episode {row['id']}: {row['reason']}")
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


def _read_ahead(cut: Callable, indices: range) -> Iterator[tuple[dict, Iterator[Window]]]:
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


def _finish(
    path: Path, shards: list[Path], settings: dict, text_encoder: TextEncoder
) -> RecordDataset:
    rows, skipped, first = [], [], 0
    texts: dict[str, int] = {}
    for shard in shards:
        with np.load(shard.with_suffix(".npz")) as columns:
            rows += json.loads(str(columns["rows"]))
    for row in rows:
        if "reason" in row:
            skipped.append({"id": row["id"], "reason": row.pop("reason")})
        row["first"], first = first, first + row["count"]
        row["split"] = split_of(row["id"], settings["validation_share"])
        row["instructions"] = [texts.setdefault(text, len(texts)) for text in row["instructions"]]
    if first == 0:
        raise ValueError(
            f"no episode of {settings['dataset']['name']!r} could be read; the first failed with "
            f"{skipped[0] if skipped else 'nothing: the source is empty'}"
        )
    instructions = list(texts)
    groups = [instructions[i : i + _TEXT_BATCH] for i in range(0, len(instructions), _TEXT_BATCH)]
    write_texts(
        path / "texts.npz",
        instructions,
        np.concatenate([np.asarray(text_encoder.encode(group)) for group in groups]),
    )
    content = json.dumps([settings, instructions, rows], sort_keys=True)
    manifest = {"settings": settings, "fingerprint": hashlib.sha256(content.encode()).hexdigest()}
    manifest |= {"shards": [shard.name for shard in shards], "skipped": skipped, "episodes": rows}
    write_json(path / "manifest.json", manifest)
    return RecordDataset(path)
