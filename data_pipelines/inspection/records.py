"""A records folder looked at: what the encoding job wrote, and whether it can be read."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipelines.inspection.dataset import ALL, Inspection
from data_pipelines.inspection.episode import check_instructions
from data_pipelines.inspection.found import Problem, SeenStream
from data_pipelines.records.dataset import RecordDataset

_SAMPLED = 64  # records that are read, unless all are
_SKIPPED = "skipped while encoding"


def is_records(path: Path) -> bool:
    """Whether a folder was made by the encoding job, finished or not."""
    return (path / "plan.json").is_file() or (path / "manifest.json").is_file()


def inspect_records(path: Path, *, thorough: bool = False) -> Inspection:
    """Looks at a records folder.

    Args:
        path: the folder.
        thorough: read every record.

    Raises:
        ValueError: if not even its lists can be read.
    """
    if not (path / "manifest.json").is_file():
        return _unfinished(path)
    try:
        dataset = RecordDataset(path)
    except Exception as error:  # the libraries below raise types of their own
        raise ValueError(f"{path} cannot be opened ({error}); encode it again") from error
    found = Inspection(str(path), length_unit="windows")
    found.lengths = [row.count for row in dataset.episodes if row.count]
    found.readable = len(found.lengths)
    found.problems += [Problem(_SKIPPED, row["id"], row["reason"]) for row in dataset.skipped]
    for row in dataset.episodes:
        if row.count:
            texts = {dataset.instructions[i] for i in row.instructions}
            found.instructions.update(texts)
            found.problems += check_instructions(row.id, tuple(texts))
    splits = Counter()
    for row in dataset.episodes:
        splits[row.split] += row.count
    files = [file for file in path.iterdir() if file.is_file()]
    found.facts = [
        ("format", "records"),
        ("dataset", dataset.name),
        ("windows", ", ".join(f"{count:,} {split}" for split, count in splits.items())),
        ("episodes", f"{found.readable:,} of {len(dataset.episodes):,}"),
        ("shards", f"{len(list(path.glob('*.arrayrecord'))):,}, finished"),
        ("size", f"{sum(file.stat().st_size for file in files) / 1e9:,.3f} GB"),
        *_settings(dataset.settings),
        ("fingerprint", dataset.fingerprint),
    ]
    _read(found, dataset, thorough)
    _ranges(found, dataset)
    return found


def _unfinished(path: Path) -> Inspection:
    try:
        plan = json.loads((path / "plan.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}/plan.json is damaged ({error}); encode it again") from error
    found = Inspection(str(path), length_unit="windows")
    for file in sorted(path.glob("shard_*.npz")):
        try:
            with np.load(file, allow_pickle=False) as columns:
                rows = json.loads(str(columns["rows"]))
        except Exception as error:
            found.problems.append(Problem("unreadable shard", file.name, str(error)))
            continue
        for row in rows:
            if "reason" in row:
                found.problems.append(Problem(_SKIPPED, row["id"], row["reason"]))
            elif row["count"]:
                found.lengths.append(row["count"])
                found.instructions.update(set(row["instructions"]))
                found.problems += check_instructions(row["id"], row["instructions"])
    found.readable = len(found.lengths)
    done, each = len(list(path.glob("shard_*.npz"))), plan.get("episodes_per_shard")
    total = f" of {-(-plan['episodes'] // each)}" if each and "episodes" in plan else ""
    found.facts = [
        ("format", "records, not finished: run the encoding job again"),
        ("windows", f"{int(sum(found.lengths)):,}"),
        ("episodes", f"{found.readable:,} of {plan.get('episodes', 0):,}"),
        ("shards", f"{done}{total} finished"),
        *_settings(plan),
    ]
    return found


def _settings(settings: dict[str, Any]) -> list[tuple[str, str]]:
    shown = ((key, settings.get(key)) for key in ("clip", "policy_io", "identity"))
    return [(key, _in_words(value)) for key, value in shown if value]


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(
            f"{key} ({_in_words(part)})" if isinstance(part, dict) else f"{key} {part}"
            for key, part in value.items()
        )
    return str(value)


def _read(found: Inspection, dataset: RecordDataset, thorough: bool) -> None:
    """Reads records; latents that are not finite would poison a whole run."""
    total = len(dataset)
    counted = sum(row.count for row in dataset.episodes)
    if counted != total:
        text = f"the lists name {counted} records, the shards hold {total}"
        found.problems.append(Problem("records missing", ALL, text))
    chosen = np.unique(np.linspace(0, total - 1, total if thorough else _SAMPLED).astype(int))
    for index in tqdm(chosen, desc="inspect", unit="record"):
        try:
            record = dataset[int(index)]
        except Exception as error:
            found.problems.append(Problem("unreadable record", f"record {index}", str(error)))
            continue
        owner = dataset.episodes[int(record["episode"])].id
        for name, value in record.items():
            if name not in found.streams:
                found.streams[name] = SeenStream(value.shape, value.dtype.name)
            if not np.isfinite(value.astype(np.float32)).all():
                text = f"{name} of record {index}"
                found.problems.append(Problem("NaN or infinity", owner, text))
    found.facts.append(("records read", f"{len(chosen):,} of {total:,}"))


def _ranges(found: Inspection, dataset: RecordDataset) -> None:
    """Ranges of the numeric columns over all windows, per dimension of the last axis."""
    for name in ("actions", "proprio"):
        if name not in dataset.shapes:
            continue
        try:
            column = dataset.columns(name)[name]
        except Exception as error:
            found.problems.append(Problem("unreadable shard", ALL, f"column {name}: {error}"))
            continue
        flat = column.reshape(-1, column.shape[-1]).astype(np.float64)
        finite = np.isfinite(flat)
        found.streams[name] = SeenStream(
            column.shape[1:],
            column.dtype.name,
            low=np.min(flat, axis=0, where=finite, initial=np.inf),
            high=np.max(flat, axis=0, where=finite, initial=-np.inf),
        )
