"""Running a list of commands one after another, measured, and continued where they stopped."""

import json
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

SAMPLE_SECONDS = 0.5


@dataclass(frozen=True)
class Phase:
    """A step of a run: a name for people, and the command a person would type for it.

    A phase must be able to go on where an earlier, killed call of it stopped.
    """

    name: str
    command: tuple[str, ...]


def python(module: str, *arguments: str) -> tuple[str, ...]:
    """The command that runs a module with this interpreter."""
    return (sys.executable, "-m", module, *arguments)


def run_phases(phases: Sequence[Phase], record: Path) -> None:
    """Runs every phase that is not recorded as finished with the same command.

    Args:
        phases: in order; the first failure ends the run.
        record: JSON list of {"name", "command", "seconds", "peak_mb", "finished"}; seconds add up
            over interrupted calls, peak_mb is the resident memory of the phase's whole process
            tree.

    Raises:
        SystemExit: with the code of a phase that failed, or 130 after Ctrl-C.
    """
    rows = {row["name"]: row for row in json.loads(record.read_text())} if record.exists() else {}
    for number, phase in enumerate(phases, start=1):
        command = ["python", *phase.command[1:]]
        row = rows.get(phase.name)
        title = f"[{number}/{len(phases)}] {phase.name}"
        if row and row["command"] == command and row["finished"]:
            print(f"{title}: done before ({row['seconds']:.0f} s)", flush=True)
            continue
        if not row or row["command"] != command:
            row = {"name": phase.name, "command": command, "seconds": 0.0, "peak_mb": 0}
        print(f"{title}\n    {shlex.join(command)}", flush=True)
        code, seconds, peak = _measure(phase.command)
        row["seconds"] = round(row["seconds"] + seconds, 1)
        row["peak_mb"] = max(row["peak_mb"], peak)
        row["finished"] = code == 0
        rows[phase.name] = row
        partial = record.with_name(record.name + ".partial")
        partial.write_text(json.dumps([rows[p.name] for p in phases if p.name in rows], indent=1))
        partial.replace(record)
        if code != 0:
            print(f"'{phase.name}' stopped; run the same command again to go on.", file=sys.stderr)
            raise SystemExit(code)


def _measure(command: Sequence[str]) -> tuple[int, float, int]:
    """Runs a command; its exit code, seconds, and peak memory in MB."""
    start = time.monotonic()
    child = subprocess.Popen(command)
    peak = [0]
    watcher = threading.Thread(target=_watch_memory, args=(child, peak), daemon=True)
    watcher.start()
    while True:
        try:
            code = child.wait()
            break
        except KeyboardInterrupt:  # the terminal sent it to the child too: let it save and end
            continue
    watcher.join(2 * SAMPLE_SECONDS)
    code = 128 - code if code < 0 else code  # as a shell says it: 130 for Ctrl-C
    return code, time.monotonic() - start, peak[0]


def _watch_memory(child: subprocess.Popen, peak: list[int]) -> None:
    while child.poll() is None:
        total = 0
        try:
            process = psutil.Process(child.pid)
            for one in [process, *process.children(recursive=True)]:
                total += one.memory_info().rss
        except psutil.Error:  # a process ended between two lines
            pass
        peak[0] = max(peak[0], total // 2**20)
        time.sleep(SAMPLE_SECONDS)
