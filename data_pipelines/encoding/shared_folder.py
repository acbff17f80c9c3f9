"""Processes that meet through the files of a folder they share, without a connection."""

import time
from collections.abc import Callable

_POLL_SECONDS = 0.2


def wait_until(condition: Callable[[], bool]) -> None:
    """Waits for what another process leaves in the folder; if that dies, its launcher ends us."""
    while not condition():
        time.sleep(_POLL_SECONDS)
