"""Clips of longer videos, from a list: file, start, end, caption.

    clips.csv, .tsv     a header, then a clip per line
    clips.jsonl         an object per line
    train.json          Something-Something v2's labels, Ego4D's narrations, or a list of objects

The published lists of EPIC-KITCHENS-100, Something-Something v2 and Ego4D are read as they are
(`clip_list_layouts.py`). A clip is the frames with start <= time < end, and an episode with one
stream, "video". A malformed line is an episode that cannot be loaded, and says why.
"""

import csv
import json
import re
import sys
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.episode import Episode, LazyEpisodes
from data_pipelines.pickles import read_array_pickle
from data_pipelines.video import VideoFile, VideoPool
from mvjax.weights.safetensors_files import read_safetensors

# How lists of clips name their columns: one's own list, and three published datasets.


@dataclass(frozen=True)
class Layout:
    """Where the parts of a clip are found in a row.

    Attributes:
        file: the column with the video's path, or a pattern of columns, "{part}/{id}.mp4".
        caption: the column with the text, or (in JSON) with a list of texts.
        start, end: columns with times: seconds, or [HH:]MM:SS.ff; the end is exclusive. An empty
            field is the beginning or the end of the video.
        start_frame, end_frame: columns with frame numbers from 0, for rows without times.
        fps: the column with the rate that the frame numbers count in.
        id: the column with a name for the clip; without one it is made of the file and times.
        videos: where the videos are, seen from the list's folder.
    """

    file: str = "file"
    caption: str = "caption"
    start: str = "start"
    end: str = "end"
    start_frame: str = "start_frame"
    end_frame: str = "end_frame"
    fps: str = "fps"
    id: str = "id"
    videos: str = "."


LAYOUTS = {
    "plain": Layout(),
    # EPIC-KITCHENS-100: EPIC_100_train.csv; the videos as its download script puts them.
    "epic": Layout(
        file="{participant_id}/videos/{video_id}.MP4",
        caption="narration",
        start="start_timestamp",
        end="stop_timestamp",
        end_frame="stop_frame",
        id="narration_id",
    ),
    # Something-Something v2: labels/train.json; a clip is a whole file.
    "ssv2": Layout("{id}.webm", "label", videos="../20bn-something-something-v2"),
    # Ego4D: annotations/narration.json, through `ego4d_rows`.
    "ego4d": Layout("{video_uid}.mp4", "narration_text", videos="../full_scale"),
}


def find_layout(row: Any) -> str:
    """The name of the layout that a row has; "plain" if it is none of the published ones."""
    columns = row.keys() if isinstance(row, dict) else set()
    if {"participant_id", "video_id", "narration"} <= columns:
        return "epic"
    if {"video_uid", "narration_text"} <= columns:
        return "ego4d"
    return "ssv2" if {"id", "label"} <= columns and "file" not in columns else "plain"


def ego4d_rows(narrations: dict, seconds: float) -> Iterator[Any]:
    """A row per narration of Ego4D, which is one instant: the clip is the time around it.

    Args:
        narrations: the content of narration.json, {video_uid: {"narration_pass_1":
            {"narrations": [{"timestamp_sec", "narration_text", ...}]}, ...}}.
        seconds: length of a clip.
    """
    for uid, passes in narrations.items():
        for name in ("narration_pass_1", "narration_pass_2"):
            content = passes.get(name) if isinstance(passes, dict) else None
            rows = content.get("narrations") if isinstance(content, dict) else None
            for row in rows if isinstance(rows, list) else []:
                time = row.get("timestamp_sec") if isinstance(row, dict) else None
                if isinstance(time, int | float):
                    edges = max(time - seconds / 2, 0), time + seconds / 2
                    row = row | dict(zip(("start", "end"), (round(edge, 6) for edge in edges)))
                else:
                    row = f"a narration of {uid} has no timestamp_sec"
                yield {"video_uid": uid, **row} if isinstance(row, dict) else row


# Rows of a list in CSV, TSV, JSONL or JSON; a malformed one becomes a message in its place.


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


STREAM = "video"

_NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)(e[-+]?\d{1,2})?")


