"""The quickstart: data from a simulator, both training stages, a robot in simulation, a report.

    bash launch/quickstart.sh                 sets up the environment and runs all of this
    python -m launch.quickstart --study       adds the sample-efficiency study (takes longer)

Each phase is a command, which is printed before it runs. Phases that are done are not repeated.
"""

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from configs import quickstart, quickstart_action, quickstart_video
from data_pipelines.atomic import write_json, write_text
from data_pipelines.lock import run_lock
from data_pipelines.settings import differences
from launch import cli
from launch.entry import run
from launch.phases import Phase, command, recording, run_phases, training
from launch.preflight import find_rendering_backend, require
from mvjax.evaluation.report import build_report, write_environment
from mvjax.evaluation.rollout import read_results

RUN_DIR = flags.DEFINE_string(
    "run_dir", "runs/quickstart", "Folder for everything that the quickstart writes."
)
SIZE = flags.DEFINE_enum(
    "size", "full", ("full", "smoke"), "full, or smoke: a few steps of every phase."
)
CAMERAS = flags.DEFINE_enum(
    "cameras",
    "single",
    quickstart.CAMERAS,
    "single, or two: the gripper's tiled beside the corner's, or observed without a future.",
)
AUGMENT = flags.DEFINE_bool("augment", False, "Crop, turn and colour the pictures, four variants.")
STUDY = flags.DEFINE_bool("study", False, "Add the sample-efficiency study.")

BACKBONES = {"trained": "backbone trained on video", "untrained": "untrained backbone"}


def main() -> None:
    """Runs all phases, then draws the report."""
    run_dir, folder = RUN_DIR.value, Path(RUN_DIR.value)
    recipe = SIZE.value + ("" if CAMERAS.value == "single" else f",{CAMERAS.value}")
    recipe += f",{quickstart.AUGMENTED}" * AUGMENT.value
    if sys.platform == "linux" and "MUJOCO_GL" not in os.environ:
        os.environ["MUJOCO_GL"] = find_rendering_backend() or ""
    require(folder, disk_gb=3 if AUGMENT.value else 2)
    with run_lock(folder):
        _run(run_dir, folder, recipe)


def _run(run_dir: str, folder: Path, recipe: str) -> None:
    config = quickstart.get_config(recipe)
    check_settings(folder, stage_settings(recipe))
    if STUDY.value:
        check_settings(folder / "study", [{"study": config.study.to_dict()}])
    words = cli.program.split() or ["bash", "launch/quickstart.sh"]
    write_text(folder / "command.txt", shlex.join([*words, *sys.argv[1:]]) + "\n")

    run_phases(phases(run_dir, recipe), folder / "phases.json")
    if STUDY.value:
        run_phases(study_phases(run_dir, recipe, config.study), folder / "study/phases.json")
        collect_study(run_dir, config.study)
    write_environment(folder)
    build_report(folder, folder / "report.html")
    print(f"The report is {folder / 'report.html'}.")


def phases(run_dir: str, recipe: str) -> list[Phase]:
    """What the quickstart does, in order."""
    config = quickstart.get_config(recipe)
    shared, video, action = (
        _configuration(f"quickstart{stage}", run_dir, recipe) for stage in ("", "_video", "_action")
    )

    record = {
        name: recording(what, f"{run_dir}/data/{name}") for name, what in config.recording.items()
    }

    def evaluate(*how: str, out: str = "evaluation") -> tuple[str, ...]:
        checkpoint = f"--checkpoint={run_dir}/action"
        return command("launch.evaluate", *action, checkpoint, f"--out={run_dir}/{out}", *how)

    few = f"--config.evaluation.episodes_per_task={config.evaluation.sweep_episodes}"
    oracle_step, full = config.evaluation.oracle_step, config.sampler.video_steps
    sweep = f"--stop_steps={full // 2},{full}"
    predictions = evaluate("--suite=predictions", out="predictions")
    return [
        Phase("record robot demonstrations", record["robot"]),
        Phase("record video without actions", record["video"]),
        Phase("fit the video tokenizer", command("launch.encode", *shared, "--only=tokenizer")),
        Phase("encode", command("launch.encode", *shared)),
        training("stage 1: video model", f"{run_dir}/video", *video),
        training("stage 2: action decoder", f"{run_dir}/action", *action),
        Phase("evaluate the policy", evaluate("--modes=policy")),
        Phase("evaluate the baselines", evaluate("--modes=expert,none")),
        Phase("sweep the stop step", evaluate("--modes=policy", sweep, few)),
        Phase(
            "evaluate with the true future",
            evaluate("--modes=oracle", f"--stop_steps={oracle_step}", few),
        ),
        Phase("predict held-out video", predictions),
    ]


