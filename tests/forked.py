"""Programs in processes of their own, forked from one that has imported jax and the rest already.

A start takes 0.1 s; a new interpreter needs seconds to import the same.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
from jax._src.api import clean_up
from jax._src.dispatch import wait_for_tokens
from jax._src.lru_cache import LRUCache

ROOT = Path(__file__).parents[1]
PRELOADED = [
    "mvjax.encode",
    "launch.entry",
    "mvjax.weights.convert",
    "mvjax.evaluation.closed_loop",
    "mvjax.evaluation.offline",
    "mvjax.policy.generate",
    "mvjax.training.run",
]
_CONTEXT = multiprocessing.get_context("forkserver")


def _put_whole(cache: LRUCache, key: str, value: bytes) -> None:
    # jax writes into the entry itself: a process that meets half of it complains on stderr.
    part = cache.path / f"{key}.{os.getpid()}.{threading.get_ident()}"
    part.write_bytes(value)
    part.replace(cache.path / f"{key}-cache")


LRUCache.put = _put_whole  # of what this process compiles, and those that are forked


class Said(NamedTuple):
    """How a program ended, and what it wrote."""

    code: int
    out: str
    err: str


class Program:
    """A module that runs as `__main__`, as by `python -m`; killed at the end of a `with` block."""

    def __init__(
        self,
        module: str,
        *arguments: object,
        devices: int = 1,
        environment: Mapping[str, str] | None = None,
        prepare: Callable[[], None] | None = None,
    ):
        """Starts it.

        Args:
            module: of the project, or of this folder.
            arguments: of its command line.
            devices: how many it finds, where it runs on the CPU.
            environment: more variables.
            prepare: called before the module runs.
        """
        self._files = [tempfile.NamedTemporaryFile("r", errors="replace") for _ in range(2)]
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        _CONTEXT.set_forkserver_preload(PRELOADED)
        self._process = _CONTEXT.Process(
            target=_run,
            args=(
                [module, *map(str, arguments)],
                [file.name for file in self._files],
                flags | dict(environment or {}),
                prepare,
            ),
        )
        self._process.start()

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        self.wait()

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    @property
    def pid(self) -> int:
        """The number of its process."""
        return self._process.pid

    def wait(self, seconds: float | None = None) -> int | None:
        """`poll` when it has ended, or after so many seconds."""
        self._process.join(seconds)
        return self.poll()

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self._process.terminate()

    def kill(self) -> None:
        """Sends SIGKILL."""
        self._process.kill()

    @property
    def out(self) -> str:
        """What it has written to the standard output so far."""
        return Path(self._files[0].name).read_text(errors="replace")

    @property
    def err(self) -> str:
        """What it has written to the standard error so far."""
        return Path(self._files[1].name).read_text(errors="replace")

    def finish(self) -> Said:
        """Waits for the end."""
        return Said(self.wait(), self.out, self.err)


def run(module: str, *arguments: object, **settings: object) -> Said:
    """A program from its start to its end."""
    return Program(module, *arguments, **settings).finish()


def _run(
    words: list[str],
    outputs: list[str],
    environment: Mapping[str, str],
    prepare: Callable[[], None] | None,
) -> None:
    os.environ.update(environment)
    # In this process jax is imported, and reads no variables any more; those that it starts do.
    jax.config.update("jax_disable_most_optimizations", True)  # compiles four times faster
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    if prepare:
        prepare()
    os.chdir(ROOT)
    for number, name in enumerate(outputs, start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_TRUNC), number)
    sys.argv = words
    for leave in (clean_up, wait_for_tokens):  # a forked process forgets what jax does at the end:
        atexit.register(leave)  # wait for the others of its job, before their coordinator is gone
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        atexit._run_exitfuncs()  # a forked process leaves without them
