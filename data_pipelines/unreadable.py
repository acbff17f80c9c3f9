"""Why a file cannot be read, in one line that says it to a person."""

from pathlib import Path

_GIT_LFS = b"version https://git-lfs"  # how the file begins that stands for another one


def reason(path: Path, error: object) -> str:
    """What a library says of a file, or that the file was never downloaded.

    Args:
        path: the file.
        error: the library's exception, or a text.
    """
    if is_placeholder(path):
        return "it is a placeholder of Git LFS, git lfs pull fetches the file"
    return " ".join(str(getattr(error, "strerror", None) or error).split())


def is_placeholder(path: Path) -> bool:
    """Whether a dataset was cloned without its large files, and this is one of them."""
    try:
        with path.open("rb") as file:
            return file.read(len(_GIT_LFS)) == _GIT_LFS
    except OSError:
        return False
