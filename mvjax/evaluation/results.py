"""Closed-loop results on file: one JSON line per episode, and what a setting was.

A setting is one way of running the policy (or no policy). Its folder holds

- `results.jsonl`: an `EpisodeResult` per line, in the order the episodes ended;
- `setting.json`: a `Setting`;
- `videos/`: the recorded episodes.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class EpisodeResult:
    """One episode.

    Attributes:
        suite: simulator suite.
        task: task within the suite.
        seed: the reset's seed.
        success: whether the simulator reported success before its step limit.
        steps: control steps taken.
        queries: how often the policy was asked.
        plan_seconds: seconds of planning; a batched call is shared equally by its observations.
        mode: "policy", "oracle", "expert" or "none".
        config_hash: what the caller says identifies policy and protocol.
        video: recorded video, relative to the setting's folder, or None.
    """

    suite: str
    task: str
    seed: int
    success: bool
    steps: int
    queries: int
    plan_seconds: float
    mode: str
    config_hash: str
    video: str | None


@dataclass(frozen=True)
class Setting:
    """How a setting appears in the report.

    Attributes:
        label: its name for readers, such as "1 of 10 video steps".
        mode: "policy", "oracle", "expert" or "none".
        stop_step: K, the video denoising steps before the context is read; with the oracle, whose
            noise level the true future gets; None for expert and none.
        main: whether this is the result of the report's headline.
        variant: what is different from the run's own policy (another checkpoint, layer, share of
            the data); "" for nothing.
    """

    label: str
    mode: str
    stop_step: int | None = None
    main: bool = False
    variant: str = ""


def write_setting(folder: Path, setting: Setting) -> None:
    """Writes `setting.json` into a setting's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "setting.json").write_text(json.dumps(asdict(setting), indent=1) + "\n")


def read_setting(folder: Path) -> Setting:
    """Reads a setting's `setting.json`."""
    return Setting(**json.loads((folder / "setting.json").read_text()))


def read_results(path: Path) -> list[EpisodeResult]:
    """Reads a `results.jsonl`; a last line torn by a killed evaluation is left out.

    Raises:
        ValueError: another line is not a result.
    """
    whole, _ = _whole_lines(path)
    results = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            results.append(EpisodeResult(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"Line {number} of {path} is not an episode result ({error}): delete that line to "
                "have the episode evaluated again."
            ) from error
    return results


def drop_torn_line(path: Path) -> None:
    """Cuts off a last line that a killed evaluation left unfinished."""
    whole, size = _whole_lines(path)
    if len(whole) < size:
        os.truncate(path, len(whole))


def append_result(path: Path, result: EpisodeResult) -> None:
    """Appends one line in one write, so that a kill can tear only the last line."""
    line = json.dumps(asdict(result)) + "\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def _whole_lines(path: Path) -> tuple[bytes, int]:
    """The bytes up to the last newline, and the file's size."""
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1], len(content)
