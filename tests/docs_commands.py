"""Runs the commands of the documentation, page by page: `pytest -n 0 tests/docs_commands.py`.

A fence ```bash or ```python without a title promises that it runs (CONTRIBUTING.md, "The
documentation"). Each page is run from its first fence to its last one in a copy of the repository
in which the quickstart has been run at smoke size; `data/my_robot` is a small LeRobot dataset there
and `data/videos` a folder of videos. A fence of shell is `bash -euo pipefail`. The Python of a page
is one program, fence after fence. What is made smaller, and what becomes of servers, is in
`small_commands.py`.

One page alone: `pytest -n 0 -s tests/docs_commands.py -k serving`; `MVJAX_SMOKE_RUN=FOLDER` takes
that folder of `mvjax quickstart --size=smoke --run-dir=runs/quickstart` and saves its two minutes.
The suite does not collect this file; .ci/run names it.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import my_robot_dataset
import pytest
from docs_fences import ROOT, Fence, fences, page_names
from small_commands import PORT, SERVERS, stop_servers

from launch.preflight import find_rendering_backend

FENCE_SECONDS = 300
OUTPUT_LINES = 40  # of the end, in a message
PROGRAMS = ("mvjax", "python", "python3", "bash", "pip")
pytestmark = pytest.mark.timeout(1800)

# Writes down where the first failed command stands, also one in a function or a subshell.
TRAP = 'trap \'echo "$LINENO $BASH_COMMAND" >>"$MVJAX_PAGE_FAILED"\' ERR; set -E; '
# Runs the files that it is told, all with the same names; its own answers go where print does not.
PYTHON = """
import os, sys, traceback
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
sys.path.insert(0, "")
names = {"__name__": "__main__"}
for order in iter(sys.stdin.readline, ""):
    path, _, place = order.rstrip("\\n").partition("\\t")
    try:
        exec(compile(open(path).read(), place, "exec"), names)
        said = "done"
    except BaseException:
        traceback.print_exc()
        said = "failed"
    sys.stdout.flush()
    print(said, file=answers, flush=True)
"""


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A copy of the repository after the quickstart, which every page gets a copy of."""
    folder = tmp_path_factory.mktemp("prepared") / "mvjax"
    copy_repository(folder)
    run_quickstart(folder)
    my_robot_dataset.write(folder / "data/my_robot")
    my_robot_dataset.write_videos(folder / "data/videos")
    return folder


