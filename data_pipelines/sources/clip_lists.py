"""Clips of longer videos, from a list: file, start, end, caption.

    clips.csv, .tsv     a header, then a clip per line
    clips.jsonl         an object per line
    train.json          Something-Something v2's labels, Ego4D's narrations, or a list of objects

The published lists of EPIC-KITCHENS-100, Something-Something v2 and Ego4D are read as they are. A
clip is an episode with one stream, "video": the frames with start <= time < end. A malformed line
is an episode that raises an error when it is loaded; where a line and its video disagree, or times
and frame numbers of a line, it is a finding.
"""

import csv
import json
import re
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.episode import NANOSECONDS, Episode, LazyEpisodes, Stream, reason
from data_pipelines.sources.files import repeat_marks
from data_pipelines.video import VideoFile, VideoPool

STREAM = "video"
LIST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
_LONGEST_RECORD = 20  # lines; in a longer record a quote was never closed
_Row = dict[str, Any] | str  # or why it is malformed: in long lists some lines always are
_NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)(e[-+]?\d{1,2})?")
_AROUND = "\0around"  # no column's name
_BEYOND = 1.0  # seconds by which a clip may end behind its video, as lists round
# Columns of other names that may say which part of its video a clip is.
_TIMES = re.compile(r"(?:^|[_ ])(start|end|stop|begin|finish|from|to|timestamps?|duration|segment)")
_FRAMES_OFF = 1.5  # frames by which times and frame numbers may differ: they may count from 1


@dataclass(frozen=True)
class Layout:
    """The columns of a list, and the folder of its videos."""

    file: str = "file"  # the video's path; or a pattern of columns, "{part}/{id}.mp4"
    caption: str = "caption"  # a text; in JSON also a list of texts
    # Seconds, or [HH:]MM:SS.ff; an empty field is the beginning or the end of the video.
    start: str = "start"
    end: str = "end"  # exclusive
    # Frame numbers from 0, for rows without times, and the frame rate they refer to.
    start_frame: str = "start_frame"
    end_frame: str = "end_frame"
    fps: str = "fps"
    id: str = "id"  # of the clip; without one it is made of the file and the times
    videos: str = "."  # relative to the list's folder


LAYOUTS = {
    "plain": Layout(),
    # EPIC-KITCHENS-100: EPIC_100_train.csv; the videos where its download script puts them.
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
    # Ego4D: annotations/narration.json, through `_ego4d_rows`.
    "ego4d": Layout("{video_uid}.mp4", "narration_text", videos="../full_scale"),
}


def recognises(path: Path) -> bool:
    """Whether this is a list of clips with the usual columns."""
    if not path.is_file() or path.suffix.lower() not in LIST_SUFFIXES:
        return False
    if path.suffix.lower() == ".json":  # one large document: do not parse it all
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            start = file.read(10_000)
        listed = start.lstrip().startswith("[") and (
            ('"id"' in start and '"label"' in start) or ('"file"' in start and '"caption"' in start)
        )
        return listed or '"narration_pass_' in start
    try:
        row = next((row for _, row in islice(_rows(path, 1.0), 5) if isinstance(row, dict)), {})
    except (ValueError, OSError):
        return False
    return _layout_of(row) != "plain" or {"file", "caption"} <= row.keys()


def _layout_of(row: dict[str, Any]) -> str:
    """The name of the layout of a row; "plain" if it is not a published one."""
    columns = row.keys()
    if {"participant_id", "video_id", "narration"} <= columns:
        return "epic"
    if {"video_uid", "narration_text"} <= columns:
        return "ego4d"
    return "ssv2" if {"id", "label"} <= columns and "file" not in columns else "plain"


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
    """Opens a list of clips; the videos are read when an episode is accessed.

    Args:
        path: the list.
        name, embodiment: see `formats`.
        layout: "plain", "epic", "ssv2" or "ego4d"; "auto" detects it by the columns.
        columns: replaces fields of the layout, e.g. {"file": "path", "caption": "text"} for a list
            with the columns "path" and "text".
        videos: the folder that the file names are relative to; "" is the layout's ("plain": the
            list's own folder).
        fps: frame rate that frame numbers refer to; None takes the row's own.
        narration_seconds: length of a clip around an Ego4D narration, which has only one time.

    Raises:
        ValueError: if an option is unknown, the list cannot be read, or no line can be used.
    """
    path = Path(path)
    if layout not in ("auto", *LAYOUTS):
        raise ValueError(f"{path}: layout {layout!r} is not one of auto, {', '.join(LAYOUTS)}")
    if placeholder := reason(path, ""):  # its text would be taken for the first line
        raise ValueError(f"{path}: {placeholder}")
    rows = _rows(path, narration_seconds)
    if layout == "auto":
        first = list(islice(rows, 100))
        layout = _layout_of(next((row for _, row in first if isinstance(row, dict)), {}))
        rows = chain(first, rows)
    columns = dict(columns or {})
    known = asdict(LAYOUTS[layout])
    if unknown := columns.keys() - known.keys():
        raise ValueError(f"{path}: columns has no {sorted(unknown)}; it has {sorted(known)}")
    chosen = Layout(**known | columns)
    clips = [_clip(number, row, chosen) for number, row in rows]
    if all(clip.fault for clip in clips):
        why = f"number {clips[0].number}: {clips[0].fault}" if clips else "it is empty"
        raise ValueError(f"{path} has no usable clip among {len(clips)} lines; {why}")
    marks = repeat_marks(clip.name for clip in clips)
    folder = Path(videos) if videos else path.parent / chosen.videos
    rate = None if fps is None else Fraction(str(fps))
    dataset = _Dataset(path, name, embodiment, clips, marks, folder, rate)
    return LazyEpisodes(len(clips), dataset.load)


