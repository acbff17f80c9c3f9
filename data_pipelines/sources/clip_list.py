"""Clips of longer videos, from a list: file, start, end, caption.

    clips.csv, .tsv     a header, then a clip per line
    clips.jsonl         an object per line
    train.json          Something-Something v2's labels, Ego4D's narrations, or a list of objects

The published lists of EPIC-KITCHENS-100, Something-Something v2 and Ego4D are read as they are
(`clip_list_layouts.py`). A clip is the frames with start <= time < end, and an episode with one
stream, "video". A malformed line is an episode that cannot be loaded, and says why.
"""

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from data_pipelines.episode import Episode, LazyEpisodes
from data_pipelines.sources.clip_list_layouts import LAYOUTS, Layout, find_layout
from data_pipelines.sources.clip_list_rows import LIST_SUFFIXES, read_rows, undecodable
from data_pipelines.video import VideoFile, VideoPool

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
