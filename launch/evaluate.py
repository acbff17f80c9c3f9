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

from launch.entry import config_flag, run
from mvjax.evaluation.closed_loop import evaluate, settings_for
from mvjax.evaluation.statistics import mean_success, success_table

CONFIG = config_flag()
CHECKPOINT = flags.DEFINE_string("checkpoint", "", "Training directory of the stage-2 run.")
OUT = flags.DEFINE_string("out", None, "Folder of the results, one sub-folder per setting.")
MODES = flags.DEFINE_list("modes", ["policy"], "policy, oracle, expert, none.")
STOP_STEPS = flags.DEFINE_list("stop_steps", ["0"], "Evaluations of the video before the plan.")


def main() -> None:
    """Evaluates every setting, prints one line for each."""
    config = CONFIG.value
    for mode in MODES.value:
        settings = settings_for(
            mode, [int(k) for k in STOP_STEPS.value], config.sampler.video_steps
        )
        for name, setting in settings.items():
            results = evaluate(config, Path(CHECKPOINT.value), Path(OUT.value) / name, setting)
            mean = mean_success(success_table((r.task, r.success) for r in results))
            print(
                f"{setting.label}: {mean.rate:.0%} of {mean.trials} episodes "
                f"(95 % interval {mean.low:.0%} to {mean.high:.0%})"
            )


if __name__ == "__main__":
    flags.mark_flag_as_required("out")
    run(main)
