"""The metadata of LeRobot datasets, versions 2 and 3: features, episodes, tasks, names of files.

What a file lacks or contradicts is kept in `faults` and `findings`, so that it costs the episodes
that need it, and no others.
"""

import glob
import json
import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipelines.episode import reason

BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "task_index", "index")
_PLACEHOLDERS = ("episode_chunk", "episode_index", "chunk_index", "file_index", "video_key")
_LISTED = re.compile(r"(data|videos)/|(episode_index|length|tasks|dataset_from_index|episode_id)$")
_UNNAMED = "__index_level_0__"  # what pandas calls an index without a name


Task = tuple[int, str, list[str]]  # task_index, text, other texts that describe it


@dataclass(frozen=True)
class Features:
    """The features of a dataset by how they are stored; `unused` ones with the reason."""

    vectors: Mapping[str, tuple[int, ...] | None]  # with their shape; None if it is not given
    videos: Sequence[str]
    images: Sequence[str]
    unused: Mapping[str, str]


@dataclass(frozen=True)
class Meta:
    """What meta/ says."""

    path: Path  # the dataset's folder
    version: str
    fps: float
    chunks_size: int
    templates: Mapping[str, str]  # "data_path", "video_path"
    video_fault: str  # why "video_path" cannot be used
    features: Mapping[str, dict]  # of info.json
    names: Mapping[str, Sequence[str]]  # of the numbers of a feature, where they are all named
    episodes: pa.Table  # a row per line of the list of episodes
    listed: Mapping[int, int]  # episode_index -> its row in `episodes`
    repeated: frozenset[int]  # episodes with several rows
    numbers: Sequence[int]  # episode_index of each episode
    tasks: Mapping[int, tuple[str, ...]]  # task_index -> its text; several if they contradict
    task_names: Mapping[int, Sequence[str]]  # task_index -> its text and what else it is called
    faults: Sequence[str]  # for messages
    findings: tuple[str, ...]  # that concern every episode

    @property
    def list_name(self) -> str:
        """The list of episodes, for messages."""
        return "meta/episodes.jsonl" if self.version.startswith("v2.") else "meta/episodes"

    def placeholders(self, template: str) -> list[str]:
        """What "data_path" or "video_path" depends on."""
        return _placeholders(self.templates[template])

    def file(self, template: str, listed: str, row: dict, **fields: str) -> tuple[Path, list[str]]:
        """A file of an episode, and findings.

        Args:
            template: "data_path" or "video_path".
            listed: the beginning of the columns of `episodes` that number the file in version 3.
            row: the episode's.
            **fields: further placeholders.

        Raises:
            ValueError: if the list of episodes lacks a number that the template needs.
        """
        number = row["episode_index"]
        fields |= {
            "episode_index": number,
            "episode_chunk": number // self.chunks_size,
            "chunk_index": row.get(f"{listed}chunk_index"),
            "file_index": row.get(f"{listed}file_index"),
        }
        text = self.templates[template]
        if missing := [name for name in self.placeholders(template) if fields[name] is None]:
            names = [f"{listed}{name}" for name in missing]
            raise ValueError(
                f"{self.path}: {template} of meta/info.json is {text!r}, but {self.list_name} has "
                f"no {names} for episode {number}; correct one of them"
            )
        try:
            file = self.path / text.format(**fields).replace("\\", "/")  # written on Windows
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.path}: {template} of meta/info.json, {text!r}, cannot be filled in for "
                f"episode {number} ({error}); correct it"
            ) from error
        if file.exists() or "episode_chunk" not in self.placeholders(template):
            return file, []
        # The name holds the episode, so it is the same file in any folder.
        pattern = "".join(
            glob.escape(literal) + ("" if name is None else _part(name, spec, fields))
            for literal, name, spec, _ in string.Formatter().parse(text)
        )
        found = list(self.path.glob(pattern))
        if len(found) != 1:
            return file, []
        return found[0], [
            "chunks_size of meta/info.json does not fit the folders; the file was found by its name"
        ]


def _part(name: str, spec: str, fields: Mapping[str, Any]) -> str:
    return "*" if name == "episode_chunk" else glob.escape(format(fields[name], spec))


def _placeholders(template: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]


