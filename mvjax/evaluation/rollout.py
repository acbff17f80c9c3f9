"""Closed-loop rollouts: many simulator processes, one batched policy call per wave.

In a wave every live worker hands in its observation, one call of `plan` answers them all, and the
workers execute the first `execute` actions of their chunks. An episode is a function of its task
and seed (and of `plan`), so results do not depend on the number of workers or on timing, and an
evaluation that was killed goes on where it stopped.
"""

import json
import os
import subprocess
import sys
import time
from collections import ChainMap, Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mvjax.encode import wait_until
from mvjax.evaluation.worker import Job, MakeSimulator, Order, Outcome, Query
from mvjax.policy.observation import Observation, ObservationSpec

# Closed-loop results on file: one JSON line per episode, and what a setting was.
#
# A setting is one way of running the policy (or no policy). Its folder holds
#
# - `results.jsonl`: an `EpisodeResult` per line, in the order the episodes ended;
# - `setting.json`: a `Setting`;
# - `videos/`: the recorded episodes.


@dataclass(frozen=True)
class EpisodeResult:
    """One episode.

    Attributes:
        suite: simulator suite.
        task: task within the suite.
        seed: the reset's seed.
        success: whether the simulator reported success before its step limit.
        steps: control steps taken.
        queries: how often the policy was asked.
        plan_seconds: seconds of planning; a batched call is shared equally by its observations.
        mode: "policy", "oracle", "expert" or "none".
        config_hash: what the caller says identifies policy and protocol.
        video: recorded video, relative to the setting's folder, or None.
    """

    suite: str
    task: str
    seed: int
    success: bool
    steps: int
    queries: int
    plan_seconds: float
    mode: str
    config_hash: str
    video: str | None


@dataclass(frozen=True)
class Setting:
    """How a setting appears in the report.

    Attributes:
        label: its name for readers, such as "1 of 10 video steps".
        mode: "policy", "oracle", "expert" or "none".
        stop_step: K, the video denoising steps before the context is read; with the oracle, whose
            noise level the true future gets; None for expert and none.
        main: whether this is the result of the report's headline.
        variant: what is different from the run's own policy (another checkpoint, layer, share of
            the data); "" for nothing.
    """

    label: str
    mode: str
    stop_step: int | None = None
    main: bool = False
    variant: str = ""


def write_setting(folder: Path, setting: Setting) -> None:
    """Writes `setting.json` into a setting's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "setting.json").write_text(json.dumps(asdict(setting), indent=1) + "\n")


def read_setting(folder: Path) -> Setting:
    """Reads a setting's `setting.json`."""
    return Setting(**json.loads((folder / "setting.json").read_text()))


def read_results(path: Path) -> list[EpisodeResult]:
    """Reads a `results.jsonl`; a last line torn by a killed evaluation is left out.

    Raises:
        ValueError: another line is not a result.
    """
    whole, _ = _whole_lines(path)
    results = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            results.append(EpisodeResult(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"Line {number} of {path} is not an episode result ({error}): delete that line to "
                "have the episode evaluated again."
            ) from error
    return results


def drop_torn_line(path: Path) -> None:
    """Cuts off a last line that a killed evaluation left unfinished."""
    whole, size = _whole_lines(path)
    if len(whole) < size:
        os.truncate(path, len(whole))


def append_result(path: Path, result: EpisodeResult) -> None:
    """Appends one line in one write, so that a kill can tear only the last line."""
    line = json.dumps(asdict(result)) + "\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def _whole_lines(path: Path) -> tuple[bytes, int]:
    """The bytes up to the last newline, and the file's size."""
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1], len(content)


# Which worker plays which episode: workers stay on a task, since changing it costs a second.


