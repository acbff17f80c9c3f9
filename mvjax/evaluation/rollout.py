"""Closed-loop rollouts: many simulator processes, one batched policy call per wave.

In a wave every live worker sends its observation, one call of the policy answers all, and the
workers execute the first `execute` actions of their chunks. An episode depends on its task, its
seed and the policy only: results do not depend on the number of workers or on timing, and an
evaluation that was killed resumes where it stopped.

This file holds the results on file, the loop over waves (`run_rollouts`), the worker processes as
the evaluating process sees them, and the schedule of episodes. What runs in a worker is in
`worker.py`.
"""

import json
import logging
import os
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.atomic import wait_until, write_json
from data_pipelines.progress import Bar
from mvjax.evaluation.suites.mujoco_camera import draw_off_screen
from mvjax.evaluation.suites.suite import Convert, MakeSimulator
from mvjax.evaluation.worker import Job, Order, Outcome, Query
from mvjax.policy.observation import Act, Observation, ObservationSpec

log = logging.getLogger(__name__)

# Results on file. A setting is one way of running the policy (or no policy). Its folder holds
#
# - `results.jsonl`: an `EpisodeResult` per line, in the order the episodes ended;
# - `setting.json`: a `Setting`;
# - `identity.json`: what the results are results of (`mvjax.identity`);
# - `videos/`: the recorded episodes.


@dataclass(frozen=True)
class EpisodeResult:
    """One episode.

    Attributes:
        suite, task, seed: the simulator, its task, and the seed of the reset.
        success: whether the simulator reported success before the step limit.
        steps: control steps taken.
        queries: calls of the policy.
        plan_seconds: inference time; a batched call is shared equally by its observations.
        mode: "policy", "oracle", "expert" or "none".
        config_hash: digest of the identity in the setting's `identity.json`.
        video: the recording, relative to the setting's folder, or None.
        jump: at the step where a chunk takes over from the one before, how far its action is from
            what the one before had planned for that step: the root mean square over the numbers of
            an action, in normalised units (of most modes, standard deviations), averaged over the
            takeovers; None without any, without a policy, or where the chunk before had ended.
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
    jump: float | None = None


@dataclass(frozen=True)
class Setting:
    """How a setting appears in the report.

    Attributes:
        label: its name for readers, such as "stop after 1 of 10".
        mode: "policy", "oracle", "expert" or "none".
        stop_step: K, the video denoising steps before the context is read (oracle: the step whose
            noise level the true future gets); None for expert and none.
        main: whether this is the result of the report's headline.
        variant: the difference from the run's own policy (another checkpoint, layer, share of the
            data); "" for none.
        delay: control steps from a query to its answer.
        chunking: how a chunk continues the one before (`sampler.chunking`).
    """

    label: str
    mode: str
    stop_step: int | None = None
    main: bool = False
    variant: str = ""
    delay: int = 0
    chunking: str = "none"


def write_setting(folder: Path, setting: Setting) -> None:
    """Writes `setting.json` into a setting's folder."""
    fields = asdict(setting)
    for name in ("delay", "chunking"):  # which earlier versions do not know
        if fields[name] == getattr(Setting, name):
            del fields[name]
    write_json(folder / "setting.json", fields)


def read_setting(folder: Path) -> Setting:
    """Reads a setting's `setting.json`."""
    return Setting(**json.loads((folder / "setting.json").read_text()))


def has_results(folder: Path) -> bool:
    """Whether a setting's folder holds the result of an episode."""
    return any(whole_lines(path) for path in folder.glob("results*.jsonl"))


def read_results(path: Path) -> list[EpisodeResult]:
    """Reads a `results.jsonl`, except for a last line torn by a killed evaluation.

    An episode counts once. Where two evaluations have written it at the same time (as earlier
    versions let them), its first result is taken and a warning says so.
    """
    results, repeated, other = {}, 0, 0
    for number, line in enumerate(whole_lines(path).splitlines(), start=1):
        try:
            result = EpisodeResult(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"Line {number} of {path} is not an episode result ({error}): delete that line."
            ) from error
        first = results.setdefault((result.suite, result.task, result.seed), result)
        repeated += first is not result
        other += first.success != result.success
    if repeated:
        _say_repeated(path, repeated, other)
    return list(results.values())


@cache  # files are read again and again while a job waits for its processes
def _say_repeated(path: Path, repeated: int, other: int) -> None:
    log.warning(
        "%s holds %d episodes twice (%d of them with different outcomes), as if two evaluations "
        "had written to it at the same time: the first result of each counts.",
        path,
        repeated,
        other,
    )


