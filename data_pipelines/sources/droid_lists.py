"""Which episodes and steps of DROID are wanted, and their instructions, by its public JSON lists.

    ranges          {"<recordings>--<trajectory>": [[start, end], ...], ...}
                    droid_sample_ranges_v1_0_1.json (openpi) or keep_ranges_1_0_1.json (KarlP/droid
                    at Hugging Face, used by NVIDIA's Cosmos): steps start <= n < end in which the
                    robot moves; the others are idle
    annotations     {"<episode id>": {"language_instruction1": "...", ...}, ...}
                    aggregated-annotations-030724.json (droid_raw) or
                    droid_language_annotations.json (KarlP/droid): up to three instructions
    episode_paths   {"<episode id>": "<lab>/<outcome>/<date>/<time>", ...}
                    episode_id_to_path.json (KarlP/droid)

All of them mean the folder of a recording, <lab>/<outcome>/<date>/<time>, and so do the paths in
the RLDS release (`file_path`) and the `episode_id` of the LeRobot version of Cosmos: episodes are
found by it. No real list has been read; the formats are those of the programs that write them.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_pipelines.episode import Episode, reason

Steps = tuple[tuple[int, int], ...]  # [start, end), in order

_DEFAULTS = dict(
    success_only=False,
    need_language=False,
    ranges="",
    trim_ranges=0,
    annotations="",
    episode_paths="",
)
_TRAJECTORY, _PARTS = "trajectory.h5", 4  # the parts of a recording's folder


def recording(path: str) -> str:
    """The folder of a recording, <lab>/<outcome>/<date>/<time>, in a path or a key of a list."""
    parts = PurePosixPath(path.rsplit("--", 1)[-1]).parts
    parts = parts[:-1] if parts[-1:] == (_TRAJECTORY,) else parts
    return "/".join(parts[-_PARTS:])


@dataclass(frozen=True)
class DroidLists:
    """What is wanted of a dataset.

    Attributes:
        success_only: only episodes that succeeded.
        need_language: only episodes with an instruction.
        ranges: recording -> the steps that are kept; several if the list contradicts itself.
        ranges_name: the list's file, for messages.
        annotations: recording -> instructions.
        annotations_name: as `ranges_name`.
    """

    success_only: bool = False
    need_language: bool = False
    ranges: Mapping[str, set[Steps]] | None = None
    ranges_name: str = ""
    annotations: Mapping[str, tuple[str, ...]] | None = None
    annotations_name: str = ""

    def check(self, dataset: Path, path: str, has_path: bool, has_success: bool) -> None:
        """ValueError if a dataset does not say what the lists need to know of an episode.

        Args:
            dataset: its folder, for messages.
            path: what would say where an episode was recorded.
            has_path: whether it is there.
            has_success: whether the dataset says itself which episodes succeeded.
        """
        asked = {
            "success_only": self.success_only and not has_success,
            "ranges": self.ranges is not None,
            "annotations": self.annotations is not None,
        }
        if not has_path and (options := [name for name, is_asked in asked.items() if is_asked]):
            raise ValueError(
                f"{dataset} has no {path}, which says where an episode was recorded, so it cannot "
                f"have droid.{', droid.'.join(options)}; leave that out"
            )

    def choose(
        self, episode: Episode, times: np.ndarray, path: str, succeeded: bool | None = None
    ) -> Episode:
        """The episode with the ranges and instructions of the lists, or why it is not wanted.

        Args:
            episode: as the dataset has it.
            times: of its steps, int64 nanoseconds.
            path: of its recording; "" if the dataset does not say it.
            succeeded: what the dataset says; None: the path does.
        """
        findings = list(episode.findings)
        episode = self._annotated(episode, path, findings)
        if succeeded is None:
            succeeded = "success" in PurePosixPath(path).parts
        ranges, unwanted = None, ""
        if self.success_only and not succeeded:
            unwanted = "the episode failed, so success_only leaves it out"
        elif self.ranges is not None:
            kept = self.ranges.get(recording(path), set())
            if len(kept) != 1:
                what = "has several entries for" if kept else "does not list"
                unwanted = f"{self.ranges_name} {what} the episode, so it is left out"
            else:
                (steps,) = kept
                ranges = _in_time(steps, times)
                if not ranges:
                    unwanted = f"{self.ranges_name} keeps no step of the episode: it is left out"
                elif steps[-1][1] > len(times):
                    findings.append(
                        f"{self.ranges_name} keeps more steps than the episode has; those that it "
                        "has were taken"
                    )
        if not unwanted and self.need_language and not any(episode.instructions):
            unwanted = "the episode has no instruction, so need_language leaves it out"
        return replace(episode, ranges=ranges, unwanted=unwanted, findings=tuple(findings))

    def _annotated(self, episode: Episode, path: str, findings: list[str]) -> Episode:
        if self.annotations is None:
            return episode
        texts = self.annotations.get(recording(path), ())
        if not texts:
            findings.append(
                f"{self.annotations_name} has no instruction for the episode; those of the dataset "
                "were taken"
            )
            return episode
        if {text for text in episode.instructions if text} - {*texts}:
            findings.append(
                f"the instructions of {self.annotations_name} are not those of the dataset; the "
                "list was taken"
            )
        return replace(episode, instructions=texts, sections=())


def read_droid_lists(wanted: Mapping[str, Any] | None) -> DroidLists | None:
    """Reads the option `droid` of a format: what is wanted of the dataset, and the lists for it.

    Args:
        wanted: success_only and need_language, see `DroidLists`; ranges, annotations and
            episode_paths, the files above; trim_ranges, steps that are taken off the end of every
            range. All of them are optional. None for no list at all.

    Raises:
        ValueError: a setting is wrong, or a list is missing or is not such a list.
    """
    if wanted is None:
        return None
    asked = _DEFAULTS | dict(wanted)
    wrong = [key for key, value in asked.items() if type(value) is not type(_DEFAULTS.get(key))]
    if wrong or asked["trim_ranges"] < 0:
        raise ValueError(
            f"the option droid is {dict(wanted)}; it takes success_only and need_language (True or "
            "False), ranges, annotations and episode_paths (files) and trim_ranges (steps)"
        )
    if asked["trim_ranges"] and not asked["ranges"]:
        raise ValueError("droid.trim_ranges shortens the ranges of a list: set droid.ranges, too")
    ranges, annotations, paths = (
        Path(asked[key]) if asked[key] else None
        for key in ("ranges", "annotations", "episode_paths")
    )
    if (annotations is None) != (paths is None):
        raise ValueError(
            "droid.annotations and droid.episode_paths belong together: annotations are listed by "
            "the id of an episode, and episode_paths says which recording has it"
        )
    return DroidLists(
        asked["success_only"],
        asked["need_language"],
        _read_ranges(ranges, asked["trim_ranges"]) if ranges else None,
        ranges.name if ranges else "",
        _read_annotations(annotations, paths) if annotations and paths else None,
        annotations.name if annotations else "",
    )


def _in_time(steps: Steps, times: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Ranges of steps as ranges in nanoseconds, without what is beyond the end of the episode."""
    # From halfway between two steps, as a camera's clock may be a little off that of the steps.
    half = int(np.median(np.diff(times))) // 2 if len(times) > 1 else 1
    middles = times[:-1] + np.diff(times) // 2
    edges = [int(times[0]) - half, *middles.tolist(), int(times[-1]) + half]
    cut = ((start, min(end, len(times))) for start, end in steps)
    return tuple((edges[start], edges[end]) for start, end in cut if start < end)


