"""Checks a machine before a long run: python -m launch.preflight --run-dir=runs/quickstart.

Each check prints one sentence. The exit code is 0 if everything needed is there (warnings are
allowed) and 2 if something is missing. Unlike the other commands, this file needs no package and
parses on every Python since 3.7, so that a wrong Python gets a sentence too. It therefore uses
`argparse`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

OLDEST_PYTHON = (3, 11)
GIGABYTE = 1e9
RENDER_BACKENDS = ("egl", "osmesa")  # in order of speed

_RENDER = """
import mujoco
model = mujoco.MjModel.from_xml_string(
    "<mujoco><worldbody><light pos='0 0 3'/><geom type='plane' size='9 9 1' rgba='1 0 0 1'/>"
    "<camera name='above' pos='0 0 2'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 16, 16)
renderer.update_scene(data, "above")
red = int(renderer.render()[8, 8, 0])
renderer.close()
assert red > 0, "the picture is black"
print("rendered")
"""


class Check(NamedTuple):
    """The outcome of one check: level is "ok", "warning" or "problem"."""

    level: str
    sentence: str


def check_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> Check:
    """Compares the interpreter's version with the oldest supported one."""
    found = ".".join(map(str, version))
    if tuple(version[:2]) >= OLDEST_PYTHON:
        return Check("ok", f"Python {found}.")
    return Check(
        "problem",
        f"mvjax needs Python 3.11 or newer; found: {found} ({sys.executable}). Start it with "
        "`bash launch/quickstart.sh`, which looks for one, or set PYTHON=/path/to/python3.12.",
    )


def check_writable(run_dir: Path) -> Check:
    """Writes a temporary file where `run_dir` is or would be made; permissions alone can lie."""
    try:
        with tempfile.TemporaryFile(dir=_nearest_existing(run_dir)):
            return Check("ok", f"{run_dir} can be written.")
    except OSError as error:
        return Check(
            "problem",
            f"Nothing can be written to {run_dir} ({error.strerror}): choose another run folder.",
        )


def check_disk(run_dir: Path, needed_gb: float) -> Check:
    """Compares the free space of the disk that holds (or will hold) `run_dir` with the need."""
    free_gb = shutil.disk_usage(_nearest_existing(run_dir)).free / GIGABYTE
    if free_gb >= needed_gb:
        return Check("ok", f"{free_gb:.1f} GB of disk free for {run_dir} ({needed_gb:g} needed).")
    return Check(
        "problem",
        f"{run_dir} needs {needed_gb:g} GB of disk and {free_gb:.1f} GB are free: make room, or "
        "choose a run folder on another disk.",
    )


def check_memory(needed_gb: float) -> Check:
    """Warns where less memory is free than the run likes to have; it may still fit."""
    free_gb = free_memory() / GIGABYTE
    if free_gb >= needed_gb:
        return Check("ok", f"{free_gb:.1f} GB of memory free.")
    return Check(
        "warning",
        f"{free_gb:.1f} GB of memory are free and {needed_gb:g} GB are advised: close other "
        "programs, or the run may be stopped by the system.",
    )


def check_rendering() -> Check:
    """Renders a tiny picture with the backend of MUJOCO_GL, or with MuJoCo's default."""
    backend = os.environ.get("MUJOCO_GL", "")
    reason = rendering_error(backend)
    name = f"MUJOCO_GL={backend}" if backend else "MuJoCo's default backend"
    if reason is None:
        return Check("ok", f"Rendering works with {name}.")
    if "No module named 'mujoco'" in reason:
        return Check(
            "problem",
            f"MuJoCo is not installed for {sys.executable}: start with `bash launch/quickstart.sh`,"
            " which installs everything, or run pip install 'mvjax[sim]'.",
        )
    return Check(
        "problem",
        f"MuJoCo cannot render with {name} ({reason}): unset MUJOCO_GL and start with "
        "`bash launch/quickstart.sh`, which finds or installs a backend that works.",
    )


def rendering_error(backend: str) -> str | None:
    """Renders a tiny picture in a process of its own (a broken driver may crash it).

    Args:
        backend: A value of MUJOCO_GL; "" leaves the choice to MuJoCo.

    Returns:
        None where that worked, else the last line of the error.
    """
    environment = {key: value for key, value in os.environ.items() if key != "MUJOCO_GL"}
    if backend:
        environment["MUJOCO_GL"] = backend
    try:
        result = subprocess.run(
            [sys.executable, "-P", "-c", _RENDER],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
    except subprocess.TimeoutExpired:
        return "no picture after 120 s"
    if result.returncode == 0 and "rendered" in result.stdout:
        return None
    # Errors at interpreter exit follow the one that matters and say "Exception ignored".
    lines = result.stderr.split("Exception ignored")[0].strip().splitlines()
    return lines[-1] if lines else f"exit code {result.returncode}"


def find_rendering_backend() -> str | None:
    """Returns the first MUJOCO_GL value that renders here, or None."""
    return next((b for b in RENDER_BACKENDS if rendering_error(b) is None), None)


def free_memory() -> float:
    """Bytes that this process may still take.

    On Linux the smaller of the machine's available memory and what its control group (a
    container's limit) leaves; elsewhere the machine's total memory.
    """
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = float(meminfo.split("MemAvailable:")[1].split()[0]) * 1024
    try:
        group = Path("/sys/fs/cgroup")
        limit = float((group / "memory.max").read_text())  # "max" where there is none
        used = float((group / "memory.current").read_text())
    except (OSError, ValueError):
        return available
    return min(available, limit - used)


def check_all(run_dir: Path, *, disk_gb: float = 2, memory_gb: float = 6) -> list[Check]:
    """Runs every check; with a wrong Python only that one, as the others would mislead.

    Args:
        run_dir: The folder that the run will write; it need not exist yet and is not made.
        disk_gb: Disk space that the run needs, in 10^9 bytes.
        memory_gb: Memory below which a warning is given, in 10^9 bytes.
    """
    python = check_python()
    if python.level == "problem":
        return [python]
    return [
        python,
        check_writable(run_dir),
        check_disk(run_dir, disk_gb),
        check_memory(memory_gb),
        check_rendering(),
    ]


def require(run_dir: Path, *, disk_gb: float = 2, memory_gb: float = 6) -> None:
    """Prints warnings and problems to stderr and exits with code 2 where there is a problem."""
    checks = check_all(run_dir, disk_gb=disk_gb, memory_gb=memory_gb)
    for check in checks:
        if check.level != "ok":
            print(f"{check.level}: {check.sentence}", file=sys.stderr)
    if any(check.level == "problem" for check in checks):
        sys.exit(2)


def _nearest_existing(path: Path) -> Path:
    """The path itself or its nearest parent that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def main() -> int:
    """Prints every check's outcome; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, kind, default, help in (
        ("run-dir", Path, Path("runs/quickstart"), "folder of the run"),
        ("disk-gb", float, 2, "disk space the run needs"),
        ("memory-gb", float, 6, "warn below this much memory"),
    ):
        spellings = "--" + name, "--" + name.replace("-", "_")  # as the other commands take it
        parser.add_argument(*spellings, type=kind, default=default, help=help)
    parser.add_argument(
        "--find-gl", action="store_true", help="only print the first MUJOCO_GL that renders here"
    )
    options = parser.parse_args()
    if options.find_gl:
        backend = find_rendering_backend()
        if backend:
            print(backend)
        return 0 if backend else 2
    checks = check_all(options.run_dir, disk_gb=options.disk_gb, memory_gb=options.memory_gb)
    for check in checks:
        print(f"{check.level:8} {check.sentence}")
    return 2 if any(check.level == "problem" for check in checks) else 0


if __name__ == "__main__":
    sys.exit(main())
