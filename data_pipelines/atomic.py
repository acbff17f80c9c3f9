"""Atomic writes of files and folders: a path never holds half of its content.

The content is written to `<name>.partial` beside it, which is renamed when it is complete. A killed
process leaves that file behind, and the next writer replaces it. Of two processes that write one
path at the same time, at least one fails. Nothing is flushed to the disk: jobs check what they find
after a power failure.
"""

import fcntl
import json
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger(__name__)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path for a file or folder, and renames it to `path` at the end.

    If the block fails, the temporary one is removed and `path` stays as it was.

    Raises:
        FileExistsError: if `path` is a folder that is not empty; a rename cannot replace that.
    """
    path = Path(path)
    if path.is_dir() and any(path.iterdir()):  # said now, not after hours of work on the content
        raise FileExistsError(f"{path} is not empty; remove it, or name another folder")
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        _remove(partial)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON."""
    write_text(path, json.dumps(content, indent=1))


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """Writes an uncompressed .npz."""
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


# Who has a folder: a small file in it, whose modification time is the holder's heartbeat. Beside it
# the system's own lock, which ends with its process; but not every shared file system carries it
# from one machine to another, and some have none.
LOCK = ".lock"
HEARTBEAT = 20.0  # seconds between two beats
STALE = 180.0  # seconds without one, after which another machine takes the folder over
_TAKING = 1.0  # seconds in which another one may take the same stale folder


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keeps a folder to this process: two runs that write there would spoil each other's files.

    What a process that has ended left behind is taken over: at once on the same machine, after
    `STALE` seconds without a heartbeat from another one.

    Raises:
        OSError: another process holds the folder; the message says which one, and since when.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path, mine = folder / LOCK, f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    descriptor, ended = os.open(folder, os.O_RDONLY), threading.Event()
    beating = threading.Thread(target=_beat, args=(path, mine, ended), daemon=True)
    try:
        _take(path, mine, _flock(descriptor))
        beating.start()
        yield
    finally:
        ended.set()
        with suppress(OSError):
            if _holder(path).get("id") == mine:
                path.unlink()
        os.close(descriptor)


def _flock(descriptor: int) -> bool | None:
    """The system's lock: True if it is ours, False if another process has it, None without one."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None  # this file system has no locks
    return True


def _take(path: Path, mine: str, locked: bool | None) -> None:
    """Writes our name into the lock file, in the place of a holder that has ended."""
    record = {"id": mine, **_machine(), "process": os.getpid(), "since": time.strftime("%F %T %z")}
    if locked is not False and _create(path, json.dumps(record)):
        return
    holder, age = _holder(path), _age(path)
    if locked is not False and not path.exists():  # released just now
        return _take(path, mine, locked)
    here = {name: holder.get(name) for name in _machine()} == _machine()
    # The system's lock has the last word on one machine. A process number may have been given to
    # another process since, so the heartbeat must be fresh, too.
    alive = not locked and _is_running(holder["process"]) if here else True
    if locked is False or (alive and age < STALE):
        name = f"process {holder['process']} on {holder['host']}" if holder else "another process"
        since = f", since {holder['since']}" if holder else ""
        beat = f" Its last heartbeat was {age:.0f} s ago; after {STALE:.0f} s it counts as ended."
        raise OSError(
            f"{name} is writing to {path.parent}{since}; wait for it, stop it, or name another "
            f"folder.{'' if here or not holder else beat}"
        )
    log.info(
        f"taking {path.parent} over from process {holder['process']} on {holder['host']}, which "
        "has ended."
        if holder
        else f"taking {path.parent} over: its lock file names no process."
    )
    write_text(path, json.dumps(record))
    if not locked:  # the last one who writes has it
        time.sleep(_TAKING)
        if (winner := _holder(path)).get("id") != mine:
            raise OSError(
                f"process {winner.get('process')} on {winner.get('host')} has just taken "
                f"{path.parent}; wait for it, stop it, or name another folder."
            )


def _create(path: Path, text: str) -> bool:
    """Writes a file that must not exist yet: of two processes, one succeeds."""
    try:
        file = path.open("x")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(text)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def _machine() -> dict[str, str]:
    """A machine and its current run: after a restart, every process is another one."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {"host": socket.gethostname(), "boot": boot.read_text().strip() if boot.exists() else ""}


def _beat(path: Path, mine: str, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT):
        # A beat that fails is no reason to stop; nor is a file that somebody has removed.
        with suppress(OSError):
            if _holder(path).get("id") == mine:
                os.utime(path)


def _holder(path: Path) -> dict[str, Any]:
    """What the lock file says; {} where it is not there, or not written yet."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    named = isinstance(found, dict) and {"host", "process", "since"} <= set(found)
    return found if named else {}


def _age(path: Path) -> float:
    """Seconds since the last heartbeat, by the clock of the file system."""
    try:
        with tempfile.TemporaryFile(dir=path.parent) as now:
            return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return STALE


def _is_running(process: int) -> bool:
    if process == os.getpid():
        return False  # a number of an earlier process, such as the first one of a container
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # of another user
    return True


def wait_until(condition: Callable[[], bool]) -> None:
    """Polls a condition that another process makes true; if that dies, the launcher ends us."""
    while not condition():
        time.sleep(0.2)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