def read_meta(path: Path) -> Meta:
    """Reads meta/ of a dataset; see `lerobot.open_lerobot` for what it raises."""
    info = _read_info(path)
    version = str(info.get("codebase_version", "without a version"))
    version = f"v{version}" if version[:1].isdigit() else version  # as some converters write it
    faults: list[str] = []
    if version.startswith("v2."):
        episodes, tasks = _episodes_v2(path, faults), _tasks_v2(path, faults)
    elif version.startswith("v3."):
        episodes, tasks = _episodes_v3(path, faults), _texts_v3(path, "task", faults)
    else:
        raise ValueError(
            f"{path} is a LeRobot dataset {version}; v2.0, v2.1 and v3.0 are supported; convert it "
            "with the lerobot package"
        )
    # If an episode has several rows, LeRobot takes the last. An episode that should exist but is
    # not listed stays in the sequence, so that it is counted and reported as unreadable.
    listed, repeated = {}, set()
    for row, number in enumerate(episodes["episode_index"].to_pylist()):
        if number in listed:
            repeated.add(number)
        listed[number] = row
    total = int(info["total_episodes"])
    findings = []
    if len(listed) > total:
        findings.append(
            f"total_episodes of meta/info.json is {total}, but the list of episodes has "
            f"{len(listed)}; the list was taken"
        )
    splits = info.get("splits")
    if isinstance(splits, dict) and (others := sorted(splits.keys() - {"train"})):
        findings.append(
            f"meta/info.json has the splits {others}; they are not read: the episodes of all are "
            "taken, and config.validation_share divides them"
        )
    column_names = {}
    for key, shape in sort_features(info["features"]).vectors.items():
        flat, size = _flat(info["features"][key].get("names")), math.prod(shape or ())
        if shape is not None and len(flat) == size:
            column_names[key] = tuple(flat)
        elif shape is not None and len(flat) not in (0, len(shape)):
            findings.append(
                f"{key}: meta/info.json names {len(flat)} of its {size} numbers; all were taken"
            )
    names: dict[int, list[str]] = {}
    for index, text, called in tasks:
        names.setdefault(index, []).extend((text, *called))
    return Meta(
        path=path,
        version=version,
        fps=info["fps"],
        chunks_size=int(info.get("chunks_size") or 1000),
        templates={key: info[key] for key in ("data_path", "video_path") if info.get(key)},
        video_fault=_template_fault(info, "video_path"),
        features=info["features"],
        names=column_names,
        episodes=episodes,
        listed=listed,
        repeated=frozenset(repeated),
        # After the deletion of an episode its number is free, if the others keep theirs.
        numbers=sorted(listed if len(listed) >= total else {*listed, *range(total)}),
        tasks=_by_number(tasks),
        task_names=names,
        faults=faults,
        findings=tuple(findings),
    )


def numbered(meta: Meta, key: str) -> Mapping[int, tuple[str, ...]]:
    """The texts that the integers of a feature stand for, as `Meta.tasks`.

    Raises:
        ValueError: if nothing says which texts these are.
    """
    if key.startswith("annotation.") or f"_{key}".endswith("_task_index"):  # GR00T, and others
        return meta.tasks
    if key != "subtask_index":
        raise ValueError(
            f"{meta.path}: nothing says which texts the integers of {key} stand for; the option "
            "texts takes strings, subtask_index, annotation.* and *_task_index"
        )
    faults: list[str] = []
    texts = _texts_v3(meta.path, "subtask", faults)
    if faults:
        raise ValueError(f"{faults[0]}; it has the texts of {key}; copy it again")
    return _by_number(texts)


def _by_number(rows: Sequence[Task]) -> dict[int, tuple[str, ...]]:
    texts: dict[int, dict[str, None]] = {}
    for index, text, _ in rows:
        texts.setdefault(index, {})[text] = None
    return {index: tuple(found) for index, found in texts.items()}


