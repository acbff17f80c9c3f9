"""One camera, two tiled and one observed beside the other: success, time per query, tokens.

    python -m launch.benchmarks.cameras --folder=runs/cameras

records demonstrations of both cameras once, then trains and evaluates the three policies of
configs/camera_study.py. It takes about half an hour on two CPU cores, and continues where it was
stopped. What came out: docs/results.md.
"""

import statistics
from pathlib import Path

from absl import flags

from configs import camera_study, quickstart
from launch.entry import run
from launch.phases import Phase, command, recording, run_phases, training
from mvjax.evaluation.closed_loop import wilson_interval
from mvjax.evaluation.rollout import read_results
from mvjax.experiment import Experiment

FOLDER = flags.DEFINE_string("folder", "runs/cameras", "Folder of the demonstrations and runs.")


def main() -> None:
    """Runs what is missing, and prints a table."""
    out = FOLDER.value
    run_phases(phases(out), Path(out) / "phases.json")
    print("| cameras | tokens | success | by task | ms per query |\n|---|---|---|---|---|")
    for cameras in quickstart.CAMERAS:
        print(row(Path(out), cameras))


def phases(out: str) -> list[Phase]:
    """One recording; then for each policy an encoding, two trainings, an evaluation, and a few
    episodes one after the other, whose queries are timed.
    """
    robot = camera_study.get_config("video,tiled").recording.robot
    found = [Phase("record", recording(robot, f"{out}/robot"))]
    for cameras in quickstart.CAMERAS:
        folder = f"{out}/{cameras}"
        video, action = (
            (
                f"--config=camera_study:{stage},{cameras}",
                f"--config.run_dir={folder}",
                f"--config.datasets.robot.path={out}/robot",
            )
            for stage in ("video", "action")
        )
        fit = command("launch.encode", *video, "--only=tokenizer")
        found.append(Phase(f"{cameras}: fit the tokenizer", fit))
        found.append(Phase(f"{cameras}: encode", command("launch.encode", *video)))
        for stage, words in (("video", video), ("action", action)):
            found.append(training(f"{cameras}: {stage}", f"{folder}/{stage}", *words))
        how = *action, f"--checkpoint={folder}/action", "--modes=policy"
        evaluate = command("launch.evaluate", *how, f"--out={folder}/evaluation")
        found.append(Phase(f"{cameras}: evaluate", evaluate))
        alone = "--config.evaluation.workers=1", "--config.evaluation.episodes_per_task=2"
        timed = command("launch.evaluate", *how, *alone, f"--out={folder}/timed")
        found.append(Phase(f"{cameras}: time a query", timed))
    return found


def row(out: Path, cameras: str) -> str:
    """A line of the table."""
    config = camera_study.get_config(f"video,{cameras}")
    results, timed = (
        read_results(out / cameras / folder / "policy_k0/results.jsonl")
        for folder in ("evaluation", "timed")
    )
    low, high = wilson_interval(sum(r.success for r in results), len(results))
    success = statistics.mean(r.success for r in results)
    by_task = ", ".join(
        f"{task} {sum(r.success for r in results if r.task == task)}"
        for task in config.evaluation.tasks
    )
    query = statistics.median(r.plan_seconds / r.queries for r in timed)
    tokens = Experiment.from_config(config).tokens
    interval = f"{success:.0%} ({low:.0%} to {high:.0%})"
    return f"| {cameras} | {tokens} | {interval} | {by_task} | {1000 * query:.1f} |"


if __name__ == "__main__":
    run(main)
