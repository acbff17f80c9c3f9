"""What it means that a checkpoint cannot be read: damage, a reason that may pass, or neither.

Orbax and tensorstore raise many kinds of errors; only some prove that files are not what was saved.
"""

import errno
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import jax

log = logging.getLogger(__name__)
T = TypeVar("T")


class CheckpointMismatch(ValueError):
    """A readable checkpoint that does not fit the run; the message says what to change."""


class CheckpointDamaged(ValueError):
    """What is read is not what was saved."""


class CheckpointDeleted(FileNotFoundError):
    """A checkpoint was deleted while it was read."""


PAUSES = (0.5, 5.0, 20.0)  # seconds before another attempt, where the reason may pass

# What networks and their file systems report, and recover from.
_PASSING = {
    getattr(errno, name)
    for name in (
        *("ESTALE", "EIO", "ETIMEDOUT", "EAGAIN", "EBUSY", "EINTR", "EREMOTEIO", "ENOLINK"),
        *("ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "ENOTCONN", "ENETDOWN", "ENETUNREACH"),
        *("EHOSTDOWN", "EHOSTUNREACH", "ECOMM", "EPROTO", "ENETRESET", "ESHUTDOWN"),
    )
    if hasattr(errno, name)
}
_PASSING_STATUS = ("UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED")  # of tensorstore
_DAMAGE_STATUS = ("DATA_LOSS", "NOT_FOUND", "OUT_OF_RANGE", "FAILED_PRECONDITION")
# Errors that are not about the files at all.
_NOT_DAMAGE = (CheckpointMismatch, jax.errors.JaxRuntimeError, MemoryError, ImportError)


def patiently(read: Callable[[], T]) -> T:
    """Calls `read`, and again after a pause if it fails for a reason that may pass.

    Damage is looked at twice, too: it must still be there.
    """
    for number, pause in enumerate(PAUSES):
        try:
            return read()
        except Exception as error:
            if not (_may_pass(error) or (number == 0 and is_damage(error))):
                raise
            if _may_pass(error):
                log.warning(f"{one_line(error)}; trying again in {pause:g} s.")
        time.sleep(pause)
    return read()


def is_damage(error: BaseException) -> bool:
    """Whether an error proves that files are missing, cut off or changed.

    Errors of the system other than a missing file prove nothing, nor does an error of unknown kind.
    """
    reasons = _reasons(error)
    numbers = {_number(e) for e in reasons} - {None, errno.ENOENT}
    if numbers or any(isinstance(e, _NOT_DAMAGE) for e in reasons):
        return False
    parsing = (CheckpointDamaged, FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError)
    return any(isinstance(e, parsing) or str(e).startswith(_DAMAGE_STATUS) for e in reasons)


def _may_pass(error: BaseException) -> bool:
    return any(
        _number(e) in _PASSING
        or isinstance(e, TimeoutError)
        or (isinstance(e, ValueError) and str(e).startswith(_PASSING_STATUS))
        for e in _reasons(error)
    )


def _reasons(error: BaseException | None) -> list[BaseException]:
    """An error and what it came from: Orbax hides the reason behind an error of its own."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return found


def _number(error: BaseException) -> int | None:
    """The number of an error of the system, also where tensorstore tells it in words."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    told = re.search(r"os_error_code='(\d+)'", str(error))
    return int(told[1]) if told else None


@contextmanager
def system_errors() -> Iterator[None]:
    """Around what writes: an error of the system that Orbax hides is raised as the OSError it is.

    Tensorstore tells a full quota or a network that is gone as a ValueError.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        numbers = [number for e in _reasons(error) if (number := _number(e))]
        if not numbers and not _may_pass(error):
            raise
        raise OSError(*numbers[-1:] or [errno.EIO], one_line(error)) from error


def unreadable(where: Path, error: Exception) -> Exception:
    """What to raise for an error that came while the checkpoint at `where` was read.

    Orbax and tensorstore raise many kinds of errors, few of which name the checkpoint.
    """
    if isinstance(error, (*_NOT_DAMAGE, CheckpointDeleted)):
        return error
    damage = is_damage(error)
    if damage and _is_deleted(where):
        steps = [int(path.name) for path in where.parent.glob("*") if path.name.isdecimal()]
        newest = f"the newest is now {max(steps)}" if steps else "none is left"
        return CheckpointDeleted(
            f"the checkpoint {where} was deleted while it was read, as a training deletes its "
            f"older ones (training.keep); {newest}: run the same command again."
        )
    advice = (
        "bring back a copy, or move it away: then the one before it is used."
        if damage
        else "nothing shows that it is damaged: run the same command again."
    )
    return OSError(f"the checkpoint {where} cannot be read ({one_line(error)}); {advice}")


def _is_deleted(where: Path) -> bool:
    """Whether a checkpoint is gone, or is going at this moment."""

    def count() -> int:
        return sum(len(files) for _, _, files in os.walk(where))

    left = count()
    while where.is_dir():
        time.sleep(PAUSES[0])
        before, left = left, count()
        if left == before:
            return left == 0  # gone by now, or empty folders
    return True


@contextmanager
def damage_reported(where: Path) -> Iterator[None]:
    """Around what reads the checkpoint at `where`: raises the error of `unreadable` instead."""
    try:
        yield
    except Exception as error:
        reason = unreadable(where, error)
        if reason is error:
            raise
        raise reason from error


def one_line(error: BaseException) -> str:
    """The last reason of an error, which says what happened; Orbax's own words say where."""
    reason = _reasons(error)[-1]
    text = " ".join(str(reason).split()).partition(" [tensorstore_spec=")[0]
    if len(text) > 240:  # what happened stands at the end
        text = f"{text[:60]} ... {text[-160:]}"
    return f"{type(reason).__name__}: {text}"