class Schedule:
    """The episodes that are left, given out task by task."""

    def __init__(self, orders: Iterable[Order]) -> None:
        """Queues `orders`; within a task they are given out in order."""
        self._left: dict[str, deque[Order]] = {}
        for order in orders:
            self._left.setdefault(order.task, deque()).append(order)
        self._workers_on: Counter[str] = Counter()

    def __len__(self) -> int:
        """Episodes not given out yet."""
        return sum(len(orders) for orders in self._left.values())

    def next(self, task: str | None) -> Order | None:
        """The next episode for a worker whose simulator is built for `task` (None: not built).

        The same task while it lasts, then the one with most episodes per worker; None at the end.
        """
        if task is not None and self._left[task]:
            return self._left[task].popleft()
        if task is not None:
            self._workers_on[task] -= 1
        if not len(self):
            return None
        busiest = max(self._left, key=lambda t: len(self._left[t]) / (1 + self._workers_on[t]))
        self._workers_on[busiest] += 1
        return self._left[busiest].popleft()


# A simulator process as the evaluating process sees it.


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


Plan = Callable[[Sequence[Observation]], np.ndarray]
"""1 to `workers` observations -> float32 [b, action_horizon, action_dim], environment units."""


def run_rollouts(
    *,
    suite: str,
    make_simulator: MakeSimulator,
    episodes: Sequence[tuple[str, int]],
    controller: Plan | str,
    spec: ObservationSpec,
    folder: Path,
    config_hash: str,
    oracle_frames: int = 0,
    max_steps: int | None = None,
    workers: int | None = None,
    videos_per_task: int = 0,
    interpreter: Path | None = None,
    process: int = 0,
    processes: int = 1,
) -> list[EpisodeResult]:
    """Plays every episode that is not on file yet, and returns the results of all.

    Several processes of one job take every n-th episode each, and write files of their own
    (`results_1.jsonl`, ...); process 0 puts them together in `results.jsonl` when all are played.

    Args:
        suite: the suite's name in the results.
        make_simulator: task -> simulator, importable by name (a class, a module's function, or a
            `functools.partial` of one), since workers are processes of their own.
        episodes: (task, seed) pairs.
        controller: a `plan`, or "expert" (the simulator's scripted expert), or "none" (zero
            actions).
        spec: how observations are made and how many actions are executed per query.
        folder: results go to `folder/results.jsonl`, recordings to `folder/videos`.
        config_hash: identifies policy and protocol; results of another hash are not mixed in.
        oracle_frames: if positive, observations carry this many true future frames.
        max_steps: control steps after which an episode has failed; the simulator's own limit
            unless given.
        workers: simulator processes; one per core unless given.
        videos_per_task: record the first so many episodes of each task.
        interpreter: the Python that has the simulator, if it is not this one.
        process: which of the job's processes this is.
        processes: how many share the episodes and the folder.

    Returns:
        One result per episode, in the order of `episodes`.

    Raises:
        RolloutError: a simulator failed or its process died; names the task and the seed.
        ValueError: results of another configuration are on file, an episode is listed twice, or
            `plan` returned nonsense.
    """
    mode = _mode(controller, oracle_frames)
    ours = folder / (f"results_{process}.jsonl" if process else "results.jsonl")
    folder.mkdir(parents=True, exist_ok=True)
    drop_torn_line(ours)
    orders = _orders(episodes, folder, videos_per_task)

    def on_file() -> dict[tuple[str, int], EpisodeResult]:
        files = sorted(folder.glob("results*.jsonl"))
        return dict(ChainMap(*(_on_file(f, orders, suite, mode, config_hash) for f in files)))

    done = on_file()
    share = orders[process::processes]
    left = [order for order in share if (order.task, order.seed) not in done]
    simulators: list[WorkerProcess] = []
    with tqdm(
        total=len(share), initial=len(share) - len(left), unit="episode", disable=process > 0
    ) as bar:
        try:
            job = Job(make_simulator, spec, mode, oracle_frames, max_steps)
            for _ in range(min(workers or os.cpu_count() or 1, len(left))):
                simulators.append(WorkerProcess(job, interpreter))
            for played in _play(simulators, Schedule(left), controller, spec.execute):
                result = EpisodeResult(suite=suite, mode=mode, config_hash=config_hash, **played)
                append_result(ours, result)
                done[result.task, result.seed] = result
                bar.set_postfix_str(f"{sum(r.success for r in done.values())} successes")
                bar.update()
        finally:  # also after an error or Ctrl-C
            for simulator in simulators:
                simulator.stop()
    if len(done) < len(orders):
        wait_until(lambda: len(on_file()) == len(orders))
        done = on_file()
    if process == 0:
        known = {(result.task, result.seed) for result in read_results(ours)}
        for key in done.keys() - known:
            append_result(ours, done[key])
    return [done[order.task, order.seed] for order in orders]


