"""How much of a dataset may be unreadable before the work on it stops.

Out of thousands of files some are always broken. Each is left out, counted and named; too many of
them mean that something else is wrong, and a person should know before hours are spent.
"""

import threading

_NAMED = 3


class TooManyBad(ValueError):
    """More was unreadable than `max_bad_share` allows."""


class BadShare:
    """Counts what was read and what could not be; for several threads."""

    def __init__(self, allowed: float, what: str, least: int, remedy: str):
        """Starts at zero.

        Args:
            allowed: share that may be bad, 0 to 1.
            what: what is counted, for the sentence: "episodes of 'robot'".
            least: nothing is said before so many were seen: one of the first three may be bad.
            remedy: what a person can do, for the sentence: "Repair them".
        """
        self._allowed, self._what, self._least, self._remedy = allowed, what, least, remedy
        self._lock = threading.Lock()
        self._bad: list[str] = []
        self.seen = self.bad = 0

    def good(self, count: int = 1) -> None:
        """So many were read."""
        with self._lock:
            self.seen += count

    def is_bad(self, name: str, reason: str) -> None:
        """One could not be read.

        Raises:
            TooManyBad: if that is one too many.
        """
        with self._lock:
            self.seen += 1
            self.bad += 1
            if len(self._bad) < _NAMED:
                self._bad.append(f"{name} ({reason})")
        if self.seen >= self._least:
            self.check()

    def check(self) -> None:
        """Raises TooManyBad if the share is too large, whatever was seen so far."""
        if self.bad > self._allowed * self.seen:
            unnamed = self.bad - len(self._bad)
            more = f" and {unnamed} more" if unnamed else ""
            raise TooManyBad(
                f"{self.bad} of {self.seen} {self._what} could not be read, more than "
                f"config.max_bad_share = {self._allowed:g} allows: {', '.join(self._bad)}{more}. "
                f"{self._remedy}, or allow more with --config.max_bad_share."
            )
