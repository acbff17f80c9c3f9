"""The end of the encoding job: the text table and the manifest, from shards that are all there."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from data_pipelines.bad_share import BadShare
from data_pipelines.encoding.shard import count, finished_rows, is_finished
from data_pipelines.encoding.text_table import StoredTexts, TextEncoder, embed
from data_pipelines.episode import Episode
from data_pipelines.records.dataset import RecordDataset
from data_pipelines.records.writer import write_json, write_texts

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
