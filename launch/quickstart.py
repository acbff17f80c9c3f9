"""The quickstart: data from a simulator, two training stages, a robot driven, a report.

    bash launch/quickstart.sh                 set-up, then all of this
    python -m launch.quickstart --study       also the sample-efficiency study (longer)

Every phase is a command of its own, printed before it runs; phases that are done are not repeated.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs import quickstart as quickstart_config
from configs import quickstart_action, quickstart_video
from launch.phases import Phase, python, run_phases
from launch.preflight import find_rendering_backend, require
from launch.study import collect_study, study_phases
from mvjax.checkpoints.config_match import differences
from mvjax.evaluation.environment import write_environment
from mvjax.evaluation.report import build_report


def configured(name: str, run_dir: str, size: str) -> tuple[str, str]:
    """The flags that name a configuration file and the run folder."""
    suffix = "" if size == "full" else f":{size}"
    return f"--config=configs/{name}.py{suffix}", f"--config.run_dir={run_dir}"


def phases(run_dir: str, size: str) -> list[Phase]:
    """What the quickstart does, in order."""
    config = quickstart_config.get_config(size)
    oracle_step, full = config.evaluation.oracle_step, config.sampler.video_steps

    def flags(name: str) -> tuple[str, str]:
        return configured(name, run_dir, size)

    def record(name: str) -> tuple[str, ...]:
        what = config.recording[name]
        return python(
            "data_pipelines.record",
            f"--out={run_dir}/data/{name}",
            f"--kind={what.kind}",
            f"--tasks={','.join(what.tasks)}",
            f"--episodes={what.episodes}",
            f"--seed={what.seed}",
        )

    def train(stage: str) -> tuple[str, ...]:
        return python("launch.train", *flags(f"quickstart_{stage}"), f"--workdir={run_dir}/{stage}")

    def evaluate(modes: str, *more: str) -> tuple[str, ...]:
        return python(
            "launch.evaluate",
            *flags("quickstart_action"),
            f"--checkpoint={run_dir}/action",
            f"--out={run_dir}/evaluation",
            f"--modes={modes}",
            *more,
        )

    few = f"--config.evaluation.episodes_per_task={config.evaluation.sweep_episodes}"
    return [
        Phase("record robot demonstrations", record("robot")),
        Phase("record video without actions", record("video")),
        Phase("fit the video tokenizer", python("launch.fit_tokenizer", *flags("quickstart"))),
        Phase("encode", python("launch.encode", *flags("quickstart"))),
        Phase("stage 1: video model", train("video"), f"{run_dir}/video/finished"),
        Phase("stage 2: action decoder", train("action"), f"{run_dir}/action/finished"),
        Phase("evaluate the policy", evaluate("policy")),
        Phase("evaluate the baselines", evaluate("expert,none")),
        Phase(
            "sweep the stop step",
            evaluate("policy", f"--stop_steps={full // 2},{full}", few),
        ),
        Phase(
            "evaluate with the true future", evaluate("oracle", f"--stop_steps={oracle_step}", few)
        ),
        Phase(
            "predict held-out video",
            python(
                "launch.predict",
                *flags("quickstart_action"),
                f"--checkpoint={run_dir}/action",
                f"--out={run_dir}/predictions",
            ),
        ),
    ]


def stage_settings(size: str) -> list[dict[str, Any]]:
    """Those of both stages, without the study's."""
    stages = (quickstart_video.get_config(size), quickstart_action.get_config(size))
    return [stage.to_dict() | {"study": None} for stage in stages]


def check_settings(folder: Path, settings: Sequence[dict[str, Any]]) -> None:
    """Remembers the settings of a new folder; of an older one, they must be those of now.

    A phase that is done is known by its command, which names a configuration file, not what was in
    that file; and a training that is done is not repeated.

    Raises:
        SystemExit: if they have been changed since the folder was begun, with what differs.
    """
    text = json.dumps(settings, indent=1)
    file = folder / "settings.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(file.name + ".partial")
        partial.write_text(text)
        partial.replace(file)
    pairs = zip(json.loads(file.read_text()), json.loads(text))
    found = [d for there, here in pairs for d in differences(there, here, "config")]
    if found := list(dict.fromkeys(found)):
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        print(
            f"{folder} was made with other settings: {'; '.join(found[:3])}{more}. Give "
            "--run-dir=ANOTHER_FOLDER, or the settings of before.",
            file=sys.stderr,
        )
        raise SystemExit(2)


def main() -> None:
    """Runs all phases, then draws the report."""
    parser = argparse.ArgumentParser(
        prog="launch/quickstart.sh", description="Train a video-action model and drive a robot."
    )
    parser.add_argument("--run-dir", default="runs/quickstart", help="folder of the run")
    parser.add_argument(
        "--size", default="full", choices=("full", "smoke"), help="smoke: see it run"
    )
    parser.add_argument("--study", action="store_true", help="add the sample-efficiency study")
    arguments = parser.parse_args()
    run_dir = Path(arguments.run_dir)
    if sys.platform == "linux" and "MUJOCO_GL" not in os.environ:
        os.environ["MUJOCO_GL"] = find_rendering_backend() or ""
    require(run_dir)
    config = quickstart_config.get_config(arguments.size)
    check_settings(run_dir, stage_settings(arguments.size))
    if arguments.study:
        check_settings(run_dir / "study", [{"study": config.study.to_dict()}])
    words = ["bash", "launch/quickstart.sh", *sys.argv[1:]]
    (run_dir / "command.txt").write_text(shlex.join(words) + "\n")

    run_phases(phases(arguments.run_dir, arguments.size), run_dir / "phases.json")
    if arguments.study:
        video, action = (
            configured(f"quickstart_{stage}", arguments.run_dir, arguments.size)
            for stage in ("video", "action")
        )
        study = study_phases(arguments.run_dir, config, video, action)
        run_phases(study, run_dir / "study/phases.json")
        collect_study(arguments.run_dir, config)
    write_environment(run_dir)
    build_report(run_dir, run_dir / "report.html")
    print(f"The report is {run_dir / 'report.html'}.")


if __name__ == "__main__":
    main()
