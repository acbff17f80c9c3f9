"""The files of an encoding job: its settings, its shards, its texts, its manifest.

A job writes `plan.json` (every setting that the records depend on) before anything else, then shard
after shard, and last the texts and the manifest. The files that exist tell what is left to do, so a
job that was killed can be continued, by any number of processes, and no two jobs are mixed.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_pipelines.atomic import wait_until, write_json
from data_pipelines.episode import EMBEDDING, BadShare, Episode
from data_pipelines.lock import run_lock
from data_pipelines.provenance import changes
from data_pipelines.records import RecordDataset, read_columns, write_texts

# An episode: id, instructions, count (of windows), digest, "reason" if it cannot be read, and its
# "findings" if it has any. One that is not wanted has no windows, no reason and no instructions.
Row = dict[str, Any]

REMEDY = "Repair them and encode with --retry_skipped"
_BATCH = 64  # texts embedded at a time


def begin(path: Path, settings: dict[str, Any], process: int) -> dict[str, Any]:
    """Writes `plan.json`, or returns the settings of the one that is there.

    Raises:
        ValueError: the folder has records made with other settings.
    """
    plan = path / "plan.json"
    # While no shard is finished, the settings may still be corrected in the same folder.
    if process == 0 and not any(path.glob("shard_*.npz")):
        path.mkdir(parents=True, exist_ok=True)
        write_json(plan, settings)
    wait_until(plan.exists)
    found = json.loads(plan.read_text())
    different = [] if found == settings else changes(found, settings, tell=process == 0)
    if not different:
        return found
    advice = "Choose another folder, or delete this one to encode again"
    if all(sentence.startswith("identity.text_encoder ") for sentence in different):
        advice += "; --only=text changes the text embeddings alone"
    raise ValueError(f"{path} was begun with other settings ({'; '.join(different)}). {advice}.")


def list_shards(path: Path, settings: Mapping[str, int]) -> dict[Path, range]:
    """The shards of a job, in order, and the numbers of the episodes in each."""
    size, episodes = settings["episodes_per_shard"], settings["episodes"]
    return {
        path / f"shard_{number:05d}.arrayrecord": range(first, min(first + size, episodes))
        for number, first in enumerate(range(0, episodes, size))
    }


def is_finished(shard: Path) -> bool:
    """Whether both files of a shard exist."""
    return shard.with_suffix(".npz").exists() and shard.exists()


def is_complete(path: Path, shards: Iterable[Path]) -> bool:
    """Whether nothing is left to do."""
    return (path / "manifest.json").exists() and all(map(is_finished, shards))


def finished_rows(shard: Path) -> list[Row]:
    """The episodes of a finished shard."""
    return json.loads(str(read_columns(shard, "rows")["rows"]))


def mark_unfinished(shard: Path) -> None:
    """Marks a shard as unfinished, to be encoded again."""
    # The manifest first: as long as it exists, the folder counts as complete.
    (shard.parent / "manifest.json").unlink(missing_ok=True)
    shard.with_suffix(".npz").unlink(missing_ok=True)


def count(row: Row, bad: BadShare) -> None:
    """Counts an episode as read or as bad; one that is not wanted is neither."""
    if "reason" in row:
        bad.count_bad(row["id"], row["reason"])
    elif row["count"]:
        bad.count_good()


class TextEncoder(Protocol):
    """Maps n instructions to float32 [n, length, dim], zeros past the text's end."""

    def encode(self, texts: list[str]) -> np.ndarray:
        """Embeds the texts."""
        ...


class StoredTexts:
    """Takes the place of a text encoder: the embeddings stored in the dataset itself.

    Args:
        length, dim: Of the padded embeddings, as `config.text` says.
    """

    def __init__(self, length: int, dim: int):
        self._length, self._dim = length, dim
        self.identity = f"stored {length}x{dim}"

    def embedding(self, episode: Episode, text: str) -> np.ndarray:
        """The embedding of an instruction: float32 [length, dim], zeros past the text's end.

        Raises:
            ValueError: If the episode has none, or one of another size.
        """
        where = f"episode {episode.id!r} of {episode.source!r}"
        if text not in episode.embeddings:
            why = episode.left_out.get(EMBEDDING, "")
            raise ValueError(
                f"{where} stores no embedding of its instruction {text!r}{f' ({why})' * bool(why)};"
                " name a text encoder as config.text_encoder instead of 'stored'"
            )
        stored = np.asarray(episode.embeddings[text], np.float32)
        if stored.ndim != 2 or stored.shape[1] != self._dim or len(stored) > self._length:
            raise ValueError(
                f"{where} stores an embedding of shape {list(stored.shape)}, but config.text has "
                f"length {self._length} and dim {self._dim}"
            )
        return np.pad(stored, ((0, self._length - len(stored)), (0, 0)))

    def check(self, episode: Episode) -> None:
        """ValueError if an instruction of the episode has no fitting embedding."""
        for text in episode.instructions or ("",):
            self.embedding(episode, text)