def append_result(path: Path, result: EpisodeResult) -> None:
    """Appends one line in one write, so that a kill can tear only the last line."""
    line = json.dumps(asdict(result)).encode() + b"\n"
    with path.open("ab", buffering=0) as file:
        while line:  # a disk that is all but full takes a part of it, and says so at the next write
            line = line[file.write(line) :]


def whole_lines(path: Path) -> bytes:
    """Returns the file up to its last newline; b"" if there is no such file."""
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def run_rollouts(
    *,
    suite: str,
    make_simulator: MakeSimulator,
    episodes: Sequence[tuple[str, int]],
    controller: Act | str,
    spec: ObservationSpec,
    cameras: Mapping[str, str],
    folder: Path,
    config_hash: str,
    convert: Convert = lambda chunk, proprio: chunk,
    units: np.ndarray | float = 1.0,
    oracle_frames: int = 0,
    predicted: Sequence[str] | None = None,
    max_steps: int | None = None,
    workers: int | None = None,
    videos_per_task: int = 0,
    interpreter: Path | None = None,
    process: int = 0,
    processes: int = 1,
) -> list[EpisodeResult]:
    """Plays every episode that has no result on file, and returns the results of all.

    Each of n processes of a job takes every n-th episode and writes a file of its own
    (`results_1.jsonl`, ...); process 0 merges them into `results.jsonl` at the end.

    Args:
        suite: the suite's name in the results.
        make_simulator: task -> simulator, importable by name (a class, a module's function, or a
            `functools.partial` of one), since workers are processes of their own.
        episodes: (task, seed) pairs.
        controller: a policy, "expert" (the simulator's scripted expert) or "none" (zero actions).
            Its queries say what is pending of the chunk before (`Observation.pending`).
        spec: how observations are made and how many actions are executed per query.
        cameras: the name of a camera in `Observation.frames` -> the simulator's camera. Recorded
            videos show all of them side by side.
        folder: receives `results.jsonl` and `videos`.
        config_hash: digest of the identity; results of another one are refused.
        convert: makes the policy's actions the simulator's.
        units: of the policy's actions, in which jumps are measured, [] or [horizon, action_dim].
        oracle_frames: true future frames per observation; 0 without the oracle.
        predicted: the names of the cameras of which the oracle gives the future; None: of all.
        max_steps: control steps after which an episode has failed; None: the simulator's limit.
        workers: simulator processes; None: one per core.
        videos_per_task: number of episodes of each task to record, from the first on.
        interpreter: the Python that has the simulator; None: this one.
        process: index of this process in the job.
        processes: number of processes that share the episodes and the folder.

    Returns:
        One result per episode, in the order of `episodes`.

    Raises:
        RolloutError: a simulator failed or its process died; names the task and the seed.
        ValueError: results of another configuration are on file, an episode is listed twice, or
            the policy's actions have a wrong shape or are not finite.
    """
    mode = controller
    if callable(controller):
        mode = "oracle" if oracle_frames else "policy"
    elif controller not in ("expert", "none"):
        raise ValueError(f'controller is a function, "expert" or "none", not {controller!r}.')
    ours = folder / (f"results_{process}.jsonl" if process else "results.jsonl")
    folder.mkdir(parents=True, exist_ok=True)
    if ours.exists():  # drop a last line torn by a kill: results are appended after it
        os.truncate(ours, len(whole_lines(ours)))
    orders = _orders(episodes, folder, videos_per_task)
    on_file = partial(_on_file, folder, orders, (suite, mode, config_hash))
    done = on_file()
    share = orders[process::processes]
    left = [order for order in share if (order.task, order.seed) not in done]
    simulators: list[WorkerProcess] = []
    counts = dict(total=len(share), initial=len(share) - len(left))
    with Bar(**counts, unit="episode", disable=process > 0) as bar:
        try:
            shown = tuple(cameras if predicted is None else predicted)
            job = Job(make_simulator, spec, mode, dict(cameras), shown, oracle_frames, max_steps)
            for _ in range(min(workers or os.cpu_count() or 1, len(left))):
                simulators.append(WorkerProcess(job, interpreter))
            play = _play(simulators, Schedule(left), controller, spec, convert, units)
            for played in play:
                result = EpisodeResult(suite=suite, mode=mode, config_hash=config_hash, **played)
                append_result(ours, result)
                done[result.task, result.seed] = result
                bar.set_postfix_str(f"{sum(r.success for r in done.values())} successes")
                bar.update()
        finally:  # also after an error or Ctrl-C
            for simulator in simulators:
                simulator.stop()
    if len(done) < len(orders):  # other processes of the job are still playing
        wait_until(lambda: len(on_file()) == len(orders))
        done = on_file()
    if process == 0:
        known = {(result.task, result.seed) for result in read_results(ours)}
        for key in done.keys() - known:
            append_result(ours, done[key])
        if others := known - done.keys():
            log.warning(
                "%s also holds %d episodes of tasks or seeds that are not part of this evaluation; "
                "the report counts them, too.",
                *(ours, len(others)),
            )
    return [done[order.task, order.seed] for order in orders]


