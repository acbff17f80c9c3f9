"""Small records folders whose windows can be recognised."""

from pathlib import Path

import ml_dtypes
import numpy as np

from data_pipelines.atomic import write_json, write_npz
from data_pipelines.records import RecordDataset, RecordWriter, write_texts

RECORDS, PER_EPISODE = 120, 10


def make_records(
    path: Path,
    number: int,
    *,
    acting: bool = True,
    latent_size: int = 2,
    records: int = RECORDS,
    shards: int = 1,
    embodiment: str = "arm",
    action: object = "action",
    scale: float = 1.0,
    variants: int = 1,
    **more_columns: np.ndarray,
) -> RecordDataset:
    """Records whose latents hold (number, record, variant); one episode of four is validation.

    Args:
        path: a new folder; its name is the dataset's.
        number: of the dataset.
        acting: whether there are actions [4, 2] and proprio [1, 3].
        latent_size: height of the latents [2, latent_size, 2, 4].
        records: windows, ten to an episode; the episodes have two tasks in turn.
        shards: files they are in.
        embodiment, action: of the dataset.
        scale: of the actions.
        variants: of every window.
        more_columns: of all records.
    """
    rng, rows = np.random.default_rng(number), []
    columns = {"anchor": np.arange(records), **more_columns}
    if acting:
        columns["actions"] = (scale * rng.normal(size=(records, 4, 2))).astype(np.float32)
        columns["proprio"] = rng.normal(size=(records, 1, 3)).astype(np.float32)
    path.mkdir()
    files = [f"shard_{i}.arrayrecord" for i in range(shards)]
    for file, part in zip(files, np.array_split(np.arange(records), shards)):
        with RecordWriter(path / file) as writer:
            for i in part:
                row = {"latents": None, "episode": np.int64(i // PER_EPISODE)}
                row |= {key: value[i] for key, value in columns.items()} | {"text": np.int64(0)}
                for variant in range(variants):
                    latents = np.zeros((2, latent_size, 2, 4), ml_dtypes.bfloat16)
                    latents[0], latents[1] = number, i
                    if variants > 1:
                        latents[..., -1] = variant
                    writer.write(row | {"latents": latents})
        write_npz((path / file).with_suffix(".npz"), **{k: v[part] for k, v in columns.items()})
    for e in range(records // PER_EPISODE):
        split = "validation" if e % 4 == 3 else "train"
        row = dict(id=f"{e}", instructions=[e % 2], first=e * PER_EPISODE, count=PER_EPISODE)
        rows.append(row | {"split": split})
    write_texts(path / "texts.npz", ["a", "b"], np.arange(1, 25.0).reshape(2, 3, 4))
    dataset = dict(name=path.name, embodiment=embodiment, action=action, proprio="state")
    if variants > 1:
        dataset["augment"] = dict(variants=variants)
    manifest = dict(settings={"dataset": dataset}, fingerprint=path.name)
    manifest |= dict(shards=files, skipped=[], episodes=rows)
    write_json(path / "manifest.json", manifest)
    return RecordDataset(path)


def ids(batches) -> list[tuple[int, int]]:
    """(dataset, record) of every element of batches, read back from the latents."""
    return [(int(x[0, 0, 0, 0]), int(x[1, 0, 0, 0])) for b in batches for x in b["latents"]]


def take(loader, n: int) -> list:
    """The next n batches."""
    return [next(loader) for _ in range(n)]


def flip_bits(path: Path, position: int) -> None:
    """Changes some bytes of a file."""
    data = bytearray(path.read_bytes())
    for i in range(position, position + 4):
        data[i] ^= 0xFF
    path.write_bytes(data)
