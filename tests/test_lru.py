"""The bounded cache: what it keeps, what it closes, and how threads meet in it."""

import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from data_pipelines.lru import LRU


def test_the_entries_used_last_are_kept():
    made, closed = [], []
    pool = LRU(2, closed.append)

    def get(key):
        return pool.get(key, lambda: made.append(key) or key.upper())

    assert [get(key) for key in "abaca"] == list("ABACA")
    assert made == ["a", "b", "c"] and closed == ["B"]
    assert get("b") == "B" and made[-1] == "b" and closed == ["B", "C"]


def test_an_entry_that_is_false_is_an_entry():
    pool, made = LRU(2), []
    for _ in range(3):
        assert pool.get("a", lambda: made.append(1)) is None
    assert made == [1]


def test_what_cannot_be_made_is_no_entry():
    pool = LRU(1)
    with pytest.raises(ZeroDivisionError):
        pool.get("a", lambda: 1 / 0)
    assert pool.get("a", lambda: 2) == 2  # and the lock is free again


def test_entries_are_closed_outside_the_lock():
    """So that what closing waits for may use the cache."""
    seen = []
    pool = LRU(1, lambda old: seen.append((old, pool.get("c", lambda: "C"))))
    pool.get("a", lambda: "A")
    worker = threading.Thread(target=pool.get, args=("b", lambda: "B"), daemon=True)
    worker.start()
    worker.join(10)
    assert not worker.is_alive() and ("A", "C") in seen


def test_threads_share_one_entry_each():
    made, closed = [], []
    pool = LRU(3, closed.append)

    def make(key):
        time.sleep(0.0005)
        made.append(key)
        return key

    def use(number):
        key = number % 5
        return pool.get(key, lambda: make(key)) == key

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(use, range(400)))
    # Nothing is lost, and nothing is closed twice.
    assert len(made) == len(closed) + 3
    assert all(made.count(key) - closed.count(key) in (0, 1) for key in range(5))


def test_one_key_is_made_once_however_many_ask():
    pool, made, together = LRU(1), [], threading.Barrier(8)

    def ask(_):
        together.wait()
        return pool.get("a", lambda: made.append(time.sleep(0.05)) or object())

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(ask, range(8)))) == 1
    assert len(made) == 1


def test_an_entry_made_slowly_by_itself_blocks_no_other():
    """What a slow `make` becomes: a quick entry with a lock of its own (as a video's index)."""

    class Once:
        def __init__(self):
            self.lock, self.value = threading.Lock(), None

        def get(self, slow):
            with self.lock:
                self.value = self.value or slow()
                return self.value

    pool, entered, free = LRU(2), threading.Event(), threading.Event()

    def slow():
        entered.set()
        assert free.wait(10)
        return "slow"

    with ThreadPoolExecutor(2) as threads:
        waiting = threads.submit(lambda: pool.get("a", Once).get(slow))
        assert entered.wait(10)
        assert pool.get("b", Once).get(lambda: "quick") == "quick"
        free.set()
        assert waiting.result() == "slow"


def test_pickling_keeps_the_limit_and_drops_the_entries():
    pool = LRU(2, str.upper)
    pool.get("a", threading.Lock)  # which cannot be pickled
    copy = pickle.loads(pickle.dumps(pool))
    made = []
    for key in "aba":
        copy.get(key, lambda: made.append(1))
    assert len(made) == 2
