"""Success rates of a trained policy in a simulator, for each setting: a mode and a stop step."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import jax
import numpy as np

from data_pipelines.cameras import VIDEO
from data_pipelines.lock import run_lock
from data_pipelines.settings import plain
from data_pipelines.vectors import bases
from mvjax.evaluation.rollout import (
    EpisodeResult,
    Setting,
    has_results,
    run_rollouts,
    write_setting,
)
from mvjax.evaluation.suites.suite import SUITES, Suite, worker_versions
from mvjax.experiment import Experiment
from mvjax.identity import claim, digest_of, here
from mvjax.policy.load import load_policy
from mvjax.policy.observation import ObservationSpec
from mvjax.policy.policy import Policy
from mvjax.policy.robot import Robot, check_gripper, check_suite, trained_robot
from mvjax.training.directory import find_checkpoint

log = logging.getLogger(__name__)


def settings_for(
    mode: str,
    stop_steps: Sequence[int],
    video_steps: int,
    variant: str = "",
    delays: Sequence[int] = (0,),
    chunking: str = "none",
) -> dict[str, Setting]:
    """Returns the settings of one mode by folder name, or one without a policy.

    There is one for each stop step and delay. The policy at stop step 0 without a delay is the
    report's headline.
    """
    if mode == "expert":
        return {"expert": Setting("scripted expert", mode)}
    if mode == "none":
        return {"none": Setting("do nothing", mode)}
    if mode not in ("policy", "oracle"):
        raise ValueError(f"mode must be policy, oracle, expert or none, got {mode!r}.")
    reads = {"policy": "stop after", "oracle": "true future, noise of step"}[mode]
    name, label = (f"{variant}_", f"{variant}: ") if variant else ("", "")
    how, said = ("", "") if chunking == "none" else (f"_{chunking}", f", {chunking} chunks")
    return {
        f"{name}{mode}_k{k}{how}{f'_delay{delay}' if delay else ''}": Setting(
            f"{label}{reads} {k} of {video_steps}{said}{f', delay {delay}' if delay else ''}",
            mode,
            k,
            main=mode == "policy" and k == 0 and not delay and not variant,
            variant=variant,
            delay=delay,
            chunking=chunking,
        )
        for k in stop_steps
        for delay in delays
    }


def evaluate(
    experiment: Experiment, checkpoint: Path, folder: Path, settings: Mapping[str, Setting]
) -> Iterator[tuple[Setting, list[EpisodeResult]]]:
    """Plays every episode of `config.evaluation` under each setting, unless its result is on file.

    The processes of a job share the episodes; each holds the whole policy on its own devices. The
    policy is loaded once for all settings. The folder of a setting holds the results of one
    identity (`mvjax.identity`: weights, settings, simulator), and one job writes there at a time.

    Args:
        experiment, checkpoint: a stage-2 run and its training directory, which "expert" and "none"
            do not read.
        folder: receives a folder per setting, with its description, identity, results and
            recordings.
        settings: by the names of their folders.

    Yields:
        Each setting with its results as soon as they are complete.

    Raises:
        ValueError: the folder of a setting holds the results of another identity.
        OSError: another process evaluates into one of the folders.
    """
    config, protocol = experiment.config, experiment.config.evaluation
    if protocol.suite not in SUITES:
        raise ValueError(f"Unknown suite {protocol.suite!r}; known: {', '.join(SUITES)}.")
    suite, fps = SUITES[protocol.suite], config.policy_io.action.fps
    if fps != suite.control_hz:
        raise ValueError(
            f"The policy's actions are {fps:g} per second, but {protocol.suite} takes "
            f"{suite.control_hz}: set policy_io.action.fps to that and train again."
        )
    # --config.evaluation.tasks=a,b puts one string into the tuple.
    given = [protocol.tasks] if isinstance(protocol.tasks, str) else protocol.tasks
    tasks = [task.strip() for task in ",".join(given).split(",") if task.strip()]
    if not tasks or len(set(tasks)) < len(tasks):  # an episode counts once
        raise ValueError(
            f"evaluation.tasks must be one or more, each named once; got {protocol.tasks!r}."
        )
    for task in tasks:  # before the policy is loaded and compiled, which takes minutes
        suite.check_task(task)
    main, sees, predicted = suite.cameras[0], {}, None
    if {"policy", "oracle"} & {setting.mode for setting in settings.values()}:
        robot = trained_robot(config)
        sees = check_suite(robot, protocol.suite, suite.embodiment, suite.size)
        predicted = [c for view in robot.views if view.name == VIDEO for c in view.cameras] or None
        for setting in settings.values():  # which raises where a setting would change nothing
            experiment.sampling(stop_step=setting.stop_step or 0, oracle=setting.mode == "oracle")
        find_checkpoint(checkpoint)  # before `folder` is made
        _check_chunks(experiment, robot, settings.values())
    seeds = [protocol.first_seed + i for i in range(protocol.episodes_per_task)]
    process = jax.process_index()
    beyond = sum(seed >= suite.states for seed in seeds) if suite.states else 0
    if beyond and process == 0:
        log.warning(
            "the suite %r has %d initial states per task; %d of the %d seeds draw new ones, which "
            "published results do not include.",
            *(protocol.suite, suite.states, beyond, len(seeds)),
        )
    proprio = config.policy_io.proprio
    # What draws is recorded only: many pictures differ by roundings, from one machine to the next.
    simulator, drawn = {}, {}
    for name, version in worker_versions(protocol.suite).items():
        (drawn if name == "python" or name.startswith("gl_") else simulator)[name] = version
    policy = None
    with ExitStack() as locks:
        if process == 0:  # for all settings, before the policy is loaded
            for name in settings:
                locks.enter_context(run_lock(folder / name))
        for name, setting in settings.items():
            what = {
                "mode": setting.mode,
                "suite": protocol.suite,
                "simulator": simulator,
                "protocol": {k: protocol[k] for k in ("execute", "max_steps", "first_seed")},
            }
            if setting.delay:  # earlier versions had none
                what["protocol"]["delay"] = setting.delay
            spec = ObservationSpec(
                observed_frames=experiment.clip.observed_frames,
                fps=experiment.clip.fps,
                proprio_horizon=proprio.horizon,
                proprio_fps=proprio.fps,
                execute=protocol.execute,
                delay=setting.delay,
            )
            where = here() | {"simulator": drawn}
            controller, oracle = setting.mode, setting.mode == "oracle"
            cameras, units = {"": main}, 1.0  # for the videos alone
            if setting.mode in ("policy", "oracle"):
                cameras = sees
                sampling = experiment.sampling(
                    stop_step=setting.stop_step, oracle=oracle, chunking=setting.chunking
                )
                if policy is None:
                    policy = load_policy(experiment, checkpoint, sampling, protocol.workers)
                    _check_gripper(policy, suite, protocol.suite)
                policy = policy.sampled(sampling)
                if setting.chunking == "prefix" and setting.delay > policy.model.prefix:
                    raise ValueError(
                        f"--delay={setting.delay} is more than the {policy.model.prefix} actions "
                        "that this decoder was given in training (flow.prefix): evaluate a "
                        "shorter delay, or --config.sampler.chunking=guided."
                    )
                what["policy"] = {**policy.identity["what"], "sampling": sampling.identity}
                if [*sees.values()] != [main]:  # results of earlier versions are of the main one
                    tiled = {view.name: view.rows for view in robot.views}
                    what["cameras"] = plain({"shown": sees, "tiled": tiled})
                where |= policy.identity["where"]
                controller, units = policy.act, _units(policy)
            begun = has_results(folder / name)
            apart = "--out or --variant" if callable(controller) else "--out"  # no variants of it
            claim(folder / name, what, where, begun=begun, process=process, apart=apart)
            if callable(controller):
                policy.warm_up()
            if process == 0:
                write_setting(folder / name, setting)
            results = run_rollouts(
                suite=protocol.suite,
                make_simulator=suite.make_simulator,
                episodes=[(task, seed) for task in tasks for seed in seeds],
                controller=controller,
                spec=spec,
                cameras=cameras,
                predicted=predicted,
                folder=folder / name,
                config_hash=digest_of(what),
                convert=suite.convert,
                units=units,
                oracle_frames=experiment.clip.future_frames if oracle else 0,
                max_steps=protocol.max_steps,
                workers=protocol.workers,
                videos_per_task=protocol.videos_per_task,
                interpreter=suite.interpreter(),
                process=process,
                processes=jax.process_count(),
            )
            yield setting, results


def _check_gripper(policy: Policy, suite: Suite, name: str) -> None:
    """Raises ValueError for a policy whose gripper would always be closed in a suite."""
    statistics, number = policy.normalizer.statistics.get("actions"), suite.signed_gripper
    if statistics is not None and number is not None:
        least = np.min(np.asarray(statistics["min"])[..., number])
        check_gripper(least, f"number {number} of its actions", f"the suite {name!r}")


def _units(policy: Policy) -> np.ndarray | float:
    """What is one in the policy's normalised actions, in its raw ones."""
    affine = policy.normalizer.affines.get("actions")
    return 1.0 if affine is None else 1 / np.asarray(affine.scale)