def _read_info(path: Path) -> dict:
    """The content of meta/info.json; every entry that is needed from it is checked."""
    file = path / "meta/info.json"
    if not file.is_file():
        raise ValueError(f"{path} is not a LeRobot dataset: it has no meta/info.json")
    try:
        info = json.loads(file.read_text(encoding="utf-8-sig"))
        features = info["features"] if isinstance(info.get("features"), dict) else {}
    except (AttributeError, OSError, ValueError) as error:
        why = reason(file, f"{type(error).__name__}: {error}")
        raise ValueError(f"{file} cannot be read ({why}); copy it again") from error
    needed = {
        "features": len(features) > 0,
        "fps, a positive number": _is_number(info.get("fps")) and info["fps"] > 0,
        "data_path": isinstance(info.get("data_path"), str),
        "total_episodes, an integer": _is_number(total := info.get("total_episodes"))
        and total == int(total) >= 0,
        "chunks_size, a positive integer": _is_number(size := info.get("chunks_size") or 1000)
        and size >= 1,
    }
    if missing := [name for name, fits in needed.items() if not fits]:
        raise ValueError(
            f"{file} must have {'; '.join(missing)}; correct it, or copy or convert the dataset "
            "again"
        )
    if fault := _template_fault(info, "data_path"):
        raise ValueError(f"{file}: {fault}")
    return info


def _template_fault(info: Mapping, key: str) -> str:
    """Why a template of file names cannot be used; "" if it can."""
    template = info.get(key)
    if not isinstance(template, str):
        return f"meta/info.json has no {key}"
    try:
        unknown = set(_placeholders(template)) - set(_PLACEHOLDERS)
    except ValueError as error:  # such as a single brace
        return f"{key} is {template!r} ({error}); correct it"
    if unknown:
        return (
            f"{key} is {template!r}, and nothing says what {sorted(unknown)} stands for; the "
            f"placeholders are {list(_PLACEHOLDERS)}"
        )
    return ""


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def sort_features(features: Mapping[str, Any]) -> Features:
    """The features but the bookkeeping, by how they are stored."""
    vectors, videos, images, unused = {}, [], [], {}
    for key, feature in features.items():
        dtype = feature.get("dtype") if isinstance(feature, dict) else None
        if key in BOOKKEEPING:
            continue
        if not isinstance(dtype, str):
            unused[key] = "meta/info.json gives it no dtype"
        elif _is_depth(feature):
            unused[key] = "meta/info.json says that it is depth, which is not read"
        elif dtype == "string":
            unused[key] = "it holds text, which is read if the option texts names it"
        elif dtype == "language":
            unused[key] = "it holds texts as rows of LeRobot's language, which are not read"
        elif dtype == "video":
            videos.append(key)
        elif dtype == "image":
            images.append(key)
        else:
            vectors[key] = shape_of(feature)
    return Features(vectors, videos, images, unused)


def shape_of(feature: Mapping) -> tuple[int, ...] | None:
    """The shape that meta/info.json gives a feature; None if it gives none."""
    given = feature.get("shape")
    sizes = given if isinstance(given, list) else [given]
    whole = all(isinstance(size, int) and not isinstance(size, bool) for size in sizes)
    return tuple(sizes) if whole else None


def _flat(names: Any) -> list[str]:
    """The names in a list, or in a mapping of groups of them or to their places."""
    if isinstance(names, dict):
        if all(isinstance(place, int) for place in names.values()):
            return sorted(names, key=names.get)
        return [name for key, group in names.items() for name in (_flat(group) or [key])]
    if isinstance(names, list):
        return [n for name in names for n in (_flat(name) or [str(name)])]
    return []


def _is_depth(feature: Mapping) -> bool:
    found = [feature, *(feature.get(key) for key in ("info", "video_info"))]
    infos = [info for info in found if isinstance(info, dict)]
    marked = any(info.get("is_depth_map") or info.get("video.is_depth_map") for info in infos)
    formats = [str(info.get("video.pix_fmt") or info.get("pix_fmt") or "") for info in infos]
    return marked or any(name.startswith("gray1") for name in formats)  # gray10le, ...


def _episodes_v2(path: Path, faults: list[str]) -> pa.Table:
    file = path / "meta/episodes.jsonl"
    if not file.is_file():
        raise ValueError(f"{path} is incomplete: meta/episodes.jsonl is missing; copy it again")

    def row(line: dict) -> dict:
        tasks = line.get("tasks") or []
        tasks = [tasks] if isinstance(tasks, str) else tasks
        tasks = [text for text in tasks if isinstance(text, str)]  # not their numbers
        index, length = int(line["episode_index"]), int(line["length"])
        return {"episode_index": index, "length": length, "tasks": tasks}

    kinds = {"episode_index": pa.int64(), "length": pa.int64(), "tasks": pa.list_(pa.string())}
    rows = _read_lines(file, row, faults)
    if not rows and faults:
        raise ValueError(f"{path} has no readable list of episodes ({faults[0]})")
    return pa.Table.from_pylist(rows, pa.schema(kinds))  # far smaller than a list of dicts


