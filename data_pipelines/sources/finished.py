"""Tell a recording that is still being made (`data_pipelines.record`) from a finished dataset."""

from pathlib import Path

MANIFEST = "recording.json"  # written last
UNFINISHED = "unfinished"  # holds the parts until then


def check_finished(path: Path) -> None:
    """Raise ValueError if the folder is a recording that was stopped before its end."""
    if (path / UNFINISHED).exists() and not (path / MANIFEST).exists():
        raise ValueError(
            f"{path} is a recording that is not finished; give the command that began it again "
            "(python -m data_pipelines.record --out ...) and it goes on where it stopped"
        )