def _check_chunks(experiment: Experiment, robot: Robot, settings: Iterable[Setting]) -> None:
    """Raises ValueError for delays and chunking that this policy cannot have."""
    execute = experiment.config.evaluation.execute
    horizon = experiment.config.policy_io.action.horizon
    for setting in settings:
        if setting.delay > execute or setting.delay + execute > horizon:
            raise ValueError(
                f"--delay={setting.delay} is too long: an answer must be there before the next "
                f"query, evaluation.execute = {execute} control steps later, and a chunk of "
                f"{horizon} actions must last until the next one is there (execute + delay)."
            )
        if setting.chunking != "none" and (relative := bases(robot.action)):
            raise ValueError(
                f"sampler.chunking is {setting.chunking!r}, but the actions of this policy are "
                f"relative to {', '.join(relative)} at the moment of a query, so those of an "
                "earlier chunk mean something else: use --config.sampler.chunking=none."
            )


# Success rates with confidence intervals.


@dataclass(frozen=True)
class SuccessRate:
    """A success rate with its Wilson interval; rate, low and high are fractions."""

    name: str
    successes: int
    trials: int
    rate: float
    low: float
    high: float


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Returns the Wilson score interval of a success probability, as fractions (low, high).

    Unlike the normal approximation it stays inside [0, 1] and does not shrink to a point at no or
    all successes. Without trials it is (0, 1).
    """
    from scipy.stats import binomtest  # takes a second to import

    if not 0 <= successes <= trials:  # scipy would return NaN
        raise ValueError(f"{successes} successes of {trials} trials are impossible.")
    if trials == 0:
        return 0.0, 1.0
    interval = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def success_rate(name: str, successes: int, trials: int) -> SuccessRate:
    """Returns a rate with its 95 % Wilson interval."""
    rate = successes / trials if trials else 0.0
    return SuccessRate(name, successes, trials, rate, *wilson_interval(successes, trials))


def success_table(outcomes: Iterable[tuple[str, bool]]) -> list[SuccessRate]:
    """Returns the success of every task in order of appearance, from (task, success) pairs."""
    by_task: dict[str, list[bool]] = {}
    for task, success in outcomes:
        by_task.setdefault(task, []).append(bool(success))
    return [success_rate(task, sum(tried), len(tried)) for task, tried in by_task.items()]


def mean_success(table: list[SuccessRate]) -> SuccessRate:
    """Returns the mean over tasks of equal weight, with the Wilson interval of all episodes.

    The interval pools the episodes: it is the uncertainty on these tasks, not on others.
    """
    successes = sum(row.successes for row in table)
    trials = sum(row.trials for row in table)
    rate = fmean(row.rate for row in table) if table else 0.0
    return SuccessRate("mean", successes, trials, rate, *wilson_interval(successes, trials))
