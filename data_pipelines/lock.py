"""One owner per folder: two runs that write there would spoil each other's files.

A small file in the folder names the owner, and its modification time is the owner's heartbeat.
Beside it the system's own lock, which ends with its process; but not every shared file system
carries that from one machine to another, and some have none.
"""

import fcntl
import json
import logging
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data_pipelines.atomic import write_text

log = logging.getLogger(__name__)

LOCK = ".lock"
HEARTBEAT = 10.0  # seconds between two beats
STALE = 180.0  # seconds without a beat, after which an owner counts as ended
_WATCHED = 2.5 * HEARTBEAT  # seconds in which no beat is seen, before that is believed
_SETTLING = 1.0  # seconds in which several processes may take over the same folder
_POLL = 1.0

Owner = dict[str, Any]


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keeps a folder to this process.

    What an ended process has left behind is taken over: at once on the same machine. Of another
    machine, whether it has ended is seen from its heartbeat, which takes up to `STALE` seconds.

    Raises:
        OSError: another process owns the folder; the message says which one, and since when.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path, ended = folder / LOCK, threading.Event()
    mine = {"id": uuid.uuid4().hex, **_machine(), **_numbering(), "process": os.getpid()}
    mine["since"] = time.strftime("%F %T %z")
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _take(path, mine, _flock(descriptor))
        threading.Thread(target=_beat, args=(path, mine, ended), daemon=True).start()
        yield
    finally:
        ended.set()
        with suppress(OSError):
            if _owner(path) == mine:
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


def _take(path: Path, mine: Owner, locked: bool | None) -> None:
    """Writes the lock file, in the place of one whose owner has ended."""
    if locked is False:
        raise _refusal(path)
    seen, began = None, time.monotonic()
    while not _create(path, json.dumps(mine)):
        owner, beat, age = _owner(path), *_heartbeat(path)
        if beat is None:  # released just now
            continue
        # Many file systems take the time of a beat from the machine that beats, whose clock may be
        # another one, or was set: what counts is that no beat is seen.
        watched = time.monotonic() - began if beat == seen else 0.0
        silent = max(age, watched)
        if (silent >= STALE and watched >= _WATCHED) or _has_ended(owner, locked):
            log.info(f"taking over {path.parent} from {_name(owner)}, which has ended.")
            write_text(path, json.dumps(mine))
            time.sleep(_SETTLING)  # the last one who writes has it
            if _owner(path) != mine:
                raise _refusal(path)
            return
        if seen is None:
            log.info(
                f"{path} names {_name(owner)}, whose last heartbeat was {silent:.0f} s ago; "
                f"waiting for the next one, at most {max(STALE - silent, _WATCHED):.0f} s. If that "
                "process has ended, or the folder is a copy, delete the file."
            )
            seen = beat
        elif beat != seen:
            raise _refusal(path)
        time.sleep(_POLL)


def _refusal(path: Path) -> OSError:
    owner = _owner(path)
    since = f", since {owner['since']}" if owner else ""
    return OSError(
        f"{_name(owner)} is writing to {path.parent}{since}; wait for it, stop it, or name another "
        "folder."
    )


def _name(owner: Owner) -> str:
    return f"process {owner['process']} on {owner['host']}" if owner else "another process"


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


def _numbering() -> dict[str, str]:
    """Within what a process has its number: containers on one machine number their own."""
    namespace = Path("/proc/self/ns/pid")
    return {"numbering": os.readlink(namespace) if namespace.is_symlink() else ""}


def _beat(path: Path, mine: Owner, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT):
        with suppress(OSError):  # a beat that fails is no reason to stop
            owner = _owner(path)
            if owner == mine:
                os.utime(path)
            elif owner and not ended.is_set():
                log.warning(
                    f"{_name(owner)} has taken over {path.parent}, as if this process had ended. "
                    "Both are writing there now: stop one of them."
                )
                return


def _owner(path: Path) -> Owner:
    """What the lock file says; {} where it cannot be read, or is not written yet."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, PermissionError, ValueError):
        return {}
    named = isinstance(found, dict) and {"host", "process", "since"} <= set(found)
    return found if named else {}


def _heartbeat(path: Path) -> tuple[int | None, float]:
    """Time of the last heartbeat in ns, and seconds since, by the clock of the file system."""
    try:
        with tempfile.TemporaryFile(dir=path.parent) as now:
            beat, present = path.stat().st_mtime_ns, os.fstat(now.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None, 0.0
    return beat, (present - beat) / 1e9


def _has_ended(owner: Owner, locked: bool | None) -> bool:
    """Whether an owner on this machine has ended; of another machine, that is not known."""
    if not owner or {name: owner.get(name) for name in _machine()} != _machine():
        return False
    if locked:  # the system's lock has the last word
        return True
    if owner.get("numbering") != _numbering()["numbering"]:
        return False
    if owner["process"] == os.getpid():  # our own number is that of an earlier process
        return True
    try:
        with suppress(PermissionError):  # it runs, for another user
            os.kill(owner["process"], 0)
    except ProcessLookupError:
        return True
    return False
