"""Success in a simulator: the settings (mode and stop step) of a trained policy, one by one."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import jax
import numpy as np

from mvjax.evaluation.rollout import EpisodeResult, Plan, Setting, run_rollouts, write_setting
from mvjax.evaluation.suites.suite import SUITES, Convert, Suite
from mvjax.experiment import Experiment
from mvjax.policy.load import load_policy, policy_identity
from mvjax.policy.observation import Observation, ObservationSpec

def settings_for(
    mode: str, stop_steps: Sequence[int], video_steps: int, variant: str = ""
) -> dict[str, Setting]:
    """The settings of one mode by folder name: one per stop step, or one for "expert" and "none".

    The first policy setting is the one of the report's headline.
    """
    if mode == "expert":
        return {"expert": Setting("scripted expert", mode)}
    if mode == "none":
        return {"none": Setting("do nothing", mode)}
    if mode not in ("policy", "oracle"):
        raise ValueError(f"mode must be policy, oracle, expert or none, got {mode!r}.")
    of = f"of {video_steps}"
    labels = {"policy": "stop after {} " + of, "oracle": "true future, noise of step {} " + of}
    before, begins = (f"{variant}_", f"{variant}: ") if variant else ("", "")
    return {
        f"{before}{mode}_k{k}": Setting(
            begins + labels[mode].format(k),
            mode,
            k,
            main=mode == "policy" and k == 0 and not variant,
            variant=variant,
        )
        for k in stop_steps
    }


def evaluate(
    experiment: Experiment, checkpoint: Path, folder: Path, settings: Mapping[str, Setting]
) -> Iterator[tuple[Setting, list[EpisodeResult]]]:
    """Plays every episode of `config.evaluation` under each setting; resumes what is on file.

    The processes of a job share the episodes; each has the whole policy on its own devices. The
    policy is loaded once for all settings.

    Args:
        experiment: of the stage-2 run, its config with `evaluation {suite, tasks,
            episodes_per_task, first_seed, execute, max_steps, workers, videos_per_task}`.
        checkpoint: training directory of the stage-2 run; unused by "expert" and "none".
        folder: where results, recordings and the settings' descriptions go, in a folder for each.
        settings: by the names of their folders.

    Yields:
        Each setting with its results as soon as they are complete.

    Raises:
        ValueError: if the suite is unknown, or the policy's actions are not for it.
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
    policy = None
    for name, setting in settings.items():
        identity, controller = "", setting.mode
        if setting.mode in ("policy", "oracle"):
            oracle = setting.mode == "oracle"
            sampling = experiment.sampling(stop_step=setting.stop_step, oracle=oracle)
            if policy is None:
                policy = load_policy(experiment, checkpoint, sampling, protocol.workers)
            policy = policy.sampled(sampling)
            policy.warm_up()
            controller = _in_simulator(policy.plan, suite.convert)
            identity = policy_identity(config, checkpoint) + str(sampling)
        if jax.process_index() == 0:
            write_setting(folder / name, setting)
        yield setting, _play(experiment, suite, folder / name, setting, controller, identity)


def _play(
    experiment: Experiment,
    suite: Suite,
    folder: Path,
    setting: Setting,
    controller: Plan | str,
    identity: str,
) -> list[EpisodeResult]:
    protocol, clip = experiment.config.evaluation, experiment.clip
    proprio = experiment.config.policy_io.proprio
    # --config.evaluation.tasks=a,b puts one string into the tuple.
    tasks = [task.strip() for task in ",".join(protocol.tasks).split(",")]
    protocol_text = "".join(str(protocol[k]) for k in ("execute", "max_steps", "first_seed"))
    return run_rollouts(
        suite=protocol.suite,
        make_simulator=suite.make_simulator,
        episodes=[
            (task, protocol.first_seed + i)
            for task in filter(None, tasks)
            for i in range(protocol.episodes_per_task)
        ],
        controller=controller,
        spec=ObservationSpec(
            observed_frames=clip.observed_frames,
            fps=clip.fps,
            proprio_horizon=proprio.horizon,
            proprio_fps=proprio.fps,
            execute=protocol.execute,
        ),
        folder=folder,
        config_hash=hashlib.sha256((identity + protocol_text).encode()).hexdigest()[:16],
        oracle_frames=clip.future_frames if setting.mode == "oracle" else 0,
        max_steps=protocol.max_steps,
        workers=protocol.workers,
        videos_per_task=protocol.videos_per_task,
        interpreter=suite.interpreter(),
        process=jax.process_index(),
        processes=jax.process_count(),
    )


def _in_simulator(plan: Plan, convert: Convert) -> Plan:
    """A plan in the simulator's own actions."""

    def converted(observations: Sequence[Observation]) -> np.ndarray:
        chunks = zip(plan(observations), observations)
        return np.stack([convert(chunk, seen.proprio[-1]) for chunk, seen in chunks])

    return converted


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
    """The Wilson score interval of a success probability.

    Unlike the normal approximation it stays inside [0, 1] and does not shrink to a point at 0 or
    all successes. With no trials nothing is known and the interval is (0, 1).

    Returns:
        The lower and upper end, as fractions.

    Raises:
        ValueError: more successes than trials, or a confidence that is not between 0 and 1.
    """
    from scipy.stats import binomtest  # a second of loading

    if not 0 <= successes <= trials:  # of which scipy makes NaN
        raise ValueError(f"{successes} successes of {trials} trials is not possible.")
    if trials == 0:
        return 0.0, 1.0
    interval = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def success_rate(name: str, successes: int, trials: int) -> SuccessRate:
    """A rate with its 95 % Wilson interval."""
    rate = successes / trials if trials else 0.0
    return SuccessRate(name, successes, trials, rate, *wilson_interval(successes, trials))


def success_table(outcomes: Iterable[tuple[str, bool]]) -> list[SuccessRate]:
    """Success per task, in order of first appearance.

    Args:
        outcomes: (task, success) of every episode.
    """
    by_task: dict[str, list[bool]] = {}
    for task, success in outcomes:
        by_task.setdefault(task, []).append(bool(success))
    return [success_rate(task, sum(tried), len(tried)) for task, tried in by_task.items()]


def mean_success(table: list[SuccessRate]) -> SuccessRate:
    """The mean over tasks, every task weighing the same, with the Wilson interval of all episodes.

    The interval pools the episodes: it says how sure the number is for these tasks, not how it
    would be on other tasks.
    """
    successes = sum(row.successes for row in table)
    trials = sum(row.trials for row in table)
    rate = fmean(row.rate for row in table) if table else 0.0
    return SuccessRate("mean", successes, trials, rate, *wilson_interval(successes, trials))
