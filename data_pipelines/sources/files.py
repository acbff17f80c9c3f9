"""Shared by the formats: folders, ids, texts and their times, text embeddings."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from data_pipelines.episode import NANOSECONDS, Section, reason

# Periods of a camera, nanoseconds; others show that times are in another unit.
_SHORTEST, _LONGEST = NANOSECONDS // 1000, 60 * NANOSECONDS

Visit = tuple[Path, list[str], list[str]]
_SKIPPED = "lost+found"  # at the root of a file system, readable by root only

# `launch.record` writes the one when it starts, and the other when it ends.
UNFINISHED, MANIFEST = "unfinished", "recording.json"


def walk(path: Path) -> Iterator[Visit]:
    """Each folder with the sorted names of its folders and files; hidden ones are left out.

    As with `os.walk`, folders that the caller removes from the first list are not entered. Links
    are followed, for datasets spread over disks, but no folder is entered twice.

    Raises:
        OSError: if a folder cannot be read, as its episodes would be missing silently.
    """
    entered = set()
    for folder, folders, files in os.walk(path, onerror=_raise, followlinks=True):
        status = os.stat(folder)
        if (place := (status.st_dev, status.st_ino)) in entered:
            folders.clear()
            continue
        entered.add(place)
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n != _SKIPPED)
        yield Path(folder), folders, sorted(name for name in files if not name.startswith("."))


def glance(path: Path, most: int = 200) -> Iterator[Visit]:
    """The first folders of `walk`: enough to recognise a dataset of any size."""
    return islice(walk(path), most)


def _raise(error: OSError) -> None:
    if not isinstance(error, NotADirectoryError):  # a file has no folders
        raise error


def check_finished(path: Path) -> None:
    """Raises ValueError if the folder is a recording that was interrupted."""
    if (path / UNFINISHED).exists() and not (path / MANIFEST).exists():
        raise ValueError(f"{path} is an unfinished recording; run its command again to resume it")


def repeat_marks(names: Iterable[str]) -> dict[int, str]:
    """What makes ids unique: index of each name that came before -> " #2", " #3", ..."""
    seen: Counter[str] = Counter()
    marks = {}
    for index, name in enumerate(names):
        seen[name] += 1
        if seen[name] > 1:
            marks[index] = f" #{seen[name]}"
    return marks


def read_text(path: Path) -> str:
    """The stripped text of a UTF-8 file; ValueError if it cannot be read or decoded."""
    try:
        text = decode_text(path.read_bytes(), path).strip()
    except OSError as error:
        raise ValueError(f"{path}: the text cannot be read ({error.strerror})") from error
    if placeholder := reason(path, ""):  # its text would be taken for the file's
        raise ValueError(f"{path}: {placeholder}")
    return text


def decode_text(data: bytes, where: object) -> str:
    """Decodes UTF-8, with or without a byte-order mark.

    Args:
        data: the encoded text.
        where: the file, for messages.

    Raises:
        ValueError: if it has another encoding. No other is tried, because a wrong guess would go
            unnoticed into training.
    """
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}); convert "
            "it, for example with iconv -f latin1 -t utf-8"
        ) from None


def without_padding(embedding: np.ndarray) -> np.ndarray:
    """A text embedding [n, d] without the zero rows at its end."""
    filled = np.flatnonzero(embedding.any(axis=1))
    return embedding[: filled[-1] + 1 if len(filled) else 0]


# `Episode.unknown_rate` of a file or folder.
UNKNOWN_RATE = "{} does not say how many steps a second has; set dataset.options.fps"


def step_times(steps: int, rate: float) -> np.ndarray:
    """Timestamps of evenly spaced steps: int64 [steps], nanoseconds."""
    return np.round(np.arange(steps) / rate * NANOSECONDS).astype(np.int64)


def check_period(times: np.ndarray, where: object, unit: str) -> None:
    """Raises ValueError if frames at these times (nanoseconds) show that the file's unit differs.

    Args:
        times: of a camera.
        where: the file, for messages.
        unit: the unit that the file's times should have.
    """
    period = float(np.median(np.diff(times))) if len(times) > 1 else _SHORTEST
    if not _SHORTEST <= period <= _LONGEST:
        raise ValueError(
            f"{where}: the frames would be {period / NANOSECONDS:.3g} s apart; are the times in "
            f"another unit than {unit}? Convert them."
        )


def sections(
    times: np.ndarray, texts: Sequence[tuple[str, ...]]
) -> tuple[tuple[str, ...], tuple[Section, ...]]:
    """The instructions of an episode whose steps each have texts, and its sections.

    Args:
        times: of the steps, nanoseconds.
        texts: of each step, without empty ones: a text, paraphrases of it, or none.

    Returns:
        The distinct texts, and a section for each run of steps with the same ones; none if all
        steps that have a text have the same. In a section without a text it is "".
    """
    stated = dict.fromkeys(filter(None, texts))
    if len(stated) < 2:
        return next(iter(stated), ("",)), ()
    starts = [i for i, text in enumerate(texts) if i == 0 or text != texts[i - 1]]
    found = tuple(Section(int(times[i]), texts[i] or ("",)) for i in starts)
    return tuple(dict.fromkeys(text for part in found for text in part.instructions)), found
