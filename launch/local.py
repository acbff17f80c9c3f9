"""Runs a command in several processes on this machine that work together.

    python -m launch.local --processes=4 -- train --config=configs/... --workdir=runs/...

After -- follow a command of `mvjax` (train) or a module, and its arguments. With GPUs, each process
gets one of them, in order. On a CPU, the processes share the cores. Only process 0 prints. If a
process dies, the others are stopped and one sentence says which process it was and why; run the
same command again to continue. On Ctrl-C or SIGTERM all processes save the same step and exit.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import IO

from absl import flags

from launch.cli import COMMANDS
from launch.entry import run, stop

PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes.", 1)

POLL_SECONDS = 0.1
SETTLE_SECONDS = 0.5  # the others may fail because of the first before this program has noticed it
GRACE_SECONDS = 5  # from SIGTERM to SIGKILL, when nothing can be saved any more
CRASH_LINES = 30


def main(module: str, *arguments: str) -> int:
    """Starts the processes, waits for them, and returns the exit code."""
    if PROCESSES.value is None:  # not `required`: that would hold for whoever imports this file
        raise ValueError("--processes must be given.")
    command = [f"launch.{module}" if module in COMMANDS else module, *arguments]
    with _started(command, PROCESSES.value) as (processes, outputs), _stops(processes) as got:
        while not _failed(processes) and any(p.poll() is None for p in processes):
            time.sleep(POLL_SECONDS)
        if not _failed(processes):
            return 130 if signal.SIGINT in got else 0
        time.sleep(SETTLE_SECONDS)
        culprit = _culprit(processes)
        code = processes[culprit].returncode
        _end(processes)  # whatever they still say comes before the sentence that tells the reason
        stop(_reason(culprit, code, outputs), code if code > 0 else 128 - code)


@contextlib.contextmanager
def _started(
    command: Sequence[str], count: int
) -> Iterator[tuple[list[subprocess.Popen], list[IO[str] | None]]]:
    """The processes and what each writes (None for process 0, whose output is ours)."""
    coordinator = f"127.0.0.1:{free_port()}"
    outputs = [None, *(tempfile.TemporaryFile("w+", errors="replace") for _ in range(count - 1))]
    processes: list[subprocess.Popen] = []
    try:
        for index, output in enumerate(outputs):
            environment = {
                "JAX_LOCAL_DEVICE_IDS": str(index),
                **os.environ,
                "MVJAX_COORDINATOR": coordinator,
                "MVJAX_PROCESS_COUNT": str(count),
                "MVJAX_PROCESS_ID": str(index),
            }
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", *command],
                    env=environment,
                    stdout=output,
                    stderr=output and subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C reaches this program only, which passes it on
                )
            )
        yield processes, outputs
    finally:
        _end(processes)


@contextlib.contextmanager
def _stops(processes: Sequence[subprocess.Popen]) -> Iterator[set[int]]:
    """Passes SIGTERM and Ctrl-C on as SIGTERM, the second time ends; yields those received."""
    got: set[int] = set()

    def pass_on(number: int, frame: FrameType | None) -> None:
        if got:
            raise SystemExit(128 + number)
        got.add(number)
        for process in processes:
            process.terminate()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    yield got


def _failed(processes: Sequence[subprocess.Popen]) -> bool:
    return any(p.poll() not in (None, 0) for p in processes)


def _culprit(processes: Sequence[subprocess.Popen]) -> int:
    """The process that failed first, as far as can be told.

    A victim does not die of a signal, except for SIGABRT, with which JAX ends those that miss
    another process.
    """
    failed = [i for i, p in enumerate(processes) if p.poll() not in (None, 0)]
    victim = {i: processes[i].returncode == -signal.SIGABRT for i in failed}
    return min(failed, key=lambda i: (victim[i], processes[i].returncode > 0, i))


def _reason(index: int, code: int, outputs: Sequence[IO[str] | None]) -> str:
    """What to tell about process `index`; what process 0 said is on the screen already."""
    how = f"ended with code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
    said, output = "", outputs[index]
    if output is not None:
        output.seek(0)
        lines = [line.strip() for line in output if line.strip()]
        if code > 0 and lines:
            said = f", saying {lines[-1]!r}"
        elif -code not in (signal.SIGKILL, signal.SIGTERM):  # a crash says more than one line
            print("\n".join(lines[-CRASH_LINES:]), file=sys.stderr)
    others = "; the others are stopped" if len(outputs) > 1 else ""
    return f"process {index} of {len(outputs)} {how}{said}{others}."


def _end(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    run(main, positional=("COMMAND...",))
