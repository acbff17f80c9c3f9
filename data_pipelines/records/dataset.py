"""Encoded windows on disk: ArrayRecord shards, one text table, one manifest.

A records folder holds

    plan.json                 what is being encoded and how (written first)
    shard_00000.arrayrecord   one record per window, episodes in order
    shard_00000.npz           the shard's numeric columns and episode rows; written when it is done
    texts.npz                 the distinct instructions and their embeddings
    manifest.json             everything a reader needs to know (written last)

A record is packed by `codec`; `writer` writes the files.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data_pipelines import selection
from data_pipelines.records.codec import decode_record
from data_pipelines.records.columns import read_columns
from data_pipelines.records.shard_reader import DamagedRecord, ShardReader


@dataclass(frozen=True)
class EpisodeRow:
    """One episode of a records folder.

    Attributes:
        id: the episode's id in its source.
        instructions: indices into the text table; the first one names the task.
        first: index of the episode's first record.
        count: number of records; 0 for an episode that was skipped.
        split: "train" or "validation".
        digest: hash of the frames and numbers that were encoded.
    """

    id: str
    instructions: tuple[int, ...]
    first: int
    count: int
    split: str
    digest: str = ""


class RecordDataset:
    """Random access to the windows of one finished records folder.

    Attributes:
        path: the folder.
        name: the dataset's name.
        embodiment: the body whose actions these are; its own normalisation goes with it.
        fingerprint: identity of the content; changes with the data, the clip and the tokenizer.
        settings: what was encoded and how (streams, clip, policy_io, identity of the networks).
        shapes: shape of each array in a record.
        episodes: one row per episode of the source, in its order.
        skipped: episodes left out while encoding: {"id", "reason"}.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        file = self.path / "manifest.json"
        if not file.exists():
            state = "is not finished" if (self.path / "plan.json").exists() else "holds no records"
            raise FileNotFoundError(f"{self.path} {state}: run launch.encode first.")
        manifest = json.loads(file.read_text())
        self.settings: dict = manifest["settings"]
        self.name: str = self.settings["dataset"]["name"]
        self.embodiment: str = self.settings["dataset"].get("embodiment", self.name)
        self.fingerprint: str = manifest["fingerprint"]
        self.skipped: list[dict[str, str]] = manifest["skipped"]
        self.episodes = [
            EpisodeRow(**{**row, "instructions": tuple(row["instructions"])})
            for row in manifest["episodes"]
        ]
        self._shards = [self.path / shard for shard in manifest["shards"]]
        counts = [_rows_in(columns) for columns in self._columns("anchor")]
        self._reader = ShardReader(self._shards, counts)
        self.shapes = self._first_shapes(np.cumsum([0, *counts[:-1]]))

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One window.

        Args:
            index: 0 <= index < len(self).

        Returns:
            latents bfloat16 [t', h', w', 16]; episode (row in `episodes`), anchor (nanoseconds) and
            text (row of the text table), int64 []; where the dataset has them actions float32
            [H, A] and proprio float32 [P, D], raw units, with actions_padded bool [H] and
            proprio_padded bool [P], true where the episode's first or last value was repeated.
            Arrays are read-only.

        Raises:
            DamagedRecord: if the record cannot be read.
        """
        record = decode_record(self._reader.read(index))
        row = self.episodes[int(record["episode"])]
        return record | {"text": np.int64(row.instructions[int(record["text"])])}

    def _first_shapes(self, firsts: Sequence[int]) -> dict[str, tuple[int, ...]]:
        damage = None
        for index in firsts:  # of every shard: one may be damaged
            try:
                return {key: value.shape for key, value in self[int(index)].items()}
            except (DamagedRecord, IndexError) as error:
                damage = damage or error
        raise ValueError(f"no file of records in {self.path} can be read; {damage}")

    @cached_property
    def _texts(self) -> dict[str, np.ndarray]:
        with np.load(self.path / "texts.npz") as texts:
            table = dict(texts)
        return table | {"ends": np.cumsum(table["lengths"])}

    @property
    def instructions(self) -> list[str]:
        """The distinct instructions, in the order of the text table."""
        return self._texts["instructions"].tolist()

    def text(self, index: int) -> np.ndarray:
        """Embedding of an instruction: float32 [length, dim], zeros past the text's end."""
        table, end = self._texts, self._texts["ends"][index]
        embedding = np.zeros((int(table["padded_length"]), table["rows"].shape[1]), np.float32)
        used = table["lengths"][index]
        embedding[:used] = table["rows"][end - used : end]
        return embedding

    def shard_columns(self, *names: str) -> Iterator[dict[str, np.ndarray]]:
        """Numeric columns, such as actions [n, H, A], shard by shard, without reading latents.

        Raises:
            KeyError: if the records have no such column.
            ValueError: if a file is damaged.
        """
        missing = [name for name in names if name not in self.shapes or name in ("latents", "text")]
        if missing:
            raise KeyError(f"Records of {self.name!r} have no column {missing} (in {self.path}).")
        return filter(None, self._columns(*names))

    def columns(self, *names: str) -> dict[str, np.ndarray]:
        """Numeric columns of all records at once; see `shard_columns`."""
        parts = list(self.shard_columns(*names))
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    def _columns(self, *names: str) -> Iterator[dict[str, np.ndarray]]:
        """Of each shard; {} for one whose episodes were all skipped, which has none."""
        return (read_columns(shard, *names) for shard in self._shards)

    def record_indices(
        self,
        split: str | None = None,
        episodes_per_task: selection.PerTask = None,
        seed: int = 0,
    ) -> np.ndarray:
        """Which records to use.

        Args:
            split: "train", "validation", or None for both.
            episodes_per_task: keep so many episodes of every distinct first instruction, a number
                or a share by name; with the same seed a smaller choice is contained in a larger.
            seed: chooses among the episodes.

        Returns:
            int64 [n], ascending.
        """
        rows = [r for r in self.episodes if r.count and (split is None or r.split == split)]
        rows = selection.of_every_task(rows, episodes_per_task, seed)
        spans = [np.arange(row.first, row.first + row.count) for row in rows]
        return np.sort(np.concatenate([np.zeros(0, np.int64), *spans]))


def _rows_in(columns: Mapping[str, np.ndarray]) -> int:
    return len(columns["anchor"]) if columns else 0
