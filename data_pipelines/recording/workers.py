"""Worker processes for recording: they end with their parent, and at Ctrl-C without a sound."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager


@contextmanager
def worker_pool(workers: int) -> Iterator[Callable[..., set[Future]]]:
    """Yield `submit(function, items, *rest)` -> one future per item, run by spawned processes.

    Leaving the block early, by any error or Ctrl-C, ends the workers at once.
    """
    executor = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare_worker
    )

    def submit(function: Callable, items: list, *rest: object) -> set[Future]:
        with _children_ignore_interrupts():
            return {executor.submit(function, item, *rest) for item in items}

    try:
        yield submit
        executor.shutdown()
    except BaseException as error:
        for process in multiprocessing.active_children():
            process.terminate()
        executor.shutdown(wait=False, cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise RuntimeError(
                "a recording process was killed from outside (out of memory?); give the same "
                "command again to go on, with fewer workers if memory is short"
            ) from error
        raise


@contextmanager
def _children_ignore_interrupts() -> Iterator[None]:
    # A terminal sends Ctrl-C to all processes; the parent alone should answer. What is ignored when
    # a process starts stays ignored in it, so this holds even while the child is still importing.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _prepare_worker() -> None:
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ["LP_NUM_THREADS"] = "1"  # software OpenGL: one thread per process is fastest
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # returns when the parent is gone, however it ended
    os._exit(1)
