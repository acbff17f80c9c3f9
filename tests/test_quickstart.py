"""The quickstart's smoke size from start to report, once straight and once killed four times.

Both runs go on at the same time, on the CPU, with XLA's optimisations left out. They have two
cameras; tests/docs_commands.py runs the one of a single camera.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from run_records import without_times
from tiny_stages import quick_compiles

from configs import quickstart_action
from data_pipelines.video import VideoFile
from launch.preflight import find_rendering_backend
from launch.quickstart import check_settings, phases, stage_settings
from mvjax.evaluation.rollout import read_results
from mvjax.experiment import Experiment
from mvjax.identity import read_identity
from mvjax.policy.load import load_policy
from mvjax.policy.observation import Observation
from mvjax.serving.client import Client, QueryRefused
from mvjax.training.directory import abstract_params, read_meta
from mvjax.training.metrics import read_records

pytestmark = pytest.mark.timeout(900)
pytest.importorskip("metaworld", reason="the simulator is not installed")

ROOT = Path(__file__).parents[1]
SMOKE, RECIPE = ("--size=smoke", "--cameras=observed"), "smoke,observed"
CORNER = "observation.images.corner"
ROLES = {CORNER: "corner", "observation.images.gripper": "gripper"}


class Commands:
    """Runs modules with one environment; every call has a process group and a log of its own."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self._environment = folder, environment
        self.processes: list[subprocess.Popen] = []

    def start(self, *words: str) -> tuple[subprocess.Popen, Path]:
        log = self.folder / f"call_{len(self.processes) + 1}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *words],
                cwd=ROOT,
                env=self._environment,
                stdout=output,
                stderr=output,
                process_group=0,
            )
        self.processes.append(process)
        return process, log

    def quickstart(self, run_dir: Path) -> tuple[subprocess.Popen, Path]:
        return self.start("launch.quickstart", *SMOKE, f"--run-dir={run_dir}")

    def run(self, *words: str) -> str:
        process, log = self.start(*words)
        code = process.wait()
        assert code == 0, log.read_text()
        return log.read_text()


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> Iterator[Commands]:
    folder = tmp_path_factory.mktemp("quickstart")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        # Both runs, and every restart, compile the same programs.
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    if sys.platform == "linux":
        backend = find_rendering_backend()
        if backend is None:
            pytest.skip("this machine cannot render")
        environment["MUJOCO_GL"] = backend
    commands = Commands(folder, environment)
    yield commands
    for process in commands.processes:  # only after a failure
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def interrupt(commands: Commands, run_dir: Path, phase: str, how: int, rng: random.Random) -> int:
    """Starts or continues a run and ends it at a random moment of a phase; the exit code."""
    process, log = commands.quickstart(run_dir)

    def wait(until) -> None:
        while not until():
            assert process.poll() is None, log.read_text()
            time.sleep(0.002)

    wait(lambda: f"] {phase}\n" in log.read_text())
    if phase.startswith("stage"):
        step = rng.randrange(1, 8)
        workdir = run_dir / ("video" if "video" in phase else "action")
        wait(lambda: any(r["step"] >= step for r in read_records(workdir)))
        time.sleep(rng.uniform(0, 0.2))
    else:
        time.sleep(rng.uniform(0, 8))
    os.killpg(process.pid, how)
    return process.wait()


@pytest.fixture(scope="module")
def runs(commands) -> tuple[Path, Path]:
    """The folders of a run that nothing disturbed and of one that was stopped four times."""
    straight, stopped = commands.folder / "straight", commands.folder / "stopped"
    undisturbed, log = commands.quickstart(straight)
    rng = random.Random(2048)
    preparing = ("record robot demonstrations", "record video without actions", "encode")
    playing = ("evaluate the policy", "evaluate the baselines", "sweep the stop step")
    for phase, how, code in (
        (rng.choice(preparing), signal.SIGKILL, -signal.SIGKILL),
        ("stage 1: video model", signal.SIGKILL, -signal.SIGKILL),
        ("stage 2: action decoder", signal.SIGKILL, -signal.SIGKILL),
        (rng.choice(playing), signal.SIGINT, 130),
    ):
        assert interrupt(commands, stopped, phase, how, rng) == code
    commands.run("launch.quickstart", *SMOKE, f"--run-dir={stopped}")
    assert undisturbed.wait() == 0, log.read_text()
    return straight, stopped


def test_every_phase_finishes_and_the_report_is_one_file(runs):
    for run_dir in runs:
        rows = json.loads((run_dir / "phases.json").read_text())
        assert [row["name"] for row in rows] == [p.name for p in phases(str(run_dir), RECIPE)]
        assert all(row["finished"] and row["seconds"] > 0 for row in rows)
        assert all(row["peak_mb"] > 100 for row in rows)
        report = (run_dir / "report.html").read_text()
        assert len(report) > 100_000 and report.rstrip().endswith("</html>")
        assert report.count("data:video/mp4;base64,") >= 4 and "<script " not in report
        sources = re.findall(r"""(?:src|href|poster)=["']?([^"'\s>]{1,40})""", report)
        assert all(source.startswith(("data:", "#")) for source in sources)
        assert not re.findall(r"""url\(["']?http|@import|<link""", report)