def _configuration(name: str, run_dir: str, recipe: str) -> tuple[str, str]:
    suffix = "" if recipe == "full" else f":{recipe}"
    return f"--config={name}{suffix}", f"--config.run_dir={run_dir}"


# The study: what is video training worth when action demonstrations are few?
#
# For every number of action demonstrations per task and every seed, the same decoder is trained
# with the same budget on two backbones: one that stage 1 trained on all video, for longer than the
# quickstart's, and an untrained one. The seed decides the decoder's start, the order of the
# batches, the choice of demonstrations and the untrained backbone.


def study_phases(run_dir: str, recipe: str, study: ConfigDict) -> list[Phase]:
    """Stage 1, then a training and an evaluation per backbone, number of demonstrations and seed.

    Args:
        run_dir: the quickstart's folder; results go to `study/` in it.
        recipe: of the quickstart's configurations.
        study: {video_steps, demonstrations, seeds, steps, episodes_per_task}.
    """
    video, action = (
        _configuration(f"quickstart_{stage}", run_dir, recipe) for stage in ("video", "action")
    )
    checkpoints = {"trained": f"{run_dir}/study/video", "untrained": ""}
    phases = [
        training(
            "study: train the backbone",
            checkpoints["trained"],
            *video,
            *_steps(study.video_steps),
        )
    ]
    for backbone, demonstrations, seed in _cells(study):
        folder = _folder(run_dir, backbone, demonstrations, seed)
        flags = [
            *action,
            *_steps(study.steps),
            f"--config.backbone.checkpoint={checkpoints[backbone]}",
            f"--config.training.seed={seed}",
            f"--config.training.episodes_per_task={demonstrations}",
            f"--config.evaluation.episodes_per_task={study.episodes_per_task}",
        ]
        name = f"{BACKBONES[backbone]}, {demonstrations} demonstrations per task, seed {seed}"
        play = command("launch.evaluate", *flags, f"--checkpoint={folder}", f"--out={folder}")
        phases += [
            training(f"study: train, {name}", folder, *flags),
            Phase(f"study: play, {name}", play),
        ]
    return phases


def collect_study(run_dir: str, study: ConfigDict) -> None:
    """Writes `study/results.json`: successes of all seeds together, per backbone and number."""
    totals: dict[tuple[str, int], list[bool]] = {}
    for backbone, demonstrations, seed in _cells(study):
        folder = Path(_folder(run_dir, backbone, demonstrations, seed))
        results = read_results(folder / "policy_k0" / "results.jsonl")
        totals.setdefault((backbone, demonstrations), []).extend(r.success for r in results)
    rows = [
        {
            "label": BACKBONES[backbone],
            "demonstrations": demonstrations,
            "successes": sum(outcomes),
            "trials": len(outcomes),
        }
        for (backbone, demonstrations), outcomes in totals.items()
    ]
    write_json(Path(run_dir) / "study" / "results.json", rows)


def _steps(number: int) -> tuple[str, str]:
    return f"--config.training.steps={number}", f"--config.optimizer.decay_steps={number}"


def _cells(study: ConfigDict) -> list[tuple[str, int, int]]:
    return [
        (backbone, demonstrations, seed)
        for seed in range(study.seeds)
        for demonstrations in study.demonstrations
        for backbone in BACKBONES
    ]


def _folder(run_dir: str, backbone: str, demonstrations: int, seed: int) -> str:
    return f"{run_dir}/study/{backbone}_{demonstrations}_seed{seed}"


# A folder belongs to the settings that it was begun with.


def stage_settings(recipe: str) -> list[dict[str, Any]]:
    """Those of both stages, without the study's."""
    stages = (quickstart_video.get_config(recipe), quickstart_action.get_config(recipe))
    return [stage.to_dict() | {"study": None} for stage in stages]


def check_settings(folder: Path, settings: Sequence[dict[str, Any]]) -> None:
    """Remembers the settings of a new folder; of an older one, they must be those of now.

    A phase that is done is known by its command, which names a configuration file, not what was in
    that file; and a training that is done is not repeated.

    Raises:
        ValueError: they have been changed since the folder was begun; with what differs.
    """
    file = folder / "settings.json"
    if not file.exists():
        write_json(file, settings)
    pairs = zip(json.loads(file.read_text()), settings)
    found = [d for there, here in pairs for d in differences(there, here, "config")]
    if found := list(dict.fromkeys(found)):
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            f"{folder} was made with other settings: {'; '.join(found[:3])}{more}. Give "
            "--run-dir=ANOTHER_FOLDER, or the settings of before."
        )


if __name__ == "__main__":
    run(main)
