"""Walk through a dataset's folders, in an order that no file system decides."""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

_NOT_OURS = "lost+found"  # the file system's, at the root of a disk; only root may read it
Visit = tuple[Path, list[str], list[str]]


def walk(path: Path) -> Iterator[Visit]:
    """Each folder with the sorted names of its folders and of its files; hidden ones left out.

    As with `os.walk`, folders that the caller removes from the first list are not entered. Links
    are followed, for datasets spread over disks; a folder that two lead to is entered once.

    Raises:
        OSError: if a folder cannot be read; its episodes would be missing without a word.
    """
    entered = set()
    for folder, folders, files in os.walk(path, onerror=_raise, followlinks=True):
        status = os.stat(folder)
        if (place := (status.st_dev, status.st_ino)) in entered:
            folders.clear()
            continue
        entered.add(place)
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n != _NOT_OURS)
        yield Path(folder), folders, sorted(name for name in files if not name.startswith("."))


def glance(path: Path, most: int = 200) -> Iterator[Visit]:
    """The first folders of `walk`: enough to recognise a dataset, however large it is."""
    return islice(walk(path), most)


def _raise(error: OSError) -> None:
    if not isinstance(error, NotADirectoryError):  # a file has no folders
        raise error
