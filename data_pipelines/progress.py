"""Progress bars, which may be drawn into a log on a full disk or on a terminal that is gone."""

from contextlib import suppress
from typing import Any

from tqdm import tqdm


class Bar(tqdm):
    """tqdm's bar, but one that cannot be drawn stops nothing."""

    def __init__(self, *arguments: Any, **named: Any):
        """Takes what tqdm takes."""
        try:
            super().__init__(*arguments, **named)
        except OSError:
            super().__init__(*arguments, **named | {"disable": True})

    def display(self, *arguments: Any, **named: Any) -> None:
        """Draws the bar."""
        with suppress(OSError):
            super().display(*arguments, **named)

    def clear(self, *arguments: Any, **named: Any) -> None:
        """Removes it for a moment."""
        with suppress(OSError):
            super().clear(*arguments, **named)

    def close(self) -> None:
        """Draws it for the last time."""
        with suppress(OSError):
            super().close()

    @classmethod
    def write(cls, *arguments: Any, **named: Any) -> None:
        """Prints a line above it."""
        with suppress(OSError):
            super().write(*arguments, **named)
