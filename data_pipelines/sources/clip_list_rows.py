"""Rows of a list in CSV, TSV, JSONL or JSON; a malformed one becomes a message in its place."""

import csv
import json
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from data_pipelines.sources.clip_list_layouts import ego4d_rows

LIST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
_LONGEST_RECORD = 20  # lines; a longer quoted field is a quote that was never closed

Row = tuple[int, dict[str, Any] | str]  # number of the line or entry; the row, or what is wrong


def read_rows(path: Path, narration_seconds: float) -> Iterator[Row]:
    """The rows of a list, in its order.

    What is not UTF-8 is kept as lone surrogates, which `undecodable` finds: one bad line is then an
    error of that line only.

    Raises:
        ValueError: if the file is of another kind, or cannot be read at all.
    """
    suffix = path.suffix.lower()
    if suffix not in LIST_SUFFIXES:
        raise ValueError(f"{path}: a list of clips is one of {', '.join(LIST_SUFFIXES)}")
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if suffix == ".json":
            yield from _json_entries(path, file.read(), narration_seconds)
        elif suffix == ".jsonl":
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _json_object(line)
        else:
            yield from _csv_rows(path, file)


def undecodable(text: str) -> str:
    """What is wrong with a text that is not UTF-8; "" if it is."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        return f"is not UTF-8 (character {error.start} is the byte 0x{byte:02x})"
    return ""


def _json_entries(path: Path, text: str, narration_seconds: float) -> Iterator[Row]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file ({error}); copy it again") from None
    if isinstance(content, dict):
        videos = content.get("videos")
        rows = ego4d_rows(videos if isinstance(videos, dict) else content, narration_seconds)
    elif isinstance(content, list):
        fault = "the entry is no object with names"
        rows = (row if isinstance(row, dict) else fault for row in content)
    else:
        raise ValueError(
            f"{path}: a JSON list of clips is expected, not a {type(content).__name__}"
        )
    yield from enumerate(rows, 1)


def _json_object(line: str) -> dict[str, Any] | str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not a JSON object ({error})"
    return row if isinstance(row, dict) else "not a JSON object"


def _csv_rows(path: Path, file: Iterator[str]) -> Iterator[Row]:
    header = next(file, "")
    if wrong := undecodable(header):
        raise ValueError(f"{path}: the first line {wrong}; save the list as UTF-8")
    delimiter = max(",\t;", key=header.count)
    columns = [column.strip() for column in _record(header, delimiter) or []]
    number, ahead = 2, deque()
    while True:
        ahead.extend(islice(file, _LONGEST_RECORD - len(ahead)))
        if not ahead:
            return
        lines, row = _next_row(ahead, columns, delimiter)
        if row:
            yield number, row
        number += lines
        for _ in range(lines):
            ahead.popleft()


def _next_row(
    ahead: deque[str], columns: list[str], delimiter: str
) -> tuple[int, dict[str, str] | str]:
    """How many lines the next row has, and the row; after an error, go on with the next line."""
    text = ""
    for lines, line in enumerate(ahead, 1):
        text += line
        try:
            fields = _record(text, delimiter)
        except csv.Error as error:
            return 1, f"a malformed line ({error})"
        if fields is None:  # inside quotes at the end of the line
            continue
        if not any(fields):
            return lines, ""
        if len(fields) == len(columns):
            return lines, dict(zip(columns, fields))
        return 1, f"the line has {len(fields)} fields, but the first line has {len(columns)}"
    return 1, "a quote is opened and never closed"


def _record(text: str, delimiter: str) -> list[str] | None:
    try:
        return next(csv.reader([text], delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            return None
        raise