def embed(
    instructions: Mapping[str, int], encoder: TextEncoder | StoredTexts, episodes: Sequence[Episode]
) -> np.ndarray:
    """Embeddings of distinct instructions (text -> an episode that has it), [n, length, dim]."""
    if isinstance(encoder, StoredTexts):
        return np.stack([encoder.embedding(episodes[i], text) for text, i in instructions.items()])
    texts = list(instructions)
    groups = [texts[i : i + _BATCH] for i in range(0, len(texts), _BATCH)]
    return np.concatenate([np.asarray(encoder.encode(group), np.float32) for group in groups])


def finish(
    path: Path,
    settings: dict,
    text_encoder: TextEncoder | StoredTexts,
    episodes: Sequence[Episode],
    max_bad_share: float = 1.0,
) -> RecordDataset:
    """Writes the text table and the manifest of a folder whose shards are all finished.

    `settings` are those of `plan.json`; `episodes` are read for stored embeddings only.
    """
    name = settings["dataset"]["name"]
    bad = BadShare(max_bad_share, f"episodes of {name!r}", settings["episodes"] + 1, REMEDY)
    rows, skipped, first = [], [], 0
    texts: dict[str, int] = {}  # distinct instruction -> an episode that has it
    findings: dict[str, list[int]] = {}  # distinct finding -> the episodes that have it
    shards = list_shards(path, settings)
    for shard in shards:
        rows += finished_rows(shard)
    for index, row in enumerate(rows):
        count(row, bad)
        for finding in row.pop("findings", ()):
            findings.setdefault(finding, []).append(index)
        if "reason" in row:
            skipped.append({"id": row["id"], "reason": row.pop("reason")})
        row["first"], first = first, first + row["count"]
        for text in row["instructions"]:
            # Stored embeddings are read from an episode with windows: the others may not open.
            if row["count"] or not isinstance(text_encoder, StoredTexts):
                texts.setdefault(text, index)
    if first == 0:
        why = f"no episode of {name!r} could be read: the source is empty"
        if skipped:
            why = (
                f"no episode of {name!r} could be read; the first, {skipped[0]['id']}, failed with "
                f"{skipped[0]['reason']}"
            )
        elif rows:
            said = "; ".join(f"{text} ({len(at)} episodes)" for text, at in findings.items())
            why = f"no episode of {name!r} is wanted: {said}"
        raise ValueError(why)
    bad.check()
    numbers = {text: number for number, text in enumerate(texts)}
    for row in rows:
        row["instructions"] = [numbers[text] for text in row["instructions"] if text in numbers]
    table = embed(texts, text_encoder, episodes)
    write_texts(path / "texts.npz", list(texts), table)
    # The same data read from another place are the same data.
    known = {name: value for name, value in settings.items() if name != "source"}
    content = json.dumps([known, list(texts), rows], sort_keys=True).encode()
    if isinstance(text_encoder, StoredTexts):  # whose identity does not depend on its content
        content += table.tobytes()
    manifest = {"settings": settings, "fingerprint": hashlib.sha256(content).hexdigest()}
    manifest |= {"shards": [shard.name for shard in shards], "skipped": skipped, "episodes": rows}
    if findings:
        manifest["findings"] = findings
    write_json(path / "manifest.json", manifest)
    return RecordDataset(path)


def encode_texts(
    path: str | Path,
    text_encoder: TextEncoder | StoredTexts,
    identity: str,
    episodes: Sequence[Episode] = (),
) -> RecordDataset:
    """Makes the text embeddings of finished records again; latents and numbers are not touched.

    If this is killed, the folder is unfinished, and the same call or the encoding job finishes it.
    `identity` is that of the text encoder; `episodes` are read for stored embeddings only.

    Raises:
        ValueError: If the latents are not finished yet.
        OSError: If another job writes to the folder.
    """
    path = Path(path)
    plan, manifest = path / "plan.json", path / "manifest.json"
    settings = json.loads(plan.read_text()) if plan.exists() else None
    if settings is None or not all(map(is_finished, list_shards(path, settings))):
        raise ValueError(f"{path} is not finished; encode without --only first.")
    if manifest.exists() and settings["identity"]["text_encoder"] == identity:
        return RecordDataset(path)
    with run_lock(path):
        settings["identity"]["text_encoder"] = identity
        manifest.unlink(missing_ok=True)
        write_json(plan, settings)
        return finish(path, settings, text_encoder, episodes)
