"""Walk through a dataset's folders, in an order that no file system decides."""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

Visit = tuple[Path, list[str], list[str]]


def walk(path: Path) -> Iterator[Visit]:
    """Each folder with the sorted names of its folders and of its files; hidden ones left out.

    As with `os.walk`, folders that the caller removes from the first list are not entered.
    """
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(folder), folders, sorted(name for name in files if not name.startswith("."))


def glance(path: Path, most: int = 200) -> Iterator[Visit]:
    """The first folders of `walk`: enough to recognise a dataset, however large it is."""
    return islice(walk(path), most)