def _play(
    processes: list[WorkerProcess], schedule: Schedule, controller: Plan | str, execute: int
) -> Iterator[dict[str, Any]]:
    """Plays the whole schedule in waves; yields each episode's fields as it ends."""
    for process in processes:
        process.play(schedule.next(None))
    while busy := [process for process in processes if process.order is not None]:
        queries: dict[WorkerProcess, Observation] = {}
        while owing := [p for p in busy if p.order is not None and p not in queries]:
            ready = wait([process.connection for process in owing])
            for process in [p for p in owing if p.connection in ready]:
                message = process.receive()
                if isinstance(message, Query):
                    queries[process] = message.observation
                else:
                    yield _fields(process, message)
                    process.play(schedule.next(process.order.task))
        if queries:
            asking = [process for process in processes if process in queries]
            start = time.perf_counter()
            actions = _planned(controller, [queries[process] for process in asking], execute)
            share = (time.perf_counter() - start) / len(asking)
            for process, chunk in zip(asking, actions):
                process.act(chunk, share)


def _planned(plan: Plan, observations: list[Observation], execute: int) -> np.ndarray:
    """The actions to execute, [b, execute, action_dim], checked."""
    actions = np.asarray(plan(observations), np.float32)
    if actions.ndim != 3 or len(actions) != len(observations) or actions.shape[1] < execute:
        raise ValueError(
            f"The policy returned actions of shape {list(actions.shape)} for {len(observations)} "
            f"observations; [{len(observations)}, at least {execute} (execute), action_dim] is "
            "needed."
        )
    if not np.isfinite(actions).all():
        raise ValueError("The policy returned actions that are not finite (NaN or infinity).")
    return actions[:, :execute]


def _fields(process: WorkerProcess, outcome: Outcome) -> dict[str, Any]:
    order = process.order
    return {
        "task": order.task,
        "seed": order.seed,
        "success": outcome.success,
        "steps": outcome.steps,
        "queries": process.queries,
        "plan_seconds": round(process.plan_seconds, 6),
        "video": None if order.video is None else f"videos/{Path(order.video).name}",
    }


def _mode(controller: Plan | str, oracle_frames: int) -> str:
    if callable(controller):
        return "oracle" if oracle_frames else "policy"
    if controller not in ("expert", "none"):
        raise ValueError(f'controller is a plan function, "expert" or "none", not {controller!r}.')
    return controller


def _orders(episodes: Sequence[tuple[str, int]], folder: Path, videos_per_task: int) -> list[Order]:
    """One order per episode, the first of each task with a video file."""
    if len(set(episodes)) < len(episodes):
        repeated = Counter(episodes).most_common(1)[0][0]
        raise ValueError(f"Episode {repeated} is listed twice: give every (task, seed) pair once.")
    seen: Counter[str] = Counter()
    orders = []
    for task, seed in episodes:
        seen[task] += 1
        recorded = seen[task] <= videos_per_task
        video = str(folder / "videos" / f"{task}_{seed}.mp4") if recorded else None
        orders.append(Order(task, seed, video))
    return orders


def _on_file(
    path: Path, orders: list[Order], suite: str, mode: str, config_hash: str
) -> dict[tuple[str, int], EpisodeResult]:
    """The wanted episodes that are already played."""
    wanted = {(order.task, order.seed) for order in orders}
    expected = (suite, mode, config_hash)
    results = read_results(path)
    for result in results:
        found = (result.suite, result.mode, result.config_hash)
        if found != expected:
            raise ValueError(
                f"{path} holds results of (suite, mode, config) = {found}, this evaluation is "
                f"{expected}: choose another folder, or delete that file."
            )
    return {(r.task, r.seed): r for r in results if (r.task, r.seed) in wanted}
