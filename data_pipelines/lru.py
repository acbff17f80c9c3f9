"""A bounded, thread-safe cache of open files, decoders, indices, rows and embedded texts."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class LRU(Generic[Key, Value]):
    """Keeps the `limit` most recently used entries; safe to use from several threads.

    `close` is called with each evicted entry, outside the lock. Pickling drops the entries, so that
    every process of a data loader opens its own files.
    """

    def __init__(self, limit: int, close: Callable[[Value], None] | None = None):
        self._limit, self._close = limit, close
        self._lock = threading.Lock()
        self._entries: OrderedDict[Key, Value] = OrderedDict()

    def __reduce__(self):
        return LRU, (self._limit, self._close)

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The entry of `key`. A missing one is made under the lock, so `make` should be quick."""
        evicted = []
        with self._lock:
            value = self._entries.pop(key) if key in self._entries else make()
            self._entries[key] = value  # the most recent one is last
            while len(self._entries) > self._limit:
                evicted.append(self._entries.popitem(last=False)[1])
        if self._close is not None:
            for old in evicted:
                self._close(old)
        return value