def test_a_stopped_run_gives_the_losses_and_results_of_a_straight_one(runs):
    for stage in ("video", "action"):
        logs = []
        for run_dir in runs:
            records = read_records(run_dir / stage)
            logs.append(without_times(records))
        assert [record["step"] for record in logs[0]] == list(range(1, 9))
        assert logs[0] == logs[1], stage  # bit by bit
    folders = sorted(path.parent.name for path in runs[0].glob("evaluation/*/results.jsonl"))
    assert folders == ["expert", "none", "oracle_k8", "policy_k0", "policy_k10", "policy_k5"]
    for folder in folders:
        played = []
        for run_dir in runs:
            results = [
                asdict(r) for r in read_results(run_dir / "evaluation" / folder / "results.jsonl")
            ]
            for result in results:
                del result["plan_seconds"]
            played.append(sorted(results, key=lambda r: (r["task"], r["seed"])))
        assert played[0] == played[1], folder


def test_a_finished_run_does_nothing_new(commands, runs):
    run_dir = runs[0]
    kept = [p for p in run_dir.rglob("*") if p.is_file() and p.parent != run_dir]
    kept.append(run_dir / "phases.json")
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in kept}
    said = commands.run("launch.quickstart", *SMOKE, f"--run-dir={run_dir}")
    assert said.count(": done before (") == len(phases(str(run_dir), RECIPE))
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in before} == before
    assert "The report is " in said


def test_both_cameras_are_seen_in_the_evaluation_and_by_the_server(commands, runs):
    action = runs[0] / "action"
    for name in ("policy_k0", "oracle_k8"):
        folder = runs[0] / "evaluation" / name
        assert read_identity(folder)["what"]["cameras"]["shown"] == ROLES
        sizes = [VideoFile(video).size for video in folder.rglob("*.mp4")]
        assert sizes and all(width == 2 * height for height, width in sizes)
    address = f"--config.run_dir={runs[0]}", f"--checkpoint={action}", "--port=0"
    configuration = f"--config=quickstart_action:{RECIPE}", "--config.sampler.fresh_noise=False"
    server, log = commands.start("launch.serve", *configuration, *address)
    config = ConfigDict(read_meta(action)["config"])
    config.sampler.fresh_noise = False  # else the noise of a query follows from its number
    with quick_compiles():
        experiment = Experiment.from_config(config)
        policy = load_policy(experiment, action, experiment.sampling(), 1)
        rng = np.random.default_rng(0)
        frames = {camera: rng.integers(0, 256, (5, 64, 64, 3), np.uint8) for camera in ROLES}
        proprio = rng.normal(size=(1, 4)).astype(np.float32)
        (expected,) = policy.act([Observation(frames, proprio, "open the drawer")])
    try:
        while not (found := re.search(r"ws://\S+:(\d+)", log.read_text())):
            assert server.poll() is None, log.read_text()
            time.sleep(0.05)
        with Client(f"ws://127.0.0.1:{found[1]}") as client:
            keys = {name: camera["history"] for name, camera in client.metadata["cameras"].items()}
            message = {"observation/state": proprio[0], "prompt": "open the drawer"}
            both = message | {keys[camera]: frames[camera] for camera in ROLES}
            np.testing.assert_allclose(client.infer(both)["actions"], expected, atol=1e-5)
            with pytest.raises(QueryRefused, match="the camera 'observation\\.images\\.gripper'"):
                client.infer(message | {keys[CORNER]: frames[CORNER]})
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_a_run_whose_configuration_was_edited_is_refused(tmp_path, monkeypatch):
    for _ in range(2):
        check_settings(tmp_path / "run", stage_settings("smoke"))
    edited = quickstart_action.get_config("smoke")
    edited.optimizer.learning_rate = 0.5
    monkeypatch.setattr(quickstart_action, "get_config", lambda size: edited)
    words = "other settings: config.optimizer.learning_rate is 0.001 there, 0.5 here. Give"
    with pytest.raises(ValueError, match=words):
        check_settings(tmp_path / "run", stage_settings("smoke"))


@pytest.mark.parametrize("cameras", ["tiled", "observed"])
def test_two_cameras_are_asked_of_the_recording_and_of_every_configuration(cameras):
    one, two = (phases("runs/x", recipe) for recipe in ("smoke", f"smoke,{cameras}"))
    assert two[0].command == (*one[0].command, "--cameras=corner,gripper")
    assert two[1] == one[1]  # video without actions
    for before, after in zip(one[2:], two[2:]):
        words = [
            f"{word},{cameras}" if word.endswith(":smoke") else word for word in before.command
        ]
        assert list(after.command) == words != list(before.command)


def test_lora_trains_from_the_video_run_and_stage_2_reads_it(commands, runs):
    run_dir = runs[0]
    lora = commands.folder / "lora"
    shared = f"--config.run_dir={run_dir}", "--config.training.steps=2"
    video, action = (f"--config=configs/quickstart_{s}.py:{RECIPE}" for s in ("video", "action"))
    rank = "--config.lora.rank=4"
    said = commands.run(
        "launch.train",
        video,
        *shared,
        rank,
        f"--config.init_from={run_dir}/video",
        f"--workdir={lora}",
    )
    assert "has no LoRA adapters; new ones are added" in said
    assert "lora_a" in str(abstract_params(lora)) and read_records(lora)[-1]["step"] == 2
    on_lora = commands.folder / "on_lora"
    backbone = f"--config.backbone.checkpoint={lora}"
    commands.run("launch.train", action, *shared, backbone, f"--workdir={on_lora}")
    assert read_meta(on_lora)["config"]["backbone"]["checkpoint"] == str(lora)
    first = [read_records(folder)[0] for folder in (on_lora, run_dir / "action")]
    assert all(record["step"] == 1 for record in first)
    assert first[0]["loss"] != first[1]["loss"]  # the merged adapters and adaLN weights are read
