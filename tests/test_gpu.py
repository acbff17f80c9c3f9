"""The day with a GPU, rehearsed: parts are measured and kept whatever happens to them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.benchmarks import gpu

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "benchmarks" / "gpu.sh"


@pytest.fixture(scope="module")
def rehearsed(command, tmp_path_factory):
    """The content of the JSON file, the file, and what was printed."""
    out = tmp_path_factory.mktemp("gpu") / "day.json"
    parts = "video_lora,checkpoints,load_stage_1"
    said = command(
        "launch.benchmarks.gpu", "--rehearse", f"--parts={parts}", f"--out={out}", "--spent=1"
    )
    assert said.code == 0, said
    return json.loads(out.read_text()), out, said


def test_every_part_is_done_and_kept(rehearsed):
    content, _, said = rehearsed
    assert content["rehearsal"] and content["seconds"] > 1
    assert {name: part["state"] for name, part in content["parts"].items()} == {
        "video_lora": "done",
        "checkpoints": "done",
        "load_stage_1": "done",
    }
    step = content["parts"]["video_lora"]["found"]
    assert len(step["seconds_per_step"]) == 1 and step["samples_per_second"] > 0
    memory = content["parts"]["load_stage_1"]["found"]
    assert memory["host_peak_mb"] >= memory["host_before_mb"] > memory["checkpoint_mb"] > 0
    assert "video_lora: done in" in said.err


def test_the_tables_are_printed_written_and_printed_again(rehearsed, command):
    _, out, said = rehearsed
    tables = out.with_suffix(".md").read_text()
    assert tables.strip() == said.out.strip()
    assert "| stage 1, LoRA |" in tables and "the figures mean nothing" in tables
    assert command("launch.benchmarks.gpu", f"--table={out}").out.strip() == tables.strip()


def test_pytorch_is_measured_alone(command, tmp_path):
    pytest.importorskip("torch", reason="torch is not installed (requirements-torch.txt)")
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    out = tmp_path / "day.json"
    said = command("launch.benchmarks.gpu", "--rehearse", "--parts=video_torch", f"--out={out}")
    assert said.code == 0, said
    found = json.loads(out.read_text())["parts"]["video_torch"]["found"]
    assert found["seconds_per_step"][0] > 0 and "torch.compile" in found["compiler"]


def test_the_tables_of_a_whole_day():
    step = dict(samples_per_second=1.0, mfu=0.5, peak_mb=51200.0, planned_mb=40960.0)
    part = dict(p50=200.0, p95=210.0, cpu=1.0, tflop=1.0, mfu=0.4, count=9)
    parts = dict.fromkeys(["prepare", "query"], part)
    slower = dict.fromkeys(["prepare", "query"], part | {"p50": 300.0})
    picture = dict(exit_code=0, pictures_per_second=400.0, gl_renderer="NVIDIA")
    answers = lambda name, parts: dict(  # noqa: E731
        batches=[
            dict(size=1, answers=[dict(name=name, parts=parts, queries_per_second=5.0, actions=0)])
        ]
    )
    found = {
        "video_full": step | {"seconds_per_step": [1.1, 1.0, 0.9]},
        "video_torch": step | {"seconds_per_step": [1.5], "recomputes": True},
        "policy": answers("mvjax", parts),
        "policy_torch": answers("PyTorch", slower),
        "rendering": {
            "alone": picture,
            "jax_alone_per_second": 10.0,
            "two_processes": picture | {"jax_per_second": 9.0},
            "one_process": {"exit_code": -6},
        },
    }
    content = {
        "began": "2030-01-02T03:04:05+00:00",
        "rehearsal": False,
        "machine": {"python": "3.12.3", "gpu": "NVIDIA H200", "versions": {"jax": "0.11.2"}},
        "parts": {name: {"state": "done", "found": one} for name, one in found.items()}
        | {"load_policy": {"state": "skipped", "why": "time: 3 s were left"}},
    }
    tables = gpu.tables(content)
    assert tables.startswith("NVIDIA H200, 2030-01-02, Python 3.12.3, jax 0.11.2.\n")
    rows = tables.splitlines()
    assert "| stage 1, all parameters | 1 s | 1 | 50.0% | 50 GB | 40 GB | 1.50 |" in rows
    assert any("PyTorch, blocks recomputed | 1.5 s" in row for row in rows)
    assert "| mvjax, 1 at a time | 200 / 210 | 200 / 210 | 5 | 40.0% | 1.50 |" in rows
    assert "| EGL, two processes | 400 pictures/s by NVIDIA; JAX at 90% of its speed |" in rows
    assert "| EGL, one process | ended with exit code -6 |" in rows
    assert "- load_policy: skipped (time: 3 s were left)" in rows


def run_part(name, code, tmp_path, monkeypatch, seconds=60.0, done=None):
    """Measures a part whose process runs `code` instead, with `out` as its JSON file."""
    popen = subprocess.Popen

    def start(words, **how):
        out = words[4].removeprefix("--out=")
        return popen([sys.executable, "-c", f"out = {out!r}\n{code}"], **how)

    monkeypatch.setattr(gpu.subprocess, "Popen", start)
    monkeypatch.setattr(gpu, "REHEARSE", type("Flag", (), {"value": False}))
    monkeypatch.setattr(gpu, "CHECKPOINT", type("Flag", (), {"value": ""}))
    return gpu.measure(name, done or {}, tmp_path, time.monotonic() + seconds)


def test_an_abort_is_a_result(tmp_path, monkeypatch):
    code = "import os; open(out, 'w').write('{\"alone\": 1}'); os.abort()"
    part = run_part("video_lora", code, tmp_path, monkeypatch)
    assert part["state"] == "failed" and part["why"] == "ended by SIGABRT"
    assert part["found"] == {"alone": 1}


def test_an_error_is_named_and_its_log_is_kept(tmp_path, monkeypatch):
    part = run_part("video_lora", "raise ValueError('no such thing')", tmp_path, monkeypatch)
    assert part["why"] == "ValueError: no such thing" and "Traceback" in part["log"]


def test_a_part_that_hangs_is_ended_with_what_it_has_found(tmp_path, monkeypatch):
    slow = gpu.PARTS["video_lora"]._replace(at_most=2.0)
    monkeypatch.setitem(gpu.PARTS, "video_lora", slow)
    code = "import time; open(out, 'w').write('{\"planned_mb\": 2}'); time.sleep(60)"
    part = run_part("video_lora", code, tmp_path, monkeypatch)
    assert part["state"] == "too slow" and part["found"] == {"planned_mb": 2}
    assert part["seconds"] < 20


def test_parts_without_time_or_what_they_need_are_skipped(tmp_path, monkeypatch):
    part = run_part("video_lora", "", tmp_path, monkeypatch, seconds=5.0)
    assert part == {"state": "skipped", "why": "time: 5 s were left"}
    failed = {"checkpoints": {"state": "failed"}}
    part = run_part("load_policy", "", tmp_path, monkeypatch, done=failed)
    assert part == {"state": "skipped", "why": "needs the part checkpoints"}
    part = gpu.PARTS["video_torch"]._replace(packages=("no_such_package",))
    monkeypatch.setitem(gpu.PARTS, "video_torch", part)
    part = run_part("video_torch", "", tmp_path, monkeypatch)
    assert part == {"state": "skipped", "why": "not installed: no_such_package"}


def test_the_parts_fit_eight_minutes_and_exist(command):
    assert sum(part.expected for part in gpu.PARTS.values()) < gpu.SECONDS.default < 480
    assert {part.needs for part in gpu.PARTS.values()} - {""} < gpu.PARTS.keys()
    said = command("launch.benchmarks.gpu_parts", "--part=none", "--out=x", "--folder=x")
    assert said.code == 2 and all(f" {name}," in said.err for name in gpu.PARTS)


def test_mistakes_are_one_sentence(complains, monkeypatch):
    complains("--parts has polcy", "launch.benchmarks.gpu", "--rehearse", "--parts=polcy")
    monkeypatch.setenv("PATH", "")
    if not Path("/dev/nvidia0").exists():
        complains("there is no NVIDIA GPU here", "launch.benchmarks.gpu")


def bash(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env=os.environ | {"PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_script_passes_flags_on_and_its_code_back(rehearsed, tmp_path):
    result = bash(f"--table={rehearsed[1]}")
    assert result.returncode == 0 and "| stage 1, LoRA |" in result.stdout
    result = bash("--rehearse", "--parts=polcy")
    assert result.returncode == 2 and "--parts has polcy" in result.stderr


def test_wheels_must_be_there(tmp_path):
    result = bash(f"--wheels={tmp_path}", "--rehearse")
    assert result.returncode != 0 and f"there are no wheels in {tmp_path}" in result.stderr
    assert bash("--wheels", str(tmp_path)).returncode == 2
