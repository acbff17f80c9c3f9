"""LeRobot datasets (huggingface/lerobot), versions 2.0, 2.1 and 3.0, through pyarrow and PyAV.

    meta/info.json                            version, frame rate, path templates, features
    data/...                                  parquet, a row per frame: numbers, texts, images
    videos/...                                mp4

    v2: meta/episodes.jsonl                   per episode: episode_index, tasks, length
        meta/tasks.jsonl                      task_index, task
        data/chunk-000/episode_000000.parquet
        videos/chunk-000/<key>/episode_000000.mp4
    v3: meta/episodes/chunk-*/file-*.parquet  the same, the numbers of its files and its start in
        meta/tasks.parquet                    its videos: a file holds many episodes
        data/chunk-000/file-000.parquet
        videos/<key>/chunk-000/file-000.mp4

Streams have the dataset's own feature names ("action", "observation.state",
"observation.images.<camera>") and dtypes. Cameras are stored as videos or as single images. What
cannot be read costs an episode that feature alone: texts (but see `texts`), LeRobot 0.6's
"language" features, depth, and whatever is damaged or not what meta/info.json says. Statistics (in
which v2.0 and v2.1 differ) are not read. `lerobot_meta` reads meta/, `lerobot_rows` the
parquet files; `lerobot_frames` decides which frames belong to which rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipelines.episode import Episode, LazyEpisodes, Section, Stream, reason
from data_pipelines.lru import LRU
from data_pipelines.sources.droid_lists import DroidLists, read_droid_lists
from data_pipelines.sources.files import check_finished
from data_pipelines.sources.lerobot_frames import Part, RowTimes, choose, locate, row_times
from data_pipelines.sources.lerobot_meta import (
    BOOKKEEPING,
    Features,
    Meta,
    numbered,
    read_meta,
    shape_of,
    sort_features,
)
from data_pipelines.sources.lerobot_rows import Found, ParquetImages, Rows, of_file
from data_pipelines.video import VideoFile, VideoPool

# Of DROID: whether an episode succeeded, and the folder in which it was recorded.
_SUCCEEDED, _RECORDED = "is_episode_successful", "episode_id"
FILES_KEPT = 256  # video files of version 3 whose episodes are located


def recognises(path: Path) -> bool:
    """Whether this is a LeRobot dataset, of any version."""
    return (path / "meta/info.json").is_file()


def open_lerobot(
    path: Path,
    *,
    name: str,
    embodiment: str,
    texts: Sequence[str] = (),
    droid: Mapping[str, Any] | None = None,
) -> Sequence[Episode]:
    """Opens a dataset; rows and videos are read when an episode is accessed.

    The instructions of a row are its task and those of `texts`. Where they change, the episode has
    sections.

    Args:
        path: the folder that holds `meta`, `data` and `videos`.
        name, embodiment: see `formats`.
        texts: features with further instructions, such as DROID's "language_instruction_2":
            strings, "subtask_index", or integers that number the tasks (GR00T's "annotation.*").
        droid: which episodes and steps are wanted, and DROID's lists of them: see `droid_lists`.
            An episode failed if its feature `is_episode_successful` says so, or else the folder in
            `episode_id` of meta/episodes.

    Raises:
        ValueError: if it is not a LeRobot dataset of these versions, its list of features or of
            episodes is missing or damaged, a feature in `texts` does not exist, nothing says which
            texts its integers stand for, or a list cannot be read or used.
    """
    path = Path(path)
    lists = read_droid_lists(droid)
    check_finished(path)
    meta = read_meta(path)
    dtypes = {k: f.get("dtype") for k, f in meta.features.items() if isinstance(f, dict)}
    if unfit := [k for k in texts if not str(dtypes.get(k)).startswith(("string", "int"))]:
        has = sorted(key for key in dtypes if dtypes[key] == "string")
        raise ValueError(f"{path} has no features {unfit} of strings or integers; strings: {has}")
    numbers = {k: numbered(meta, k) for k in texts if str(dtypes[k]).startswith("int")}
    features = sort_features(meta.features)
    if lists is not None:
        has_path = _RECORDED in meta.episodes.column_names
        lists.check(path, f"{_RECORDED} in {meta.list_name}", has_path, _SUCCEEDED in dtypes)
    rows = Rows([*features.vectors, *BOOKKEEPING], [*texts, "task"])
    dataset = _Dataset(meta, name, embodiment, features, tuple(texts), numbers, rows, lists)
    return LazyEpisodes(len(meta.numbers), dataset.load)


@dataclass(frozen=True)
class _Dataset:
    meta: Meta
    name: str
    embodiment: str
    features: Features
    texts: Sequence[str]
    numbered: Mapping[str, Mapping[int, tuple[str, ...]]]  # those of integers, with their texts
    rows: Rows
    lists: DroidLists | None  # what is wanted
    pool: VideoPool = field(default_factory=VideoPool)
    # The encoded images of the last few episodes: read from disk once for many windows.
    cache: LRU = field(default_factory=lambda: LRU(4))
    located: LRU = field(default_factory=lambda: LRU(FILES_KEPT))
    limits: LRU = field(default_factory=lambda: LRU(1))

    def load(self, index: int) -> Episode:
        meta, number = self.meta, self.meta.numbers[index]
        if number not in meta.listed:
            reasons = "; ".join(meta.faults) or "it is incomplete"
            raise ValueError(
                f"{meta.path}/meta does not list episode {number} of {len(meta.numbers)} "
                f"({reasons}); copy it again"
            )
        (row,) = meta.episodes.slice(meta.listed[number], 1).to_pylist()
        try:
            return self._load(number, row)
        except (LookupError, OSError, TypeError, UnicodeDecodeError, pa.ArrowException) as error:
            raise ValueError(
                f"{meta.path}: episode {number} cannot be read ({type(error).__name__}: {error}); "
                "copy the dataset again"
            ) from error

    def _load(self, number: int, row: dict) -> Episode:
        found, findings = self._find(number, row)
        findings = [*self.meta.findings, *findings]
        if number in self.meta.repeated:
            findings.append(f"{self.meta.list_name} lists the episode again; the last was taken")
        with of_file(found.path):
            fps = self.meta.fps
            stamps = found.numbers("timestamp", needed=True)
            clock = row_times(stamps, found.numbers("frame_index"), found.table.num_rows, fps)
            index, listed = found.numbers("index"), row.get("dataset_from_index")
        findings += clock.findings
        if index is not None and listed is not None and index[0] != listed:
            findings.append(
                "dataset_from_index of meta/episodes differs from index in the rows; the rows were "
                "found by episode_index"
            )
        instructions, sections, more = self._instructions(number, row, found, clock.times)
        findings += more
        left_out = dict(self.features.unused)
        streams: dict[str, Stream] = {}
        for key, shape in self.features.vectors.items():
            try:
                streams[key] = Stream(clock.times, found.array(key, shape))
            except ValueError as error:
                left_out[key] = str(error)
        for key in self.features.images:
            if why := found.no_images(key):
                left_out[key] = why
            else:
                frames = ParquetImages(self.meta.path, key, found.spans, self.cache)
                streams[key] = Stream(clock.times, frames)
        for key in self.features.videos:
            try:
                streams[key], more = self._video(key, number, row, clock)
                findings += [f"{key}: {text}" for text in more]
                if not found.no_images(key):
                    findings.append(f"{key}: it is stored as images, too; the video was taken")
            except ValueError as error:
                left_out[key] = str(error)
        episode = Episode(
            id=f"episode_{number:06d}",
            source=self.name,
            embodiment=self.embodiment,
            instructions=instructions,
            streams=streams,
            cameras=tuple(
                key for key in (*self.features.videos, *self.features.images) if key in streams
            ),
            sections=sections,
            left_out=left_out,
            names=self.meta.names,
            findings=tuple(findings),
        )
        if self.lists is None:
            return episode
        succeeded = None
        if _SUCCEEDED in self.meta.features:
            with of_file(found.path):
                succeeded = bool(found.array(_SUCCEEDED, None).any())
        return self.lists.choose(episode, clock.times, str(row.get(_RECORDED) or ""), succeeded)

    def _find(self, number: int, row: dict) -> tuple[Found, list[str]]:
        """The rows of an episode, and findings.

        LeRobot itself reads all files and chooses by `episode_index`, so it does not notice if the
        list of episodes names another file.
        """
        findings, length = [], row["length"]
        try:
            file, findings = self.meta.file("data_path", "data/", row)
            found = self.rows.read(file, number)
            if found.table.num_rows == length:
                return found, findings
            fault = (
                f"{file} does not match {self.meta.list_name}: episode {number} should have "
                f"{length} rows, found {found.table.num_rows}; copy or convert it again"
            )
        except ValueError as error:
            fault = str(error)
        if self.meta.version.startswith("v2."):  # a file's name says its episode
            raise ValueError(fault)
        parts = []
        for path, least, most in self.limits.get("", self._all_limits):
            if least <= number <= most:
                try:
                    parts.append(self.rows.read(path, number))
                except ValueError:  # without statistics every file has to be tried
                    continue
        whole = [part for part in parts if part.table.num_rows == length]
        if len(whole) == 1:
            parts = whole
        if not parts or sum(part.table.num_rows for part in parts) != length:
            raise ValueError(fault)
        stale = "data/file_index of meta/episodes does not name the file; it was found by "
        return Found.joined(parts), [*findings, stale + "episode_index"]

    def _all_limits(self) -> list[tuple[Path, float, float]]:
        """Each readable data file with its lowest and highest episode."""
        limits = []
        folder = self.meta.path / Path(self.meta.templates["data_path"]).parts[0]
        for path in sorted(folder.rglob("*.parquet")):
            try:
                least, most = self.rows.limits(path)
                limits.append((path, min(least, default=np.inf), max(most, default=-np.inf)))
            except ValueError:
                continue
        return limits

    # Videos.

    def _video(self, key: str, number: int, row: dict, clock: RowTimes) -> tuple[Stream, list[str]]:
        """The frames of an episode; ValueError if the camera cannot be used."""
        listed, fps = f"videos/{key}/", self.meta.fps
        if self.meta.video_fault:
            raise ValueError(self.meta.video_fault)
        file, findings = self.meta.file("video_path", listed, row, video_key=key)
        if not file.exists():
            given = self.meta.templates["video_path"]
            raise ValueError(f"there is no file by video_path, {given!r}; copy the video")
        try:
            index = self.pool.index(file)
        except ValueError as error:
            if why := reason(file, ""):
                raise ValueError(f"its video: {why}") from error
            raise
        given = shape_of(self.meta.features[key])
        size = sorted((index.height, index.width))
        if given and len(given) == 3 and size not in (sorted(given[:2]), sorted(given[1:])):
            findings.append(
                f"meta/info.json says {list(given)}, but the video has {index.height} x "
                f"{index.width} pixels; the video was taken"
            )
        part = Part(0, len(index.pts), moved=False, loose=False, fault=False)
        if row.get(f"{listed}from_timestamp") is None:
            if "episode_index" not in self.meta.placeholders("video_path"):
                raise ValueError(
                    f"{self.meta.list_name} has no {listed}from_timestamp, so nothing says which "
                    "frames of a shared file are the episode's; convert the dataset again"
                )
        else:
            part = self._located(key, file, row)[number]
            if part.fault and len(index.pts) - part.first < row["length"]:
                last = float(index.pts[-1] * index.time_base)
                raise ValueError(
                    f"{file}: its last frame is at {last:.3f} s, but episode {number} has "
                    f"{row['length']} rows and begins at {row[f'{listed}from_timestamp']:g} s by "
                    f"{listed}from_timestamp; copy the video or convert the dataset again"
                )
            if part.fault:
                raise ValueError(
                    f"{file}: the ranges of its episodes in {listed}from_timestamp overlap or do "
                    f"not fit its frames, so nothing says which frames are those of episode "
                    f"{number}; convert the dataset again"
                )
            length = (row.get(f"{listed}to_timestamp") or np.nan) - row[f"{listed}from_timestamp"]
            if abs(length - row["length"] / fps) > 0.5 / fps:
                findings.append("to_timestamp does not fit the number of rows; the rows were taken")
            if part.loose:
                findings.append(
                    "the file has more frames than from_timestamp of its episodes needs; the "
                    "ranges were taken, and nothing confirms them"
                )
            if part.moved:
                findings.append(
                    "from_timestamp does not fit the frames of the file; they were counted, as "
                    "there is one per row"
                )
        times = np.array(index.pts[part.first : part.stop], np.float64) * float(index.time_base)
        with of_file(file):
            choice = choose(times, clock, fps)
        first, stop = part.first + choice.first, part.first + choice.stop
        video = VideoFile(
            file,
            index.pts[first] * index.time_base,
            index.pts[stop] * index.time_base if stop < len(index.pts) else None,
            self.pool,
            exact=True,
        )
        stream = Stream(clock.times, video) if choice.by_number else video.stream()
        return stream, [*findings, *choice.findings, *video.findings]

    def _located(self, key: str, file: Path, row: dict) -> dict[int, Part]:
        """The frames of all episodes in the video file of one."""
        listed, episodes = f"videos/{key}/", self.meta.episodes
        numbers = self.meta.placeholders("video_path")
        place = [f"{listed}{n}" for n in ("chunk_index", "file_index") if n in numbers]
        if "episode_index" in numbers:  # a file for each episode
            place = ["episode_index"]

        def compare() -> dict[int, Part]:
            columns = {key: episodes[key] for key in ("episode_index", "length", *place)}
            columns["start"] = columns["end"] = episodes[f"{listed}from_timestamp"]
            if (end := f"{listed}to_timestamp") in episodes.column_names:
                columns["end"] = episodes[end]
            rows = pa.table(columns).take(list(self.meta.listed.values()))
            rows = rows.filter(pc.is_valid(rows["start"]))
            for name in place:
                rows = rows.filter(pc.equal(rows[name], row[name]))
            index = self.pool.index(file)
            times = np.array(index.pts, np.float64) * float(index.time_base)
            starts, ends = (rows[n].to_numpy().astype(np.float64) for n in ("start", "end"))
            parts = locate(times, starts, ends, rows["length"].to_numpy(), self.meta.fps)
            return dict(zip(rows["episode_index"].to_pylist(), parts))

        return self.located.get((key, file), compare)

    # Instructions.

    def _instructions(
        self, number: int, row: dict, found: Found, times: np.ndarray
    ) -> tuple[tuple[str, ...], tuple[Section, ...], list[str]]:
        """The texts of the episode, its sections if they change, and findings."""
        columns, findings = self._tasks(number, row, found)
        for key in self.texts:
            if key in found.absent:
                raise ValueError(f"{found.path}: the text {key}: {found.absent[key]}")
            values = found.column(key)
            kinds = (int, float) if key in self.numbered else str
            if not all(value is None or isinstance(value, kinds) for value in values):
                raise ValueError(f"{found.path}: {key} holds {found.kinds[key]}, not texts")
            columns.append([v if isinstance(v, str) else self._text(v, found, key) for v in values])
        sections = []
        for texts, rows in groupby(zip(times.tolist(), zip(*columns)), key=lambda row: row[1]):
            given = dict.fromkeys(text for text in texts if text is not None)
            if not given:
                used = sorted(set(found.column("task_index")), key=str)
                reasons = f" ({'; '.join(self.meta.faults)})" if self.meta.faults else ""
                raise ValueError(
                    f"{self.meta.path}: meta has no text for the tasks {used} of episode "
                    f"{number}{reasons}; copy it again"
                )
            filled = tuple(text for text in given if text.strip()) or ("",)
            if not sections or sections[-1].instructions != filled:
                sections.append(Section(next(rows)[0], filled))
        instructions = tuple(dict.fromkeys(t for s in sections for t in s.instructions))
        return instructions, tuple(sections) if len(sections) > 1 else (), findings

    def _tasks(
        self, number: int, row: dict, found: Found
    ) -> tuple[list[list[str | None]], list[str]]:
        """The task of each row, as the only column of a list, and findings.

        As LeRobot itself, this takes the text that meta/tasks has for `task_index`. The tasks in
        the list of episodes do not say when each begins.
        """
        where = self.meta.list_name
        listed = row.get("tasks") or []
        listed = [listed] if isinstance(listed, str) else listed
        listed = list(dict.fromkeys(text for text in listed if isinstance(text, str)))
        said = [text for text in listed if text.strip()]
        listed = said or listed
        used = found.column("task_index")
        column = None if "task" in found.absent else found.column("task")
        if column and used.count(None) == len(used) and all(isinstance(t, str) for t in column):
            return [column], ["the rows have no task_index; their column task was taken"]
        texts = [self._text(index, found, "task_index", strict=False) for index in used]
        known = {text for text in texts if text is not None}
        if len(said) == 1 and known and not any(text.strip() for text in known):
            texts, known = [None] * len(texts), set()  # an empty text says nothing
        if None not in texts:
            names = {_plain(n) for index in set(used) for n in self.meta.task_names[index]}
            other = {_plain(text) for text in said}
            if said and not other & names:
                raise ValueError(
                    f"{self.meta.path}: task_index of episode {number} stands for {sorted(known)} "
                    f"in meta/tasks, but {where} lists {said}; correct one of them"
                )
            differ = f"tasks of {where} are not those of the rows; task_index of the rows was taken"
            agree = other <= names and len(other) == len({_plain(text) for text in known})
            findings = [differ] if said and not agree else []
            rows = {(i, _plain(t)) for i, t in zip(used, column or ()) if isinstance(t, str)}
            if any(t and t not in map(_plain, self.meta.task_names[i]) for i, t in rows):
                findings.append("the column task differs from task_index; task_index was taken")
            return [texts], findings
        if len(listed) == 1 and not known and len(set(used)) == 1:
            missing = f"meta/tasks has no text for task_index; tasks of {where} was taken"
            return [listed * len(texts)], [missing] if used[0] is not None else []
        if len(listed) > 1 and not known and not self.texts:
            raise ValueError(
                f"{self.meta.path}: {where} lists the tasks {listed} for episode {number}, but no "
                "task_index with a text in meta/tasks says which rows they belong to; copy or "
                "convert it again"
            )
        return [texts], []

    def _text(self, index: int | None, found: Found, key: str, strict: bool = True) -> str | None:
        """The text of a task or subtask; a negative number is none."""
        texts = self.numbered.get(key, self.meta.tasks).get(index, ())
        listed = "meta/subtasks" if key == "subtask_index" else "meta/tasks"
        if len(texts) > 1:
            raise ValueError(
                f"{self.meta.path}: {listed} has several texts for {key} {index}: "
                f"{list(texts)}; correct it"
            )
        if strict and not texts and index is not None and index >= 0:
            raise ValueError(f"{found.path}: {key} is {index}, which {listed} does not have")
        return texts[0] if texts else None


def _plain(text: str) -> str:
    """A text without what differs between two spellings of it."""
    return " ".join(text.casefold().split()).rstrip(".")