def _play(
    simulators: list["WorkerProcess"],
    schedule: "Schedule",
    controller: Act | str,
    spec: ObservationSpec,
    convert: Convert,
    units: np.ndarray | float,
) -> Iterator[dict[str, Any]]:
    """Plays the whole schedule in waves; yields the fields of each episode's result as it ends."""
    for simulator in simulators:
        simulator.play(schedule.next(None))
    while busy := [simulator for simulator in simulators if simulator.order is not None]:
        # A wave is complete when every busy simulator has asked or has no episode left.
        queries: dict[WorkerProcess, Observation] = {}
        while owing := [s for s in busy if s.order is not None and s not in queries]:
            ready = wait([simulator.connection for simulator in owing])
            for simulator in [s for s in owing if s.connection in ready]:
                message, order = simulator.receive(), simulator.order
                if isinstance(message, Query):
                    queries[simulator] = simulator.continued(message.observation, spec)
                    continue
                yield {
                    "task": order.task,
                    "seed": order.seed,
                    "success": message.success,
                    "steps": message.steps,
                    "queries": simulator.queries,
                    "plan_seconds": round(simulator.plan_seconds, 6),
                    "video": order.video and f"videos/{Path(order.video).name}",
                    "jump": round(float(np.mean(jumps)), 6) if (jumps := simulator.jumps) else None,
                }
                simulator.play(schedule.next(order.task))
        if queries:
            # In the order of the simulators, so that batches do not depend on timing.
            asking = [simulator for simulator in simulators if simulator in queries]
            start = time.perf_counter()
            chunks = _checked_chunks(controller, [queries[s] for s in asking], spec)
            share = (time.perf_counter() - start) / len(asking)
            for simulator, chunk in zip(asking, chunks):
                simulator.note_jump(chunk, spec, units)
                actions = convert(chunk, queries[simulator].proprio[-1])
                simulator.act(chunk, actions[: spec.execute + spec.delay], share)


def _checked_chunks(act: Act, observations: list[Observation], spec: ObservationSpec) -> np.ndarray:
    """The policy's chunks [b, horizon, action_dim], which must last until the next is there."""
    chunks, least = np.asarray(act(observations), np.float32), spec.execute + spec.delay
    if chunks.ndim != 3 or len(chunks) != len(observations) or chunks.shape[1] < least:
        raise ValueError(
            f"The policy returned actions of shape {list(chunks.shape)} for {len(observations)} "
            f"observations, expected [{len(observations)}, at least {least}, action_dim]."
        )
    if not np.isfinite(chunks).all():
        raise ValueError("The policy returned actions that are not finite.")
    return chunks


def _orders(episodes: Sequence[tuple[str, int]], folder: Path, videos_per_task: int) -> list[Order]:
    """One order per episode; the first ones of each task name a video file."""
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
    folder: Path, orders: list[Order], expected: tuple[str, str, str]
) -> dict[tuple[str, int], EpisodeResult]:
    """The results of any process; `expected` is (suite, mode, config_hash)."""
    wanted = {(order.task, order.seed) for order in orders}
    played = {}
    for path in sorted(folder.glob("results*.jsonl")):
        for result in read_results(path):
            found = (result.suite, result.mode, result.config_hash)
            if found != expected:
                raise ValueError(
                    f"{path} holds results of (suite, mode, config) = {found}, but this evaluation "
                    f"is {expected}: choose another folder, or delete that file."
                )
            if (result.task, result.seed) in wanted:
                played[result.task, result.seed] = result
    return played


