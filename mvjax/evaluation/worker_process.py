"""A simulator process as the evaluating process sees it."""

import os
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path

import numpy as np

from mvjax.evaluation.worker import Job, Order, Outcome, Query


class RolloutError(RuntimeError):
    """An episode could not be played; the results so far are on file."""


class WorkerProcess:
    """Starts a worker, talks to it, and keeps the account of the episode it plays.

    The process is a fresh interpreter that imports only the worker and the simulator (not the
    caller's main module, which may import jax). It is in a process group of its own, so that
    Ctrl-C reaches the evaluating process alone, and it ends by itself when that process is gone.

    Attributes:
        connection: this side's end of the pipe.
        order: the episode being played, or None.
        queries: how often it has asked.
        plan_seconds: its share of the planning time.
    """

    def __init__(self, job: Job, interpreter: Path | None = None) -> None:
        """Starts the process, with another Python than this one if so asked, and sends the job."""
        self.connection, child = Pipe()
        serve = f"from mvjax.evaluation.worker import serve; serve({child.fileno()})"
        self._process = subprocess.Popen(
            [str(interpreter or sys.executable), "-c", serve],
            pass_fds=[child.fileno()],
            env=_environment(same_python=interpreter in (None, Path(sys.executable))),
            process_group=0,
        )
        child.close()
        self.order: Order | None = None
        self.queries, self.plan_seconds = 0, 0.0
        self._send(job)

    def play(self, order: Order | None) -> None:
        """Starts the next episode; None leaves the worker idle."""
        self.order = order
        self.queries, self.plan_seconds = 0, 0.0
        if order is not None:
            self._send(order)

    def act(self, actions: np.ndarray, plan_seconds: float) -> None:
        """Answers a query with actions [execute, action_dim] that cost `plan_seconds`."""
        self.queries += 1
        self.plan_seconds += plan_seconds
        self._send(actions)

    def receive(self) -> Query | Outcome:
        """Waits for what the worker sends next.

        Raises:
            RolloutError: the simulator raised an exception, or the process died.
        """
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._died() from None
        if isinstance(message, Query | Outcome):
            return message
        raise RolloutError(f"{self._episode()} failed in its simulator:\n{message.text}")

    def stop(self, patience: float = 5.0) -> None:
        """Ends the process; kills it if it is not gone after `patience` seconds."""
        self.connection.close()
        if self.order is not None:  # in the middle of an episode: it would only notice at its end
            self._process.terminate()
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self, message: object) -> None:
        try:
            self.connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            raise self._died() from None

    def _died(self) -> RolloutError:
        code = self._process.wait()
        return RolloutError(
            f"{self._episode()}: its simulator process ended with exit code {code}. Finished "
            "episodes are on file; run the same command again to go on, with fewer workers if "
            "memory ran out."
        )

    def _episode(self) -> str:
        if self.order is None:
            return "Starting a simulator"
        return f"Task {self.order.task}, seed {self.order.seed}"


def _environment(same_python: bool) -> dict[str, str]:
    """Headless rendering with one thread per process, and an import path.

    The same Python imports what this one does. Another has packages of its own, and of this one's
    only the project.
    """
    environment = dict(os.environ)
    own = [path or os.getcwd() for path in sys.path]
    project = [str(Path(__file__).parents[2])]
    environment["PYTHONPATH"] = os.pathsep.join(own if same_python else project)
    environment["LP_NUM_THREADS"] = "1"
    environment.setdefault("OMP_NUM_THREADS", "1")
    if sys.platform == "linux":
        environment.setdefault("MUJOCO_GL", "egl")
    return environment