def _read_ranges(file: Path, trim: int) -> dict[str, set[Steps]]:
    found: dict[str, set[Steps]] = {}
    for key, entry in _read_object(file, "ranges").items():
        if not _are_steps(entry):
            raise ValueError(
                f"{file}: the ranges of {key!r} must be [[start, end], ...] in steps, in order and "
                f"not overlapping, got {str(entry)[:80]}"
            )
        steps = tuple((start, end - trim) for start, end in entry if start < end - trim)
        found.setdefault(recording(key), set()).add(steps)
    return found


def _are_steps(entry: Any) -> bool:
    pairs = isinstance(entry, list) and all(isinstance(p, list) and len(p) == 2 for p in entry)
    edges = [edge for pair in entry for edge in pair] if pairs else [None]
    return all(type(edge) is int and edge >= 0 for edge in edges) and edges == sorted(edges)


def _read_annotations(file: Path, paths_file: Path) -> dict[str, tuple[str, ...]]:
    entries, paths = _read_object(file, "annotations"), _read_object(paths_file, "episode_paths")
    for key, path in paths.items():
        if not isinstance(path, str):
            raise ValueError(f"{paths_file}: the path of {key!r} must be a text, got {path!r}")
    found = {}
    for key, entry in entries.items():
        if not isinstance(entry, dict):
            raise ValueError(
                f"{file}: the instructions of {key!r} must be an object such as "
                f'{{"language_instruction1": "..."}}, got {str(entry)[:80]}'
            )
        if key in paths:
            found[recording(paths[key])] = _texts(entry[name] for name in sorted(entry))
    if entries and not found:
        raise ValueError(f"{paths_file} has no path for any episode of {file}: are both of DROID?")
    return found


def _texts(values: Iterable[Any]) -> tuple[str, ...]:
    """The distinct instructions among values."""
    stripped = (value.strip() for value in values if isinstance(value, str))
    return tuple(dict.fromkeys(filter(None, stripped)))


def _read_object(file: Path, option: str) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(
            f"droid.{option} is {str(file)!r}, but there is no such file; download the list "
            "(docs/formats.md says where from)"
        )
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {reason(file, error)}; download it again") from None
    if not isinstance(content, dict) or not content:
        raise ValueError(
            f"{file} must be a JSON object with an entry for each episode, got "
            f"{'an empty one' if content == {} else type(content).__name__}"
        )
    return content