def recognises(path: Path) -> bool:
    """Whether this is a list of clips with the usual columns."""
    if not path.is_file() or path.suffix.lower() not in LIST_SUFFIXES:
        return False
    if path.suffix.lower() == ".json":  # these are large, and one document
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            start = file.read(10_000)
        listed = start.lstrip().startswith("[") and (
            ('"id"' in start and '"label"' in start) or ('"file"' in start and '"caption"' in start)
        )
        return listed or '"narration_pass_' in start
    try:
        row = next((row for _, row in islice(read_rows(path, 1.0), 5) if isinstance(row, dict)), {})
    except (ValueError, OSError):
        return False
    return find_layout(row) != "plain" or {"file", "caption"} <= row.keys()


def open_clip_list(
    path: Path,
    *,
    name: str,
    embodiment: str,
    layout: str = "auto",
    columns: Mapping[str, str] | None = None,
    videos: str = "",
    fps: float | None = None,
    narration_seconds: float = 4.0,
) -> Sequence[Episode]:
    """Open a list of clips; the videos are read when an episode is asked for.

    Args:
        path: the list.
        name: of the dataset, becomes `Episode.source`.
        embodiment: whose body is seen, e.g. "human".
        layout: "plain", "epic", "ssv2" or "ego4d"; "auto" looks at the columns.
        columns: other names of columns, such as {"file": "path", "caption": "text"}; the names are
            those of `Layout`.
        videos: the folder that the file names are relative to; "" is the layout's, which for a
            list of one's own is the list's folder.
        fps: rate that frame numbers count in; None takes the row's own. Times need none.
        narration_seconds: length of a clip around an Ego4D narration, which is one instant.

    Raises:
        ValueError: if the list cannot be read, has no clips, or no line of it can be used.
    """
    path = Path(path)
    if layout not in ("auto", *LAYOUTS):
        raise ValueError(f"{path}: layout {layout!r} is not one of {', '.join(('auto', *LAYOUTS))}")
    rows = read_rows(path, narration_seconds)
    if layout == "auto":
        first = list(islice(rows, 100))
        layout = find_layout(next((row for _, row in first if isinstance(row, dict)), {}))
        rows = chain(first, rows)
    columns = dict(columns or {})
    if unknown := columns.keys() - asdict(LAYOUTS[layout]).keys():
        raise ValueError(
            f"{path}: columns has no {sorted(unknown)}; it has {sorted(asdict(LAYOUTS[layout]))}"
        )
    chosen = replace(LAYOUTS[layout], **columns)
    clips = [_clip(number, row, chosen) for number, row in rows]
    if all(clip.fault for clip in clips):
        why = f"number {clips[0].number}: {clips[0].fault}" if clips else "it is empty"
        raise ValueError(f"{path} has no usable clip among {len(clips)} lines; {why}")
    folder = Path(videos) if videos else path.parent / chosen.videos
    rate = None if fps is None else Fraction(str(fps))
    dataset = _Dataset(path, name, embodiment, clips, _repeats(clips), folder, rate)
    return LazyEpisodes(len(clips), dataset.load)


class _Clip(NamedTuple):
    """A row of the list as it is written there; numbers are understood when it is loaded."""

    number: int  # of its line or entry
    fault: str = ""
    file: str = ""
    captions: tuple[str, ...] = ()
    start: str = ""
    end: str = ""
    start_frame: str = ""
    end_frame: str = ""
    fps: str = ""
    id: str = ""

    def name(self) -> str:
        """Made of the content, so that lines added elsewhere in the list change no clip's name."""
        part = "-".join((self.start or self.start_frame, self.end or self.end_frame)).strip("-")
        return self.id or (f"{self.file} {part}" if part else self.file)


@dataclass(frozen=True)
class _Dataset:
    path: Path
    name: str
    embodiment: str
    clips: list[_Clip]
    repeats: dict[int, int]  # index of a clip -> how many of the same name come before it
    videos: Path
    fps: Fraction | None
    pool: VideoPool = field(default_factory=VideoPool)

    def load(self, index: int) -> Episode:
        clip = self.clips[index]
        try:
            if clip.fault:
                raise ValueError(clip.fault)
            start, end = _part(clip, self.fps)
            timed = bool(clip.start or clip.end)
            video = VideoFile(self.videos / clip.file, start, end, self.pool, exact=timed)
            stream = video.stream()
        except ValueError as error:
            what = "entry" if self.path.suffix.lower() == ".json" else "line"
            raise ValueError(f"{self.path}, {what} {clip.number}: {error}") from None
        repeat = f" #{self.repeats[index] + 1}" if index in self.repeats else ""
        return Episode(
            id=clip.name() + repeat,
            source=self.name,
            embodiment=self.embodiment,
            instructions=clip.captions,
            streams={STREAM: stream},
            cameras=(STREAM,),
        )


