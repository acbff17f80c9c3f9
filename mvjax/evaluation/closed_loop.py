"""Success in a simulator: the settings (mode and stop step) of a trained policy, one by one."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mvjax.evaluation.results import EpisodeResult, Setting, write_setting
from mvjax.evaluation.rollout import Plan, run_rollouts
from mvjax.evaluation.suites.libero import Libero
from mvjax.evaluation.suites.libero_policy import libero_commands
from mvjax.evaluation.suites.libero_python import libero_python
from mvjax.evaluation.suites.metaworld import MetaWorld
from mvjax.evaluation.suites.suite import Convert, Suite
from mvjax.policy.load import load_policy, policy_identity
from mvjax.policy.observation import Observation, ObservationSpec
from mvjax.policy.sampling import Sampling

SUITES = {
    "metaworld": Suite(MetaWorld, control_hz=80),
    "libero": Suite(Libero, control_hz=20, convert=libero_commands, interpreter=libero_python),
}


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
    config: Any, checkpoint: Path, folder: Path, settings: Mapping[str, Setting]
) -> Iterator[tuple[Setting, list[EpisodeResult]]]:
    """Plays every episode of `config.evaluation` under each setting; resumes what is on file.

    The processes of a job share the episodes; each has the whole policy on its own devices. The
    policy is loaded once for all settings.

    Args:
        config: configuration of the stage-2 run, with `evaluation {suite, tasks,
            episodes_per_task, first_seed, execute, max_steps, workers, videos_per_task}`.
        checkpoint: training directory of the stage-2 run; unused by "expert" and "none".
        folder: where results, recordings and the settings' descriptions go, in a folder for each.
        settings: by the names of their folders.

    Yields:
        Each setting with its results as soon as they are complete.

    Raises:
        ValueError: if the suite is unknown, or the policy's actions are not for it.
    """
    protocol = config.evaluation
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
            sampling = Sampling(**config.sampler, stop_step=setting.stop_step, oracle=oracle)
            if policy is None:
                policy = load_policy(config, checkpoint, sampling, protocol.workers)
            policy = policy.sampled(sampling)
            policy.warm_up()
            controller = _in_simulator(policy.plan, suite.convert)
            identity = policy_identity(config, checkpoint) + str(sampling)
        if jax.process_index() == 0:
            write_setting(folder / name, setting)
        yield setting, _play(config, suite, folder / name, setting, controller, identity)


def _play(
    config: Any,
    suite: Suite,
    folder: Path,
    setting: Setting,
    controller: Plan | str,
    identity: str,
) -> list[EpisodeResult]:
    protocol, io = config.evaluation, config.policy_io
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
            observed_frames=config.clip.observed_frames,
            fps=config.clip.fps,
            proprio_horizon=io.proprio.horizon,
            proprio_fps=io.proprio.fps,
            execute=protocol.execute,
        ),
        folder=folder,
        config_hash=hashlib.sha256((identity + protocol_text).encode()).hexdigest()[:16],
        oracle_frames=config.clip.future_frames if setting.mode == "oracle" else 0,
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
