"""The quickstart: data from a simulator, two training stages, a robot driven, a report.

    bash launch/quickstart.sh                 set-up, then all of this
    python -m launch.quickstart --study       also the sample-efficiency study (longer)

Every phase is a command of its own, printed before it runs; phases that are done are not repeated.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from configs import quickstart as quickstart_config
from configs import quickstart_action, quickstart_video
from data_pipelines.settings import differences
from launch.preflight import find_rendering_backend, require
from mvjax.evaluation.report import build_report, write_environment
from mvjax.evaluation.rollout import read_results

# Running a list of commands one after another, measured, and continued where they stopped.


SAMPLE_SECONDS = 0.5


@dataclass(frozen=True)
class Phase:
    """A step of a run: a name for people, and the command a person would type for it.

    A phase must be able to go on where an earlier, killed call of it stopped.

    Attributes:
        name: unique among the phases.
        command: the words of the command.
        proof: a file that only a completed call leaves, for commands that end with code 0 when
            they are interrupted, too; "" where code 0 says enough.
    """

    name: str
    command: tuple[str, ...]
    proof: str = ""


def python(module: str, *arguments: str) -> tuple[str, ...]:
    """The command that runs a module with this interpreter."""
    return (sys.executable, "-m", module, *arguments)


def run_phases(phases: Sequence[Phase], record: Path) -> None:
    """Runs every phase that is not recorded as finished with the same command.

    Args:
        phases: in order; the first failure ends the run.
        record: JSON list of {"name", "command", "seconds", "peak_mb", "finished"}; seconds add up
            over interrupted calls, peak_mb is the resident memory of the phase's whole process
            tree.

    Raises:
        SystemExit: with the code of a phase that failed, or 130 after Ctrl-C, 143 after SIGTERM.
    """
    with _noted_signals() as signals:
        _run(phases, record, signals)


def _run(phases: Sequence[Phase], record: Path, signals: list[int]) -> None:
    rows = {row["name"]: row for row in json.loads(record.read_text())} if record.exists() else {}
    for number, phase in enumerate(phases, start=1):
        command = ["python", *phase.command[1:]]
        row = rows.get(phase.name)
        title = f"[{number}/{len(phases)}] {phase.name}"
        if row and row["command"] == command and row["finished"]:
            print(f"{title}: done before ({row['seconds']:.0f} s)", flush=True)
            continue
        if not row or row["command"] != command:
            row = {"name": phase.name, "command": command, "seconds": 0.0, "peak_mb": 0}
        print(f"{title}\n    {shlex.join(command)}", flush=True)
        code, seconds, peak = _measure(phase.command, signals)
        row["seconds"] = round(row["seconds"] + seconds, 1)
        row["peak_mb"] = max(row["peak_mb"], peak)
        if code == 0 and not signals and phase.proof and not Path(phase.proof).exists():
            signals.append(signal.SIGTERM)  # the command had it, and saved what it had reached
        row["finished"] = code == 0 and not signals
        rows[phase.name] = row
        partial = record.with_name(record.name + ".partial")
        partial.write_text(json.dumps([rows[p.name] for p in phases if p.name in rows], indent=1))
        partial.replace(record)
        if code != 0 or signals:
            print(f"'{phase.name}' stopped; run the same command again to go on.", file=sys.stderr)
            raise SystemExit(128 + signals[0] if signals else code)


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Inside the block, Ctrl-C and SIGTERM do nothing but enter the list."""
    noted: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: noted.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _measure(command: Sequence[str], signals: Sequence[int]) -> tuple[int, float, int]:
    """Runs a command; its exit code, seconds, and peak memory in MB.

    A terminal sends Ctrl-C to the child as well, which saves and ends; SIGTERM comes alone and is
    handed on, or the child would go on by itself and meet the next call in the same folder.
    """
    start = time.monotonic()
    child = subprocess.Popen(command)
    peak, handed_on = 0, False
    while child.poll() is None:
        peak = max(peak, _memory_mb(child.pid))
        if signal.SIGTERM in signals and not handed_on:
            child.terminate()
            handed_on = True
        with suppress(subprocess.TimeoutExpired):
            child.wait(SAMPLE_SECONDS)
    code = child.returncode
    code = 128 - code if code < 0 else code  # as a shell says it: 137 for a killed process
    return code, time.monotonic() - start, peak


def _memory_mb(pid: int) -> int:
    """Resident memory of a process and everything it started."""
    total = 0
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with suppress(psutil.Error):  # it ended just now
                total += one.memory_info().rss
    return total // 2**20


# The sample-efficiency study: few action demonstrations, backbone trained on video or not.
#
# For every number of action demonstrations per task and every seed, the same decoder is trained
# with the same budget on two backbones: one that stage 1 trained on all video, for longer than
# the quickstart's, and an untrained one. The seed decides the decoder's start, the order of the
# batches, the choice of demonstrations and the untrained backbone. Only `launch.quickstart
# --study` runs this.


BACKBONES = {"trained": "backbone trained on video", "untrained": "untrained backbone"}


def study_phases(
    run_dir: str, config: Any, video: tuple[str, ...], action: tuple[str, ...]
) -> list[Phase]:
    """Stage 1, then a training and an evaluation per backbone, number of demonstrations and seed.

    Args:
        run_dir: the quickstart's folder; results go to `study/` in it.
        config: `study {video_steps, demonstrations, seeds, steps, episodes_per_task}`.
        video, action: the flags that name the configuration of each stage and the run folder.
    """
    checkpoints = {"trained": f"{run_dir}/study/video", "untrained": ""}
    train = python(
        "launch.train",
        *video,
        *_steps(config.study.video_steps),
        f"--workdir={checkpoints['trained']}",
    )
    phases = [Phase("study: train the backbone", train, f"{checkpoints['trained']}/finished")]
    for backbone, demonstrations, seed in _cells(config):
        folder = _folder(run_dir, backbone, demonstrations, seed)
        flags = [
            *action,
            *_steps(config.study.steps),
            f"--config.backbone.checkpoint={checkpoints[backbone]}",
            f"--config.training.seed={seed}",
            f"--config.training.episodes_per_task={demonstrations}",
            f"--config.evaluation.episodes_per_task={config.study.episodes_per_task}",
        ]
        name = f"{BACKBONES[backbone]}, {demonstrations} demonstrations per task, seed {seed}"
        train = python("launch.train", *flags, f"--workdir={folder}")
        evaluate = python("launch.evaluate", *flags, f"--checkpoint={folder}", f"--out={folder}")
        phases += [
            Phase(f"study: train, {name}", train, f"{folder}/finished"),
            Phase(f"study: play, {name}", evaluate),
        ]
    return phases


def collect_study(run_dir: str, config: Any) -> None:
    """Writes `study/results.json`: successes of all seeds together, per backbone and number."""
    totals: dict[tuple[str, int], list[bool]] = {}
    for backbone, demonstrations, seed in _cells(config):
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
    (Path(run_dir) / "study" / "results.json").write_text(json.dumps(rows, indent=1) + "\n")


def _steps(number: int) -> tuple[str, str]:
    return f"--config.training.steps={number}", f"--config.optimizer.decay_steps={number}"


def _cells(config: Any) -> list[tuple[str, int, int]]:
    return [
        (backbone, demonstrations, seed)
        for seed in range(config.study.seeds)
        for demonstrations in config.study.demonstrations
        for backbone in BACKBONES
    ]


def _folder(run_dir: str, backbone: str, demonstrations: int, seed: int) -> str:
    return f"{run_dir}/study/{backbone}_{demonstrations}_seed{seed}"


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
            "mvjax.evaluation.record",
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