def _clip(number: int, row: dict[str, Any] | str, layout: Layout) -> _Clip:
    if isinstance(row, str):
        return _Clip(number, fault=row)
    try:
        file = layout.file.format_map(row) if "{" in layout.file else row[layout.file]
        captions = row[layout.caption]
    except LookupError as error:
        return _Clip(number, fault=f"there is no column {error} (there are {sorted(row)})")
    captions = tuple(captions) if isinstance(captions, list) else (captions,)
    if not file or not all(isinstance(text, str) for text in (file, *captions)) or not captions:
        return _Clip(number, fault=f"{layout.file!r} and {layout.caption!r} must be texts")
    for text in (file, *captions):
        if wrong := undecodable(text):
            return _Clip(number, fault=f"{text!a} {wrong}; save the list as UTF-8")
    columns = layout.start, layout.end, layout.start_frame, layout.end_frame, layout.fps, layout.id
    values = [row.get(column) for column in columns]
    texts = ["" if value is None else str(value).strip() for value in values]
    # Many clips are of one file: its name is kept once.
    return _Clip(number, "", sys.intern(file), tuple(text.strip() for text in captions), *texts)


def _repeats(clips: list[_Clip]) -> dict[int, int]:
    seen: Counter[str] = Counter()
    repeats = {}
    for index, clip in enumerate(clips):
        name = clip.name()
        if seen[name]:
            repeats[index] = seen[name]
        seen[name] += 1
    return repeats


def _part(clip: _Clip, fps: Fraction | None) -> tuple[Fraction, Fraction | None]:
    """Start and end, seconds; exact, as the decimals that were written."""
    if clip.start or clip.end or not (clip.start_frame or clip.end_frame):
        start = _seconds(clip.start) if clip.start else Fraction(0)
        end = _seconds(clip.end) if clip.end else None
    else:
        fps = fps or (_seconds(clip.fps) if clip.fps else Fraction(0))
        if fps <= 0:
            raise ValueError("frame numbers need their rate; give the option fps")
        start = _seconds(clip.start_frame or "0") / fps
        end = _seconds(clip.end_frame) / fps if clip.end_frame else None
    if end is not None and end <= start:
        raise ValueError(f"the clip ends at {float(end)} s, before it starts ({float(start)} s)")
    return start, end


def _seconds(text: str) -> Fraction:
    """Seconds, or [HH:]MM:SS.ff."""
    parts = text.split(":")
    if len(parts) > 3 or not all(map(_NUMBER.fullmatch, parts)):
        raise ValueError(f"{text!r} is no time; give seconds or HH:MM:SS.ff")
    return sum((Fraction(part) * 60**i for i, part in enumerate(reversed(parts))), Fraction(0))


# T5 embeddings stored beside captions, as Cosmos-Predict2 and mimic-video keep them.


KEY = "encoded_text"  # in a safetensors file


def read_text_embedding(path: Path) -> np.ndarray:
    """The embedding of one caption, without the zero rows that pad it.

    Args:
        path: a `.pickle` (a list that holds one array; it is read without being executed), or a
            `.safetensors` with the key "encoded_text".

    Returns:
        float [n, d], in the type it is stored in.

    Raises:
        ValueError: if the file is damaged, or holds anything else.
    """
    if path.suffix == ".safetensors":
        tensors = read_safetensors(path)
        if KEY not in tensors:
            raise ValueError(f"{path} has the keys {sorted(tensors)}; {KEY!r} is expected")
        value: Any = np.array(tensors[KEY].read())
    else:
        value = read_array_pickle(path.read_bytes(), path)
        if isinstance(value, list | tuple) and len(value) == 1:
            value = value[0]
    if isinstance(value, np.ndarray) and value.ndim == 3 and len(value) == 1:
        value = value[0]
    if not isinstance(value, np.ndarray) or value.ndim != 2 or value.dtype.kind in "biuc":
        found = (
            f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value)
        )
        raise ValueError(f"{path} holds {found}; one float array [tokens, width] is expected")
    filled = np.flatnonzero(value.any(axis=1))
    if len(filled) == 0:
        raise ValueError(f"{path} holds only zeros; make the embedding again")
    return value[: filled[-1] + 1]
