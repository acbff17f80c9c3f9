"""Atomic writes of files and folders: a path never holds half of its content.

The content is written to `<name>.partial` beside it, which is renamed when it is complete. A killed
process leaves that file behind, and the next writer replaces it. Of two processes that write one
path at the same time, at least one fails. Nothing is flushed to the disk: jobs check what they find
after a power failure.
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


def wait_until(condition: Callable[[], bool]) -> None:
    """Polls a condition that another process makes true; if that dies, the launcher ends us."""
    while not condition():
        time.sleep(0.2)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
