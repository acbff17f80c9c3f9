"""Closed-loop rollouts: many simulator processes, one batched policy call per wave.

In a wave every live worker hands in its observation, one call of `plan` answers them all, and the
workers execute the first `execute` actions of their chunks. An episode is a function of its task
and seed (and of `plan`), so results do not depend on the number of workers or on timing, and an
evaluation that was killed goes on where it stopped.
"""

import os
import time
from collections import ChainMap, Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipelines.encoding.shared_folder import wait_until
from mvjax.evaluation.results import EpisodeResult, append_result, drop_torn_line, read_results
from mvjax.evaluation.schedule import Schedule
from mvjax.evaluation.worker import Job, MakeSimulator, Order, Outcome, Query
from mvjax.evaluation.worker_process import WorkerProcess
from mvjax.policy.observation import Observation, ObservationSpec

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