class Schedule:
    """The episodes to play; a worker stays on its task, since rebuilding takes a second."""

    def __init__(self, orders: Iterable[Order]) -> None:
        self._left: dict[str, deque[Order]] = {}
        for order in orders:
            self._left.setdefault(order.task, deque()).append(order)
        self._workers_on: Counter[str] = Counter()

    def next(self, task: str | None) -> Order | None:
        """Returns the next episode for a worker whose simulator is built for `task`, if any.

        It is of the same task while that lasts, then of the task with most episodes per worker;
        None at the end.
        """
        if task is not None:
            if self._left[task]:
                return self._left[task].popleft()
            self._workers_on[task] -= 1
        if not any(self._left.values()):
            return None
        busiest = max(self._left, key=lambda t: len(self._left[t]) / (1 + self._workers_on[t]))
        self._workers_on[busiest] += 1
        return self._left[busiest].popleft()


class RolloutError(RuntimeError):
    """An episode could not be played; the results so far are on file."""


class WorkerProcess:
    """A simulator process as the evaluating process sees it, with the episode it plays.

    It is a fresh interpreter that imports only the worker and the simulator (not the caller's main
    module, which may import jax), and it exits when the evaluating process is gone.

    Attributes:
        connection: this side's end of the pipe.
        order: the episode being played, or None.
        queries: queries in this episode.
        plan_seconds: their share of the inference time.
        chunk: the policy's last one in this episode, or None.
        jumps: from chunk to chunk, in this episode.
    """

    def __init__(self, job: Job, interpreter: Path | None = None) -> None:
        self.connection, child = Pipe()
        serve = f"from mvjax.evaluation.worker import serve; serve({child.fileno()})"
        self._process = subprocess.Popen(
            [str(interpreter or sys.executable), "-c", serve],
            pass_fds=[child.fileno()],
            env=_environment(same_python=interpreter in (None, Path(sys.executable))),
            process_group=0,  # Ctrl-C reaches the evaluating process alone
        )
        child.close()
        self.play(None)
        self._send(job)

    def play(self, order: Order | None) -> None:
        """Starts the next episode; None leaves the worker idle."""
        self.order = order
        self.queries, self.plan_seconds = 0, 0.0
        self.chunk: np.ndarray | None = None
        self.jumps: list[float] = []
        if order is not None:
            self._send(order)

    def continued(self, observation: Observation, spec: ObservationSpec) -> Observation:
        """A query with what is still to be executed of the last chunk."""
        if self.chunk is None:
            return observation
        return replace(observation, pending=self.chunk[spec.execute :], delay=spec.delay)

    def note_jump(
        self, chunk: np.ndarray, spec: ObservationSpec, units: np.ndarray | float
    ) -> None:
        """Notes how far a chunk is from the last one's plan where it takes over."""
        planned = spec.execute + spec.delay
        if self.chunk is not None and planned < len(self.chunk):
            difference = chunk[spec.delay] - self.chunk[planned]
            unit = np.broadcast_to(units, chunk.shape)[spec.delay]
            self.jumps.append(float(np.sqrt(np.mean((difference / unit) ** 2))))

    def act(self, chunk: np.ndarray, actions: np.ndarray, plan_seconds: float) -> None:
        """Answers a query with the actions of a chunk [execute + delay, any]."""
        self.chunk = chunk
        self.queries += 1
        self.plan_seconds += plan_seconds
        self._send(actions)

    def receive(self) -> Query | Outcome:
        """Waits for the worker's next message; RolloutError if the simulator failed."""
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._died() from None
        if isinstance(message, Query | Outcome):
            return message
        raise RolloutError(f"{self._episode()} failed in its simulator:\n{message.text}")

    def stop(self, patience: float = 5.0) -> None:
        """Ends the process, and kills it if it has not exited after `patience` seconds."""
        self.connection.close()
        if self.order is not None:  # it would notice the closed pipe at the end of its episode only
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
            f"{self._episode()}: the simulator process ended with exit code {code}. Run the same "
            "command again to resume, with fewer workers if memory ran out."
        )

    def _episode(self) -> str:
        if self.order is None:
            return "Starting a simulator"
        return f"Task {self.order.task}, seed {self.order.seed}"


def _environment(same_python: bool) -> dict[str, str]:
    """Off-screen rendering with one thread per process, and an import path."""
    # Another Python has packages of its own and gets only the project.
    path = [path or os.getcwd() for path in sys.path]
    project = [str(Path(__file__).parents[2])]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "LP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path if same_python else project)
    draw_off_screen(environment)
    return environment
