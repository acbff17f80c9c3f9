"""How lists of clips name their columns: one's own list, and three published datasets."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


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
