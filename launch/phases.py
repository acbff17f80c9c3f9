"""Commands one after another, measured, and continued where they stopped."""

import json
import logging
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from ml_collections import ConfigDict

from data_pipelines.atomic import write_json

SAMPLE_SECONDS = 0.5  # between two looks at the memory of a phase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Phase:
    """A step of a run: a name for people, and the command a person would type for it.

    A phase must be able to go on where an earlier, killed call of it stopped.

    Attributes:
        name: unique among the phases.
        command: the words of the command.
        proof: a file that only a completed call leaves, for commands that end with code 0 when
            they are interrupted, too; "" where code 0 says enough.
    """

    name: str
    command: tuple[str, ...]
    proof: str = ""


def command(module: str, *arguments: str) -> tuple[str, ...]:
    """The words that run a module with this Python."""
    return (sys.executable, "-m", module, *arguments)


def recording(what: ConfigDict, folder: str) -> tuple[str, ...]:
    """The command that records the demonstrations of an entry of `config.recording`."""
    cameras = what.get("cameras", ())
    return command(
        "launch.record",
        f"--out={folder}",
        f"--kind={what.kind}",
        f"--tasks={','.join(what.tasks)}",
        f"--episodes={what.episodes}",
        f"--seed={what.seed}",
        *([f"--cameras={','.join(cameras)}"] if cameras else []),
    )


def training(name: str, workdir: str, *arguments: str) -> Phase:
    """A training: interrupted, it ends with code 0, too."""
    words = command("launch.train", *arguments, f"--workdir={workdir}")
    return Phase(name, words, proof=f"{workdir}/finished")


def run_phases(phases: Sequence[Phase], record: Path) -> None:
    """Runs every phase that is not recorded as finished with the same command.

    Args:
        phases: in order; the first failure ends the run.
        record: JSON list of {"name", "command", "seconds", "peak_mb", "finished"}; seconds add up
            over interrupted calls, peak_mb is the resident memory of the phase's whole process
            tree.

    Raises:
        SystemExit: with the code of a phase that failed, or 130 after Ctrl-C, 143 after SIGTERM.
    """
    rows = {row["name"]: row for row in json.loads(record.read_text())} if record.exists() else {}
    with _noted_signals() as signals:
        for number, phase in enumerate(phases, start=1):
            words = ["python", *phase.command[1:]]
            row = rows.get(phase.name)
            title = f"[{number}/{len(phases)}] {phase.name}"
            if row and row["command"] == words and row["finished"]:
                print(f"{title}: done before ({row['seconds']:.0f} s)", flush=True)
                continue
            if not row or row["command"] != words:
                row = {"name": phase.name, "command": words, "seconds": 0.0, "peak_mb": 0}
            print(f"{title}\n    {shlex.join(words)}", flush=True)
            code, seconds, peak = _measure(phase.command, signals)
            row["seconds"] = round(row["seconds"] + seconds, 1)
            row["peak_mb"] = max(row["peak_mb"], peak)
            if code == 0 and not signals and phase.proof and not Path(phase.proof).exists():
                signals.append(signal.SIGTERM)  # the command had it, and saved what it had reached
            row["finished"] = code == 0 and not signals
            rows[phase.name] = row
            write_json(record, [rows[p.name] for p in phases if p.name in rows])
            if code != 0 or signals:
                log.error("'%s' stopped; run the same command again to continue.", phase.name)
                raise SystemExit(128 + signals[0] if signals else code)


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Inside the block, Ctrl-C and SIGTERM do nothing but enter the list."""
    noted: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: noted.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _measure(words: Sequence[str], signals: Sequence[int]) -> tuple[int, float, int]:
    """Runs a command; its exit code, seconds, and peak memory in MB.

    A terminal sends Ctrl-C to the child as well, which saves and ends; SIGTERM comes alone and is
    handed on, or the child would go on by itself and meet the next call in the same folder.
    """
    start = time.monotonic()
    child = subprocess.Popen(words)
    peak, handed_on = 0, False
    while child.poll() is None:
        peak = max(peak, _memory_mb(child.pid))
        if signal.SIGTERM in signals and not handed_on:
            child.terminate()
            handed_on = True
        with suppress(subprocess.TimeoutExpired):
            child.wait(SAMPLE_SECONDS)
    code = child.returncode
    code = 128 - code if code < 0 else code  # as a shell says it: 137 for a killed process
    return code, time.monotonic() - start, peak


def _memory_mb(pid: int) -> int:
    """Resident memory of a process and everything it started."""
    total = 0
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with suppress(psutil.Error):  # it ended just now
                total += one.memory_info().rss
    return total // 2**20