def run_quickstart(folder: Path) -> None:
    """Runs every phase with a few steps, or takes the run of another time."""
    kept = os.environ.get("MVJAX_SMOKE_RUN")
    if kept:
        shutil.copytree(kept, folder / "runs/quickstart")
        return
    result = subprocess.run(
        [sys.executable, "-m", "launch.quickstart", "--size=smoke", "--run-dir=runs/quickstart"],
        cwd=folder,
        env=environment(folder),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, last_lines(result.stdout + result.stderr)


def copy_repository(folder: Path) -> None:
    """Copies what git knows and what it does not ignore, and the programs of a page's PATH."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout.split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():  # a deleted one is still listed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    activate = folder / ".venv/bin/activate"  # of an environment that is active already
    activate.parent.mkdir(parents=True)
    activate.touch()
    programs = folder.parent / "programs"
    programs.mkdir()
    for name in PROGRAMS:
        run = f'exec "{sys.executable}" "{ROOT / "tests/small_commands.py"}" {name} "$@"'
        (programs / name).write_text(f"#!/bin/sh\n{run}\n")
        (programs / name).chmod(0o755)


def environment(folder: Path) -> dict[str, str]:
    """Variables of a page's commands; the folder's own mvjax comes before an installed one."""
    found = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles four times faster
        "NO_MKDOCS_2_WARNING": "1",
        "PYTHONPATH": str(folder),
    }
    if sys.platform == "linux" and "MUJOCO_GL" not in found:
        found["MUJOCO_GL"] = find_rendering_backend() or ""
    return found


class Page:
    """Runs the fences of one page, in a folder of its own."""

    def __init__(self, prepared: Path, folder: Path):
        self._work = folder / "mvjax"
        shutil.copytree(prepared, self._work, symlinks=True)
        self._servers = folder / "servers"
        self._servers.mkdir()
        self._failed = folder / "failed.txt"
        self._output = folder / "output.txt"
        self._port = free_port()
        path = [str(prepared.parent / "programs"), str(Path(sys.executable).parent)]
        self._environment = environment(self._work) | {
            "PATH": os.pathsep.join([*path, os.environ["PATH"]]),
            PORT: str(self._port),
            SERVERS: str(self._servers),
            "MVJAX_PAGE_FAILED": str(self._failed),
        }
        self._python: subprocess.Popen | None = None

    def run(self, fence: Fence) -> None:
        """Runs a fence; fails with its page, line, command and the end of what it said."""
        text = re.sub(r"\b(localhost|127\.0\.0\.1):8000\b", rf"\1:{self._port}", fence.text)
        script = self._work.parent / f"line_{fence.line}"
        self._failed.write_text("")
        if fence.language == "bash":
            script.write_text(TRAP + text)
            code = self._shell(script)
        else:
            script.write_text(text)
            code = self._run_python(script, f"{fence.page}, the fence of line {fence.line}")
        if code != 0:
            why = "took too long" if code == -signal.SIGKILL else f"ended with code {code}"
            pytest.fail(f"{self._place(fence)}\n{why}:\n{self._said()}", pytrace=False)

    def _shell(self, script: Path) -> int:
        bash = shutil.which("bash")
        with self._output.open("w") as output:
            process = subprocess.Popen(
                [bash, "-euo", "pipefail", str(script)],
                cwd=self._work,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,
            )
            with killed_after(FENCE_SECONDS, process):
                return process.wait()

    def _run_python(self, script: Path, place: str) -> int:
        self._output.write_text("")
        if self._python is None:
            self._python = subprocess.Popen(
                [sys.executable, "-u", "-c", PYTHON],
                cwd=self._work,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._output.open("a"),
                text=True,
                process_group=0,
            )
        with killed_after(FENCE_SECONDS, self._python):
            self._python.stdin.write(f"{script}\t{place}\n")
            self._python.stdin.flush()
            answer = self._python.stdout.readline()
        return 0 if answer == "done\n" else self._python.poll() or 1

    def _place(self, fence: Fence) -> str:
        failed = self._failed.read_text().splitlines()
        if not failed:
            return f"{fence.page}:{fence.line + 1}:\n{fence.text}"
        line, _, command = failed[0].partition(" ")
        return f"{fence.page}:{fence.line + int(line)}: {command}"

    def _said(self) -> str:
        said = last_lines(self._output.read_text(errors="replace"))
        for log in self._servers.glob("*.log"):
            said += f"\nthe server's log:\n{last_lines(log.read_text(errors='replace'))}"
        return said

    def close(self) -> None:
        """Ends what still runs."""
        if self._python is not None:
            self._python.stdin.close()
            with killed_after(10, self._python):
                self._python.wait()
        stop_servers(self._servers)


class killed_after:  # reads as a function
    """Kills a process and those it started when a block takes longer than so many seconds."""

    def __init__(self, seconds: float, process: subprocess.Popen):
        self._timer = threading.Timer(seconds, self._kill)
        self._process = process

    def _kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def last_lines(text: str) -> str:
    """The end of an output, indented."""
    return "\n".join(f"    {line}" for line in text.splitlines()[-OUTPUT_LINES:])


def run_page(prepared: Path, folder: Path, name: str, text: str) -> None:
    """Runs the fences of a page that promise it, and says how long each took."""
    page = Page(prepared, folder)
    try:
        for fence in fences(name, text):
            if fence.runs:
                began = time.monotonic()
                page.run(fence)
                print(f"{name}:{fence.line}: {time.monotonic() - began:.1f} s")
    finally:
        page.close()


@pytest.fixture
def folder(tmp_path) -> Iterator[Path]:
    """A folder that does not outlive its page."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.mark.parametrize("name", page_names())
def test_commands_of_a_page_run(prepared, folder, name):
    text = (ROOT / name).read_text()
    if not any(fence.runs for fence in fences(name, text)):
        pytest.skip("no command of this page promises to run")
    run_page(prepared, folder, name, text)


def test_a_command_that_fails_is_named_with_its_page_and_line(prepared, folder):
    page = "# A page\n\n```bash\necho one\n# two\nmvjax train --config=quickstart_video \\\n"
    page += "    --workdir=x --stpes=1\n```\n"
    with pytest.raises(pytest.fail.Exception) as failure:
        run_page(prepared, folder, "page.md", page)
    said = str(failure.value).splitlines()
    assert said[0].startswith("page.md:6: mvjax train --config=quickstart_video"), said
    assert "stpes" in said[-1], said


def test_python_of_a_page_is_one_program_and_fails_with_its_line(prepared, folder):
    page = "```python\nx = 1\n```\n\n```python\nassert x == 1\n\nassert x == 2\n```\n"
    with pytest.raises(pytest.fail.Exception, match=r"fence of line 5") as failure:
        run_page(prepared, folder, "page.md", page)
    assert "line 3" in str(failure.value)