class _Clip(NamedTuple):
    """A row of the list as it is written there; numbers are parsed when it is loaded."""

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
    around: bool = False  # the times surround an instant, so the video may end earlier
    unread: str = ""  # columns that may be its times, if it has no end

    @property
    def name(self) -> str:
        """Made of this row alone, so that adding lines to the list changes no other name."""
        part = "-".join((self.start or self.start_frame, self.end or self.end_frame)).strip("-")
        return self.id or (f"{self.file} {part}" if part else self.file)


def _clip(number: int, row: _Row, layout: Layout) -> _Clip:
    if isinstance(row, str):
        return _Clip(number, fault=row)
    try:
        file = layout.file.format_map(row) if "{" in layout.file else row[layout.file]
        captions = row[layout.caption]
    except LookupError as error:
        there = f"there is no column {error}, but {sorted(row)}; name it in the option columns"
        return _Clip(number, fault=there)
    captions = tuple(captions) if isinstance(captions, list) else (captions,)
    if not file or not all(isinstance(text, str) for text in (file, *captions)) or not captions:
        return _Clip(number, fault=f"{layout.file!r} and {layout.caption!r} must be strings")
    for text in (file, *captions):
        if wrong := _undecodable(text):
            return _Clip(number, fault=f"{text!a} {wrong}; save the list as UTF-8")
    columns = layout.start, layout.end, layout.start_frame, layout.end_frame, layout.fps, layout.id
    values = [row.get(column) for column in columns]
    texts = ["" if value is None else str(value).strip() for value in values]
    # Many clips share a file; its name is stored once.
    captions = tuple(text.strip() for text in captions)
    others = [] if texts[1] or texts[3] else sorted(row.keys() - {layout.caption, *columns})
    others = [key for key in others if row[key] and _TIMES.search(key.lower())]
    unread = sys.intern(", ".join(others))
    file = sys.intern(file.strip())
    return _Clip(number, "", file, captions, *texts, around=_AROUND in row, unread=unread)


@dataclass(frozen=True)
class _Dataset:
    path: Path
    name: str
    embodiment: str
    clips: list[_Clip]
    marks: dict[int, str]  # see `repeat_marks`
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
            findings = [*video.findings, *self._findings(clip, start, end, stream)]
        except ValueError as error:
            what = "entry" if self.path.suffix.lower() == ".json" else "line"
            raise ValueError(f"{self.path}, {what} {clip.number}: {error}") from None
        return Episode(
            id=clip.name + self.marks.get(index, ""),
            source=self.name,
            embodiment=self.embodiment,
            instructions=clip.captions,
            streams={STREAM: stream},
            cameras=(STREAM,),
            findings=tuple(findings),
        )

    def _findings(
        self, clip: _Clip, start: Fraction, end: Fraction | None, stream: Stream
    ) -> Iterator[str]:
        """Where the list and the video, or two parts of a line, disagree."""
        times = stream.timestamps / NANOSECONDS
        period = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
        if end is not None and not clip.around and end - start - times[-1] > _BEYOND + 2 * period:
            yield (
                "the clip ends more than a second behind its video's last frame; are start and end "
                "frame numbers? Then name their columns start_frame and end_frame"
            )
        if clip.unread:
            whole = "from its start to the end of the video" if start else "the whole video"
            yield (
                f"a clip without an end was taken as {whole}; if the columns {clip.unread} say "
                "which part it is, name them in the option columns"
            )
        rate = self.fps or (_seconds(clip.fps) if clip.fps else None)
        if clip.start_frame and rate:
            if clip.start and abs(_seconds(clip.start_frame) - start * rate) > _FRAMES_OFF:
                yield "the start and the start_frame of a line disagree; the start is taken"
            if not clip.start and period and abs(period * float(rate) - 1) > 0.02:
                yield (
                    "the frame numbers refer to another frame rate than the video has; they are "
                    "taken as times at their own rate"
                )