def _tasks_v2(path: Path, faults: list[str]) -> list[Task]:
    def row(line: dict) -> Task:
        if not isinstance(line["task"], str):
            raise ValueError(f"task is {line['task']!r}, not a text")
        called = [value for value in line.values() if isinstance(value, str)]
        return int(line["task_index"]), line["task"], called

    return _read_lines(path / "meta/tasks.jsonl", row, faults)


def _read_lines(file: Path, row: Callable[[dict], Any], faults: list[str]) -> list:
    """The rows of a JSONL file; the first bad lines are added to `faults`."""
    if not file.is_file():
        faults.append(f"{file} is missing")
        return []
    lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    if (why := reason(file, "")) and lines:  # a placeholder has lines, too
        faults.append(f"{file}: {why}")
        return []
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(row(json.loads(line.decode("utf-8"))))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if len(faults) < 5:
                faults.append(f"{file} line {number}: {type(error).__name__}: {error}")
    return rows


def _episodes_v3(path: Path, faults: list[str]) -> pa.Table:
    tables = []
    for file in sorted((path / "meta/episodes").glob("*/[!.]*.parquet")):  # as LeRobot
        try:
            # The statistics are most of the file, and nothing else may cost the list either.
            names = [n for n in pq.read_schema(file).names if _LISTED.match(n)]
            table = pq.read_table(file, columns=names)
            tables.append(table.cast(table.schema.remove_metadata()))
        except (OSError, pa.ArrowException) as error:
            faults.append(f"{file} is damaged: {reason(file, error)}")
    if not tables:
        found = "; ".join(faults) or "no parquet files under meta/episodes"
        raise ValueError(f"{path} is incomplete: {found}; copy it again")
    try:
        table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    except pa.ArrowException as error:
        raise ValueError(
            f"{path}/meta/episodes: its files have columns of different types ({error}); convert "
            "the dataset again"
        ) from error
    if missing := {"episode_index", "length"} - set(table.column_names):
        raise ValueError(f"{path}/meta/episodes has no {sorted(missing)}; convert it again")
    for key in ("episode_index", "length"):
        if not pa.types.is_integer(table[key].type) or table[key].null_count:
            raise ValueError(f"{path}/meta/episodes: not every {key} is an integer")
    return table


def _texts_v3(path: Path, name: str, faults: list[str]) -> list[Task]:
    """The tasks from tasks.parquet, a data frame of pandas; subtasks.parquet is like it.

    The text is the column "task" or the index, which may have another name or none. Other columns
    hold other things, such as categories or short names.
    """
    file, number = path / f"meta/{name}s.parquet", f"{name}_index"
    if not file.is_file():
        faults.append(f"{file} is missing")
        return []
    try:
        table = pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        faults.append(f"{file} cannot be read: {reason(file, error)}")
        return []
    named = [n for n in _pandas_index(table) if n in table.column_names and n != name]
    texts = [n for n in (name, *named) if n in table.column_names and _is_text(table[n].type)]
    if number not in table.column_names or not texts or (texts[0] != name and texts[1:]):
        faults.append(
            f"{file} has the columns {table.column_names}, but must have {number} and the text "
            f"as the column {name} or as the index of pandas"
        )
        return []
    rows = zip(table[number].to_pylist(), table[texts[0]].to_pylist(), table.to_pylist())
    return [
        (int(index), text, [value for value in row.values() if isinstance(value, str)])
        for index, text, row in rows
        if index is not None and text is not None
    ]


def _pandas_index(table: pa.Table) -> list[str]:
    """The columns that were the index of the data frame."""
    try:
        described = json.loads((table.schema.metadata or {})[b"pandas"])
        return [name for name in described["index_columns"] if isinstance(name, str)]
    except (KeyError, TypeError, ValueError):
        return [_UNNAMED]


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):  # pandas' categories
        kind = kind.value_type
    types = pa.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
