r"""Evaluates a trained policy, in a simulator or on held-out episodes.

    python -m launch.evaluate --checkpoint=runs/quickstart/action \
        --out=runs/quickstart/evaluation --modes=policy --stop_steps=0,5,10

runs the tasks of config.evaluation in their simulator and writes success rates, videos and a report
to --out. The configuration is that of the run unless --config names another one. Modes: policy (the
video that the policy predicts, denoised for --stop_steps steps), oracle (the true future video of
the expert instead), expert (the scripted expert), none (zero actions). To continue an evaluation
that was stopped, run the same command again. identity.json in --out names the weights, settings and
simulator versions of the results, and where they were computed. An evaluation of anything else into
the same folder is refused. With --variant=WORD, other checkpoints, layers or shares of the data can
share the folder, and report.html shows all of them.

    python -m launch.evaluate --suite=offline --checkpoint=runs/quickstart/action \
        --out=runs/quickstart/offline

compares the actions of the policy with those of held-out demonstrations, for true video and for
generated video at every stop step, and writes offline.html and offline.json.

    python -m launch.evaluate --suite=predictions --checkpoint=runs/quickstart/action \
        --out=runs/quickstart/predictions

writes pairs of .mp4 files: the predicted and the true video of held-out episodes. More:
docs/policy.md, docs/libero.md.
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
from mvjax.evaluation.predictions import predict
from mvjax.evaluation.report import build_evaluation_report
from mvjax.evaluation.rollout import Setting
from mvjax.experiment import Experiment

CONFIG = config_flag()
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "", "Training directory of the stage-2 or joint run."
)
OUT = path_flag(
    "out", "Folder for the results; results of a simulator have a sub-folder per setting."
)
MODES = flags.DEFINE_list("modes", ["policy"], "One or more of policy, oracle, expert, none.")
STOP_STEPS = flags.DEFINE_list(
    "stop_steps",
    None,
    "Denoising steps of the video before acting, such as 0,5,10; default 0, offline all.",
)
VARIANT = flags.DEFINE_string(
    "variant",
    "",
    "A word that separates the results of another checkpoint, layer or share of the data.",
)
SUITE = flags.DEFINE_string(
    "suite", "", '"offline", "predictions", or a simulator other than that of the configuration.'
)
DELAY = flags.DEFINE_list(
    "delay",
    ["0"],
    "Control steps from a query to its answer, such as 0,4: the old chunk is executed meanwhile.",
)
MOMENTS = flags.DEFINE_integer(
    "moments",
    None,
    "Held-out moments per dataset; default 32, predictions 4.",
    lower_bound=1,
)
BATCH = flags.DEFINE_integer(
    "batch", 8, "With --suite=offline: moments computed together.", lower_bound=1
)


def main() -> None:
    """Evaluates, and prints one line per setting or stop step."""
    if DELAY.value != ["0"] and SUITE.value in ("offline", "predictions"):
        raise ValueError(f"--delay is of no effect with --suite={SUITE.value}: leave it out.")
    with parallel.initialized():
        if SUITE.value == "offline":
            offline(CONFIG.value)
        elif SUITE.value == "predictions":
            predictions(CONFIG.value)
        else:
            play(CONFIG.value)


def play(config: ConfigDict) -> None:
    """Prints the success of every setting in a simulator."""
    if VARIANT.value and not VARIANT.value.replace("-", "").isalnum():
        raise ValueError(f"--variant is one word of letters, digits and -, got {VARIANT.value!r}.")
    if "evaluation" not in config:
        raise ValueError(
            "the configuration names no simulator (config.evaluation). Without one, compare the "
            "policy's actions with held-out demonstrations: --suite=offline."
        )
    if SUITE.value:
        config.evaluation.suite = SUITE.value
    if not MODES.value:
        raise ValueError("--modes must name at least one mode: policy, oracle, expert or none.")
    video_steps = config.sampler.video_steps
    steps = _stop_steps(STOP_STEPS.value or ["0"], video_steps)
    if DELAY.value != ["0"] and not {"policy", "oracle"} & set(MODES.value):
        raise ValueError("--delay is that of a policy: name --modes=policy or oracle.")
    delays, chunking = _whole("--delay", DELAY.value), config.sampler.get("chunking", "none")
    chosen: dict[str, Setting] = {}  # by folder name, all of them before the first is played
    for mode in MODES.value:
        chosen |= settings_for(mode, steps, video_steps, VARIANT.value, delays, chunking)
    if any(s.stop_step is not None for s in chosen.values()):
        _require_checkpoint()
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


def offline(config: ConfigDict) -> None:
    """Prints the action error at every stop step."""
    _require_checkpoint()
    experiment, last = Experiment.from_config(config), config.sampler.video_steps
    everything = [str(k) for k in range(1 if experiment.context_frames == "observed" else last + 1)]
    steps = _stop_steps(STOP_STEPS.value or everything, last)
    summary = evaluate_offline(
        experiment,
        Path(CHECKPOINT.value),
        Path(OUT.value),
        steps,
        MOMENTS.value or 32,
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


def predictions(config: ConfigDict) -> None:
    """Writes videos of held-out episodes."""
    _require_checkpoint()
    if jax.process_count() > 1:
        raise ValueError("--suite=predictions takes one process.")
    experiment = Experiment.from_config(config)
    predict(experiment, Path(CHECKPOINT.value), Path(OUT.value), MOMENTS.value or 4)


def _require_checkpoint() -> None:
    if not CHECKPOINT.value:
        raise ValueError("--checkpoint must be given: the training directory of a stage-2 run.")


def _stop_steps(given: list[str], video_steps: int) -> list[int]:
    steps = _whole("--stop_steps", given)
    if max(steps) > video_steps:
        raise ValueError(
            f"--stop_steps must be between 0 and sampler.video_steps = {video_steps}, got "
            f"{max(steps)}."
        )
    return steps


def _whole(flag: str, given: list[str]) -> list[int]:
    if not given or not all(k.isdecimal() for k in given):
        raise ValueError(f"{flag} must be whole numbers such as 0,5,10; got {','.join(given)!r}.")
    return [int(k) for k in given]


if __name__ == "__main__":
    run(main)
