r"""Evaluates a trained policy, in a simulator or on held-out episodes.

    python -m launch.evaluate --checkpoint=runs/quickstart/action \
        --out=runs/quickstart/evaluation --modes=policy --stop_steps=0,5,10

plays the tasks of config.evaluation (of the run's own configuration, unless --config names another)
and writes the success to a folder. Modes: policy (its own predicted video, partially denoised for
--stop_steps evaluations), oracle (the expert's true future video in its place), expert (the
scripted expert), none (zero actions). A stopped evaluation goes on where it was when the same
command is given again. With --variant=WORD other checkpoints, layers or shares of the data are
evaluated into the same folder; its report.html holds all that is there.

    python -m launch.evaluate --suite=offline --checkpoint=runs/quickstart/action \
        --out=runs/quickstart/offline

compares the policy's actions with those of held-out demonstrations, for true and for generated
video at every stop step, and writes offline.html and offline.json.
"""

from pathlib import Path
from statistics import fmean

import jax
from absl import flags
from ml_collections import ConfigDict

from launch.entry import config_flag, path_flag, run
from mvjax import parallel
from mvjax.evaluation.closed_loop import evaluate, mean_success, settings_for, success_table
from mvjax.evaluation.offline import evaluate_offline
from mvjax.evaluation.report import build_evaluation_report
from mvjax.evaluation.rollout import Setting
from mvjax.experiment import Experiment

CONFIG = config_flag()
CHECKPOINT = flags.DEFINE_string("checkpoint", "", "Training directory of the stage-2 run.")
OUT = path_flag("out", "Folder of the results, one sub-folder per setting.")
MODES = flags.DEFINE_list("modes", ["policy"], "policy, oracle, expert, none.")
STOP_STEPS = flags.DEFINE_list(
    "stop_steps", None, "Evaluations of the video before the plan; 0, or offline all, if not given."
)
VARIANT = flags.DEFINE_string(
    "variant", "", "A word for another checkpoint, layer or share of the data, kept beside others."
)
SUITE = flags.DEFINE_string("suite", "", '"offline", or another simulator than the config names.')
MOMENTS = flags.DEFINE_integer("moments", 32, "Offline: moments per dataset.", lower_bound=1)
BATCH = flags.DEFINE_integer("batch", 8, "Offline: moments computed at once.", lower_bound=1)


def settings(modes: list[str], stop_steps: list[str], video_steps: int) -> dict[str, Setting]:
    """Every setting by folder name; a mistake in the last is said before the first is played."""
    if not modes:
        raise ValueError("--modes must name at least one mode: policy, oracle, expert or none.")
    steps = _stop_steps(stop_steps, video_steps)
    by_mode = [settings_for(mode, steps, video_steps, VARIANT.value) for mode in modes]
    return {name: setting for chosen in by_mode for name, setting in chosen.items()}


def _stop_steps(given: list[str], video_steps: int) -> list[int]:
    if not given or not all(k.isdecimal() for k in given):
        raise ValueError(
            f"--stop_steps must be whole numbers such as 0,5,10; got {','.join(given)!r}."
        )
    steps = [int(k) for k in given]
    if max(steps) > video_steps:
        raise ValueError(
            f"--stop_steps must be between 0 and sampler.video_steps = {video_steps}, got "
            f"{max(steps)}."
        )
    return steps


def offline(config: ConfigDict) -> None:
    """Prints the action error at every stop step."""
    everything = [str(k) for k in range(config.sampler.video_steps + 1)]
    steps = _stop_steps(STOP_STEPS.value or everything, config.sampler.video_steps)
    summary = evaluate_offline(
        Experiment.from_config(config),
        Path(CHECKPOINT.value),
        Path(OUT.value),
        steps,
        MOMENTS.value,
        BATCH.value,
    )
    if jax.process_index() > 0:
        return
    for said in summary["unreadable"]:
        print(f"could not be read: {said}")
    print("action error (MSE, normalised) at stop step: true video, generated video")
    for i, k in enumerate(steps):
        true, generated = (summary[key]["mse"][i] for key in ("true_video", "generated_video"))
        print(f"{k:4d} {true:8.4f} {generated:8.4f}")
    print(f"PSNR {fmean(summary['psnr']):.2f} dB, SSIM {fmean(summary['ssim']):.3f}")


def main() -> None:
    """Evaluates, and prints one line per setting or stop step."""
    with parallel.initialized():
        evaluate_as_told(CONFIG.value)


def evaluate_as_told(config: ConfigDict) -> None:
    """Offline or in a simulator, as the flags say."""
    if SUITE.value == "offline":
        if not CHECKPOINT.value:
            raise ValueError("--checkpoint must be given: the training directory of a stage-2 run.")
        return offline(config)
    if VARIANT.value and not VARIANT.value.replace("-", "").isalnum():
        raise ValueError(f"--variant is one word of letters, digits and -, got {VARIANT.value!r}.")
    if SUITE.value:
        config.evaluation.suite = SUITE.value
    chosen = settings(MODES.value, STOP_STEPS.value or ["0"], config.sampler.video_steps)
    if not CHECKPOINT.value and any(s.stop_step is not None for s in chosen.values()):
        raise ValueError("--checkpoint must be given: the training directory of a stage-2 run.")
    out = Path(OUT.value)
    for setting, results in evaluate(
        Experiment.from_config(config), Path(CHECKPOINT.value), out, chosen
    ):
        mean = mean_success(success_table((r.task, r.success) for r in results))
        if jax.process_index() > 0:
            continue
        print(
            f"{setting.label}: {mean.rate:.0%} of {mean.trials} episodes "
            f"(95 % interval {mean.low:.0%} to {mean.high:.0%})"
        )
    if jax.process_index() == 0:
        print(f"The report is {build_evaluation_report(out)}.")


if __name__ == "__main__":
    run(main)
