"""Inspecting a folder of encoded records, finished or not."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.inspect import ALL, LOSS_ROWS, Inspection, lost
from data_pipelines.inspect_episode import (
    StreamSummary,
    check_instructions,
    finite_range,
    spread,
)
from data_pipelines.normalize import VECTORS, dimension_names
from data_pipelines.progress import Bar
from data_pipelines.records import RecordDataset, read_columns
from data_pipelines.vectors import modes, parse

_SAMPLED_RECORDS = 64


def is_records(path: Path) -> bool:
    """Whether a folder was written by the encoding job, finished or not."""
    return (path / "plan.json").is_file() or (path / "manifest.json").is_file()


def inspect_records(path: Path, *, thorough: bool = False) -> Inspection:
    """Inspects a records folder; `thorough` reads every record."""
    if not (path / "manifest.json").is_file():
        return _inspect_unfinished(path)
    try:
        dataset = RecordDataset(path)
    except Exception as error:  # the libraries below raise types of their own
        raise ValueError(f"{path} cannot be opened ({error}); encode it again") from error
    found = Inspection(str(path), length_unit="windows")
    _add_rows(found, dataset.skipped)
    splits, texts = Counter(), dataset.instructions
    for row in dataset.episodes:
        splits[row.split] += row.count
        _add_rows(found, [{**vars(row), "instructions": [texts[i] for i in row.instructions]}])
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    found.facts = [
        ("format", "records"),
        ("dataset", dataset.name),
        ("windows", ", ".join(f"{count:,} {split}" for split, count in splits.items())),
        *([("variants", f"{dataset.variants} of each window")] if dataset.variants > 1 else []),
        ("episodes", f"{found.readable:,} of {len(dataset.episodes):,}"),
        ("shards", f"{len(list(path.glob('*.arrayrecord'))):,}, finished"),
        ("size", f"{size / 1e9:,.3f} GB"),
        *_settings(dataset.settings),
        ("fingerprint", dataset.fingerprint),
    ]
    names = [row.id for row in dataset.episodes]
    found.add_findings({text: [names[i] for i in at] for text, at in dataset.findings.items()})
    _read_records(found, dataset, thorough)
    _read_columns(found, dataset)
    return found


def _inspect_unfinished(path: Path) -> Inspection:
    try:
        plan = json.loads((path / "plan.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}/plan.json is damaged ({error}); encode it again") from error
    found = Inspection(str(path), length_unit="windows")
    shards, findings = sorted(path.glob("shard_*.npz")), defaultdict(list)
    for file in shards:
        try:
            rows = json.loads(str(read_columns(file, "rows")["rows"]))
        except Exception as error:
            found.add_problem("unreadable shard", file.name, str(error))
        else:
            _add_rows(found, rows)
            for row, finding in ((r, f) for r in rows for f in r.get("findings", ())):
                findings[finding].append(row["id"])
    found.add_findings(findings)
    total = math.ceil(plan["episodes"] / plan["episodes_per_shard"])
    found.facts = [
        ("format", "records, not finished: run the encoding job again"),
        ("windows", f"{int(sum(found.lengths)):,}"),
        ("episodes", f"{found.readable:,} of {plan['episodes']:,}"),
        ("shards", f"{len(shards)} of {total} finished"),
        *_settings(plan),
    ]
    return found


def _add_rows(found: Inspection, rows: Iterable[Mapping[str, Any]]) -> None:
    """Counts rows of encoded episodes: `id`, and `reason` or `count` and `instructions`."""
    for row in rows:
        if "reason" in row:
            found.add_problem("skipped while encoding", row["id"], row["reason"])
        elif row["count"]:
            found.readable += 1
            found.lengths.append(row["count"])
            found.instructions.update(dict.fromkeys(row["instructions"], 1))
            found.problems += check_instructions(row["id"], row["instructions"])


def _settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (key, json.dumps(settings[key], ensure_ascii=False)[1:-1].replace('"', ""))
        for key in ("clip", "policy_io", "identity")
        if settings.get(key)
    ]


def _read_records(found: Inspection, dataset: RecordDataset, thorough: bool) -> None:
    total = len(dataset)
    counted = sum(row.count for row in dataset.episodes)
    if counted != total:
        text = f"the manifest lists {counted} records, the shards hold {total}"
        found.add_problem("records missing", ALL, text)
    chosen = spread(total, total if thorough else _SAMPLED_RECORDS).tolist()
    every = range(dataset.variants)
    reads = [(i, v) for i in chosen for v in every] if thorough else [*zip(chosen, cycle(every))]
    for index, variant in Bar(reads, desc="inspect", unit="record"):
        try:
            record = dataset.read(index, variant)
        except Exception as error:
            found.add_problem("unreadable record", f"record {index}", str(error))
            continue
        owner = dataset.episodes[int(record["episode"])].id
        for name, value in record.items():
            found.streams.setdefault(name, StreamSummary(value.shape, value.dtype.name))
            # A single NaN in the latents would spoil a whole run.
            if not np.isfinite(value.astype(np.float32)).all():
                found.add_problem("NaN or infinity", owner, f"{name} of record {index}")
    found.facts.append(("records read", f"{len(reads):,} of {total * dataset.variants:,}"))


def _read_columns(found: Inspection, dataset: RecordDataset) -> None:
    """Ranges of the numeric columns over all windows, per dimension of the last axis."""
    for name in VECTORS:
        if name not in dataset.shapes:
            continue
        try:
            column = dataset.columns(name)[name]
        except Exception as error:
            found.add_problem("unreadable shard", ALL, f"column {name}: {error}")
            continue
        low, high = finite_range(column.reshape(-1, column.shape[-1]))
        found.streams[name] = StreamSummary(column.shape[1:], column.dtype.name, low=low, high=high)
        parts, dim = parse(dataset.settings["dataset"].get(VECTORS[name], "")), column.shape[-1]
        if not parts:
            continue
        names = dimension_names(parts, dim)
        few = column[spread(len(column), LOSS_ROWS), :: -(-column.shape[1] // 4)]
        for i, what in lost(few, modes(parts, dim)):
            text = f"{name}: dimension {i} ({names[i]}) {what}"
            found.add_problem("lost by normalisation", ALL, text)
