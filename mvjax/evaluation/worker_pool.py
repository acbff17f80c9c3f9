"""Processes that record demonstrations: they exit with their parent, and are quiet at Ctrl-C.

This file also runs without jax in the Python of a simulator that needs its own.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from mvjax.evaluation.suites.mujoco_camera import draw_off_screen


@contextmanager
def worker_pool(workers: int) -> Iterator[Callable[..., set[Future]]]:
    """Yields `submit(function, items, *rest)` -> one future per item, in spawned processes.

    An error or Ctrl-C in the block ends the workers at once.
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
                "a recording process was killed (out of memory?): run the same command again to "
                "resume, with fewer workers if memory ran out"
            ) from error
        raise


@contextmanager
def _children_ignore_interrupts() -> Iterator[None]:
    # A terminal sends Ctrl-C to all processes, but only the parent should handle it. A process
    # inherits ignored signals, so this holds even while the child is still importing.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _prepare_worker() -> None:
    draw_off_screen()
    os.environ["LP_NUM_THREADS"] = "1"  # software OpenGL is fastest with a thread per process
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # returns when the parent has exited
    os._exit(1)
