"""Writing files and folders so that a name never stands for half of one, and waiting for them.

What is written goes to a neighbour, `<name>.partial`, which takes the place of `<name>` when it is
whole. A process that is killed leaves the neighbour behind; the next one that writes replaces it.
Of two processes that write one path at the same time, at least one fails: a job gives each path to
one of its processes. The disk need not be asked to flush: after a loss of power a job checks what
it finds, or a person starts it again.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a neighbour of `path` to write (a file, or a folder); then that takes its place.

    Where the block fails, what was written is removed and `path` is as it was.

    Raises:
        FileExistsError: if `path` is a folder that holds something: none can take its place.
    """
    path = Path(path)
    if path.is_dir() and any(path.iterdir()):  # before hours are spent on what replaces it
        raise FileExistsError(f"{path} holds something already; remove it, or name another folder")
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


def wait_until(condition: Callable[[], bool]) -> None:
    """Waits for what another process leaves in the folder; if that dies, its launcher ends us."""
    while not condition():
        time.sleep(0.2)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
