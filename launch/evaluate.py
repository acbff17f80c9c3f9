"""Plays a trained policy in a simulator and writes its success to a folder.

    python -m launch.evaluate --config=configs/quickstart_action.py \
        --checkpoint=runs/quickstart/action --out=runs/quickstart/evaluation \
        --modes=policy --stop_steps=0,5,10

Modes: policy (its own predicted video, partially denoised for --stop_steps evaluations), oracle
(the expert's true future video in its place), expert (the scripted expert), none (zero actions).
A stopped evaluation goes on where it was when the same command is given again.
"""

from pathlib import Path

from absl import flags

from launch.entry import config_flag, path_flag, run
from mvjax.evaluation.closed_loop import evaluate, settings_for
from mvjax.evaluation.results import Setting
from mvjax.evaluation.statistics import mean_success, success_table

CONFIG = config_flag()
CHECKPOINT = flags.DEFINE_string("checkpoint", "", "Training directory of the stage-2 run.")
OUT = path_flag("out", "Folder of the results, one sub-folder per setting.")
MODES = flags.DEFINE_list("modes", ["policy"], "policy, oracle, expert, none.")
STOP_STEPS = flags.DEFINE_list("stop_steps", ["0"], "Evaluations of the video before the plan.")


def settings(modes: list[str], stop_steps: list[str], video_steps: int) -> dict[str, Setting]:
    """Every setting by folder name; a mistake in the last is said before the first is played."""
    if not modes or not stop_steps or not all(k.isdecimal() for k in stop_steps):
        raise ValueError(
            "--modes must name at least one mode, and --stop_steps whole numbers such as 0,5,10; "
            f"got {','.join(modes)!r} and {','.join(stop_steps)!r}."
        )
    steps = [int(k) for k in stop_steps]
    if max(steps) > video_steps:
        raise ValueError(
            f"--stop_steps must be between 0 and sampler.video_steps = {video_steps}, got "
            f"{max(steps)}."
        )
    by_mode = [settings_for(mode, steps, video_steps) for mode in modes]
    return {name: setting for chosen in by_mode for name, setting in chosen.items()}


def main() -> None:
    """Evaluates every setting, prints one line for each."""
    config = CONFIG.value
    chosen = settings(MODES.value, STOP_STEPS.value, config.sampler.video_steps)
    if not CHECKPOINT.value and any(s.stop_step is not None for s in chosen.values()):
        raise ValueError("--checkpoint must be given: the training directory of a stage-2 run.")
    for name, setting in chosen.items():
        results = evaluate(config, Path(CHECKPOINT.value), Path(OUT.value) / name, setting)
        mean = mean_success(success_table((r.task, r.success) for r in results))
        print(
            f"{setting.label}: {mean.rate:.0%} of {mean.trials} episodes "
            f"(95 % interval {mean.low:.0%} to {mean.high:.0%})"
        )


if __name__ == "__main__":
    run(main)