def _part(clip: _Clip, fps: Fraction | None) -> tuple[Fraction, Fraction | None]:
    """Start and end, seconds; exactly the decimals of the list."""
    if clip.start or clip.end or not (clip.start_frame or clip.end_frame):
        start = _seconds(clip.start) if clip.start else Fraction(0)
        end = _seconds(clip.end) if clip.end else None
    else:
        fps = fps or (_seconds(clip.fps) if clip.fps else Fraction(0))
        if fps <= 0:
            raise ValueError("frame numbers need a frame rate; set the option fps")
        start = _seconds(clip.start_frame or "0") / fps
        end = _seconds(clip.end_frame) / fps if clip.end_frame else None
    if end is not None and end <= start:
        raise ValueError(f"the clip ends at {float(end)} s, before it starts ({float(start)} s)")
    return start, end


def _seconds(text: str) -> Fraction:
    """Seconds, or [HH:]MM:SS.ff."""
    parts = text.split(":")
    if len(parts) > 3 or not all(map(_NUMBER.fullmatch, parts)):
        raise ValueError(f"{text!r} is not a time; give seconds or HH:MM:SS.ff")
    return sum((Fraction(part) * 60**i for i, part in enumerate(reversed(parts))), Fraction(0))


def _rows(path: Path, narration_seconds: float) -> Iterator[tuple[int, _Row]]:
    """The rows of a list, each with the number of its line or entry."""
    suffix = path.suffix.lower()
    if suffix not in LIST_SUFFIXES:
        raise ValueError(f"{path}: a list of clips is one of {', '.join(LIST_SUFFIXES)}")
    # Bytes that are not UTF-8 become lone surrogates, which `_undecodable` finds row by row.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if suffix == ".json":
            yield from enumerate(_json_rows(path, file.read(), narration_seconds), 1)
        elif suffix == ".jsonl":
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _json_row(line)
        else:
            yield from _csv_rows(path, file)


def _undecodable(text: str) -> str:
    """Where a text was not UTF-8; "" if it was."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        return f"is not UTF-8 (character {error.start} is the byte 0x{byte:02x})"
    return ""


def _json_rows(path: Path, text: str, narration_seconds: float) -> Iterator[_Row]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file ({error}); copy it again") from None
    if isinstance(content, dict):
        videos = content.get("videos")
        return _ego4d_rows(videos if isinstance(videos, dict) else content, narration_seconds)
    if not isinstance(content, list):
        raise ValueError(f"{path}: a JSON list of clips is expected, not {type(content).__name__}")
    return (row if isinstance(row, dict) else "not a JSON object" for row in content)


def _ego4d_rows(narrations: dict, seconds: float) -> Iterator[_Row]:
    """A row per narration of Ego4D: a clip of so many seconds around its time.

    narration.json holds {video_uid: {"narration_pass_1": {"narrations": [{"timestamp_sec",
    "narration_text", ...}]}, ...}}; redacted videos have None instead.
    """
    for uid, passes in narrations.items():
        for name in ("narration_pass_1", "narration_pass_2"):
            content = passes.get(name) if isinstance(passes, dict) else None
            rows = content.get("narrations") if isinstance(content, dict) else None
            for row in rows if isinstance(rows, list) else []:
                time = row.get("timestamp_sec") if isinstance(row, dict) else None
                if isinstance(time, int | float):
                    edges = max(time - seconds / 2, 0), time + seconds / 2
                    start, end = (round(edge, 6) for edge in edges)
                    yield {"video_uid": uid} | row | {"start": start, "end": end, _AROUND: True}
                else:
                    yield f"a narration of {uid} has no timestamp_sec"


def _json_row(line: str) -> _Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not a JSON object ({error})"
    return row if isinstance(row, dict) else "not a JSON object"


def _csv_rows(path: Path, file: Iterator[str]) -> Iterator[tuple[int, _Row]]:
    header = next(file, "")
    if wrong := _undecodable(header):
        raise ValueError(f"{path}: the first line {wrong}; save the list as UTF-8")
    delimiter = max(",\t;", key=header.count)
    columns = [column.strip() for column in next(csv.reader([header], delimiter=delimiter), [])]
    number = 2  # of the line at which the current record begins
    record: list[str] = []  # its lines
    again: deque[str] = deque()  # lines to parse again, after an error

    def lines() -> Iterator[str]:
        nonlocal number
        while True:
            if len(record) == _LONGEST_RECORD:
                raise csv.Error("a quote is opened and never closed")
            line = again.popleft() if again else next(file, "")
            if not line:
                return
            if record or line.strip("\r\n"):
                record.append(line)
                yield line
            else:
                number += 1

    while True:
        try:
            for row in csv.DictReader(lines(), columns, delimiter=delimiter, strict=True):
                extra = row.pop(None, [])
                if any([*row.values(), *extra]):
                    if extra or None in row.values():
                        count = sum(value is not None for value in row.values()) + len(extra)
                        raise csv.Error(f"{count} fields, but the first line has {len(columns)}")
                    yield number, row
                number += len(record)
                record.clear()
            return
        except csv.Error as error:
            # The end of the record is unknown: continue at the line after its first.
            yield number, f"a malformed line ({error})"
            number += 1
            again.extendleft(reversed(record[1:]))
            record.clear()
