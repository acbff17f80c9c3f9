"""A bounded cache for several threads: of open files, decoders, indices, rows, embedded texts."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class LRU(Generic[Key, Value]):
    """Keeps the `limit` entries that were used last; safe to use from several threads.

    Pickling keeps the limit and what closes an entry, and drops the entries: processes of a data
    loader open their own files.
    """

    def __init__(self, limit: int, close: Callable[[Value], None] | None = None):
        """`close`, if given, is called with each entry that is dropped (outside the lock)."""
        self._limit, self._close = limit, close
        self._lock = threading.Lock()
        self._entries: OrderedDict[Key, Value] = OrderedDict()

    def __reduce__(self):
        return LRU, (self._limit, self._close)

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The entry of `key`, made under the lock where there is none: `make` should be quick."""
        surplus = []
        with self._lock:
            value = self._entries.pop(key) if key in self._entries else make()
            self._entries[key] = value  # the most recent one is last
            while len(self._entries) > self._limit:
                surplus.append(self._entries.popitem(last=False)[1])
        if self._close is not None:
            for old in surplus:
                self._close(old)
        return value
