"""Measures everything of interest on one GPU in eight minutes: `bash launch/benchmarks/gpu.sh`.

    bash launch/benchmarks/gpu.sh --wheels=wheels --out=gpu.json       # on a machine with one GPU
    bash launch/benchmarks/gpu.sh --rehearse                           # tiny networks, on any CPU
    python -m launch.benchmarks.gpu --table=gpu.json                   # print the tables again

Each part runs in its own process (`launch.benchmarks.gpu_parts`), so that a part that fails, aborts
or hangs is a result, and so that JAX and PyTorch never share the GPU. After every part the JSON
file is written, and beside it Markdown tables for docs/performance.md. The parts are in order of
importance. A part for which no time is left is skipped; `--parts=` measures it alone.
"""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from absl import flags

from data_pipelines.atomic import write_json, write_text
from launch.entry import run


class Part(NamedTuple):
    """What is known of a part before it runs.

    Attributes:
        title: For the tables.
        expected, at_most: Seconds on an H200, guessed before one was at hand. A part is not started
            with less than half of `expected` left.
        packages: What it imports beside JAX.
        needs: A part that must have succeeded.
    """

    title: str
    expected: float
    at_most: float
    packages: tuple[str, ...] = ()
    needs: str = ""


TORCH, SIMULATOR = ("torch", "diffusers"), ("mujoco", "metaworld", "OpenGL")
PARTS = {
    "compile": Part("attention; compiling", 85, 200),
    "video_lora": Part("stage 1, LoRA", 25, 120),
    "video_full": Part("stage 1, all parameters", 28, 120),
    "video_torch": Part("stage 1, PyTorch", 60, 120, TORCH),
    "action": Part("stage 2", 22, 90),
    "policy": Part("queries", 45, 120),
    "rendering": Part("EGL beside JAX", 25, 50, SIMULATOR),
    "checkpoints": Part("a random 2B is written", 20, 60),
    "load_policy": Part("loading as a policy", 12, 40, needs="checkpoints"),
    "load_stage_1": Part("loading for stage 1", 14, 40, needs="checkpoints"),
    "action_torch": Part("stage 2, PyTorch", 60, 110, TORCH),
    "policy_torch": Part("queries, PyTorch", 50, 110, TORCH),
}

REHEARSE = flags.DEFINE_bool("rehearse", False, "Use tiny networks on the CPU, to try everything.")
ONLY = flags.DEFINE_list("parts", [], f"Only these, of {', '.join(PARTS)}; all by default.")
OUT = flags.DEFINE_string("out", "gpu.json", "JSON file; tables go to the same name with .md.")
SECONDS = flags.DEFINE_float(
    "seconds", 465, "Stop everything after this many seconds.", lower_bound=1
)
SPENT = flags.DEFINE_float(
    "spent", 0, "How many of these seconds were spent before.", lower_bound=0
)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "", "Stage-1 directory of a 2B whose loading is measured; random if ''."
)
TABLE = flags.DEFINE_string("table", "", "Only print the tables of this JSON file.")

PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "torch",
    "triton",
    "diffusers",
    "mujoco",
    "metaworld",
)


def main() -> int:
    """Measures, and prints tables; the exit code is 1 where a part failed."""
    if TABLE.value:
        print(tables(json.loads(Path(TABLE.value).read_text())))
        return 0
    unknown = [name for name in ONLY.value if name not in PARTS]
    if unknown:
        raise ValueError(f"--parts has {', '.join(unknown)}; the parts are {', '.join(PARTS)}.")
    if not (REHEARSE.value or shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists()):
        raise ValueError("there is no NVIDIA GPU here; --rehearse runs on the CPU.")
    chosen, out = [name for name in PARTS if name in (ONLY.value or PARTS)], Path(OUT.value)
    began = time.monotonic() - SPENT.value
    end = began + SECONDS.value * _patience()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the part that runs is ended, too
    content: dict[str, Any] = {
        "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rehearsal": REHEARSE.value,
        "machine": _machine(),
        "parts": {name: {"state": "not yet"} for name in chosen},
    }
    with tempfile.TemporaryDirectory(prefix="mvjax_gpu_") as folder:
        for name in chosen:
            content["parts"][name] = measure(name, content["parts"], Path(folder), end)
            content["seconds"] = round(time.monotonic() - began, 1)
            write_json(out, content)
            write_text(out.with_suffix(".md"), tables(content))
            print(_line(name, content["parts"][name]), file=sys.stderr, flush=True)
    print(tables(content))
    return int(any(part["state"] in ("failed", "too slow") for part in content["parts"].values()))


# --- One part ---


def measure(name: str, done: Mapping[str, Any], folder: Path, end: float) -> dict[str, Any]:
    """Runs a part in a process of its own.

    Args:
        name: Of `PARTS`.
        done: The parts so far.
        folder: For its files, and what it shares with other parts.
        end: When it must have ended, by `time.monotonic`.

    Returns:
        state ("done", "failed", "too slow" or "skipped"), why, seconds, and what it has found,
        also where it did not come to its end.
    """
    part, left = PARTS[name], end - time.monotonic()
    missing = [package for package in part.packages if not importlib.util.find_spec(package)]
    if missing:
        return {"state": "skipped", "why": f"not installed: {', '.join(missing)}"}
    if part.needs and done.get(part.needs, {}).get("state") != "done":
        return {"state": "skipped", "why": f"needs the part {part.needs}"}
    if left < part.expected / 2:
        return {"state": "skipped", "why": f"time: {max(left, 0):.0f} s were left"}
    limit, start = min(left, part.at_most * _patience()), time.monotonic()
    out, log = folder / f"{name}.json", folder / f"{name}.log"
    words = [f"--part={name}", f"--out={out}", f"--folder={folder}"]
    words += [f"--checkpoint={CHECKPOINT.value}"] if CHECKPOINT.value else []
    words += ["--rehearse", "--steps=1", "--rounds=1"] if REHEARSE.value else []
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.benchmarks.gpu_parts", *words],
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            env=os.environ | _environment(name, folder),
            start_new_session=True,  # so that whatever it starts ends with it
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found: dict[str, Any] = {"state": "done", "seconds": round(time.monotonic() - start, 1)}
    if code is None:
        found |= {"state": "too slow", "why": f"ended after {limit:.0f} s"}
    elif code:
        found |= {"state": "failed", "why": _ending(code, log), "log": _tail(log)}
    if out.exists():
        found["found"] = json.loads(out.read_text())
    return found


def _patience() -> int:
    """A rehearsal may be on a slow or busy machine; it is the GPU that is lent for minutes."""
    return 5 if REHEARSE.value else 1


def _environment(name: str, folder: Path) -> dict[str, str]:
    """What a part finds in its environment, beside what is there."""
    changes = {
        "MVJAX_TRACEBACK": "1",
        "MUJOCO_GL": "egl",
        "PYTHONUNBUFFERED": "1",
        # What is compiled in the first part, the others find.
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    if REHEARSE.value:
        changes |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        changes |= {"CUDA_VISIBLE_DEVICES": ""}
    if "torch" in name:  # JAX only counts shapes there
        changes |= {"JAX_PLATFORMS": "cpu", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        changes |= {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    return changes


def _ending(code: int, log: Path) -> str:
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    lines = [line for line in _tail(log).splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"exit code {code}"


def _tail(log: Path, size: int = 4000) -> str:
    return log.read_text(errors="replace")[-size:]


def _line(name: str, part: Mapping[str, Any]) -> str:
    seconds = f" in {part['seconds']:.0f} s" if "seconds" in part else ""
    return f"{name}: {part['state']}{seconds}" + (f" ({part['why']})" if "why" in part else "")


def _machine() -> dict[str, Any]:
    """The GPU by nvidia-smi, the CPU, and the packages' versions."""
    machine: dict[str, Any] = {"cores": os.cpu_count(), "python": platform.python_version()}
    with suppress(OSError, subprocess.SubprocessError):
        asked = "--query-gpu=name,memory.total,driver_version,clocks.max.sm"
        words = ["nvidia-smi", asked, "--format=csv,noheader"]
        machine["gpu"] = subprocess.check_output(words, text=True, timeout=20).strip()
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            machine.setdefault("versions", {})[package] = importlib.metadata.version(package)
    if "XLA_FLAGS" in os.environ:
        machine["xla_flags"] = os.environ["XLA_FLAGS"]
    return machine


# --- The tables, from the JSON file alone ---


def tables(content: Mapping[str, Any]) -> str:
    """Markdown for docs/performance.md: steps, queries, the rest, and what was not measured."""
    machine, parts = content["machine"], content["parts"]
    found = {name: part["found"] for name, part in parts.items() if part.get("found")}
    versions = ", ".join(f"{k} {v}" for k, v in machine.get("versions", {}).items())
    what = machine.get("gpu") or "CPU"
    kind = " A rehearsal with tiny networks: the figures mean nothing." * content["rehearsal"]
    sections = [f"{what}, {content['began'][:10]}, Python {machine['python']}, {versions}.{kind}"]
    sections += filter(None, (_steps(found), _queries(found), _others(found)))
    failed = {name: part for name, part in parts.items() if part["state"] != "done"}
    if failed:
        sections.append("\n".join(f"- {_line(name, part)}" for name, part in failed.items()))
    return "\n\n".join(sections) + "\n"


def _steps(found: Mapping[str, Any]) -> str:
    # PyTorch always trains the whole network.
    against = {"video_lora": "video_torch", "video_full": "video_torch", "action": "action_torch"}
    rows = []
    for name in ("video_lora", "video_full", "video_torch", "action", "action_torch"):
        one = found.get(name, {})
        if "seconds_per_step" not in one:
            continue
        seconds = median(one["seconds_per_step"])
        theirs = found.get(against.get(name, ""), {}).get("seconds_per_step")
        memory = [_gb(one.get("peak_mb")), _gb(one.get("planned_mb"))]
        recomputed = ", blocks recomputed" * bool(one.get("recomputes"))
        rows.append(
            [
                PARTS[name].title + recomputed,
                f"{seconds:.4g} s",
                f"{one['samples_per_second']:.3g}",
                f"{one['mfu']:.1%}" if one.get("mfu") else "",
                *memory,
                f"{median(theirs) / seconds:.2f}" if theirs else "",
            ]
        )
    head = ["step of one clip", "time", "clips/s", "MFU", "peak memory", "planned by XLA"]
    return _markdown([*head, "times as fast as PyTorch, all parameters"], rows)


def _queries(found: Mapping[str, Any]) -> str:
    answers = {
        (name, batch["size"]): answer
        for name in ("policy", "policy_torch")
        for batch in found.get(name, {}).get("batches", [])
        for answer in batch["answers"]
    }
    columns, rows = [], []
    for (name, size), one in answers.items():
        columns, whole, theirs = [*one["parts"]], one["parts"]["query"], ("policy_torch", size)
        ratio = ""
        if name == "policy" and theirs in answers:
            ratio = f"{answers[theirs]['parts']['query']['p50'] / whole['p50']:.2f}"
        rows.append(
            [
                f"{one['name']}, {size} at a time",
                *(f"{part['p50']:.3g} / {part['p95']:.3g}" for part in one["parts"].values()),
                f"{one['queries_per_second']:.3g}",
                f"{whole['mfu']:.1%}" if whole.get("mfu") else "",
                ratio,
            ]
        )
    head = ["p50 / p95 in ms", *columns, "queries/s", "MFU", "times as fast as PyTorch"]
    return _markdown(head, rows)


def _others(found: Mapping[str, Any]) -> str:
    rows = []
    attention = found.get("compile", {}).get("attention")
    if attention:
        times = ", ".join(
            f"PyTorch's {name} {ms:.3g} ms"
            for name, ms in found.get("video_torch", {}).get("attention_ms", {}).items()
        )
        error = max(value for key, value in attention.items() if key.startswith("error"))
        rows.append(
            [
                "self-attention of one clip, forward and backward",
                f"{attention['forward_backward_ms']:.3g} ms (forward "
                f"{attention['forward_ms']:.3g} ms)" + f"; {times}" * bool(times),
            ]
        )
        rows.append(["its largest relative error against float32", f"{error:.1e}"])
    for name, seconds in found.get("compile", {}).get("compile_seconds", {}).items():
        title = PARTS[name].title if name in PARTS else name
        rows.append([f"compiling {title}, beside the others", f"{seconds:.0f} s"])
    rendering = found.get("rendering", {})
    for name in ("alone", "two_processes", "one_process"):
        if name in rendering:
            rows.append([f"EGL, {name.replace('_', ' ')}", _pictures(rendering, name)])
    for name in ("load_policy", "load_stage_1"):
        if name in found:
            one = found[name]
            sizes = [f"{_gb(one.get('device_peak_mb'))} on the GPU at most"]
            sizes += [
                f"{_gb(one.get('device_after_mb'))} after",
                f"{_gb(one['host_peak_mb'])} host",
            ]
            what = f"{PARTS[name].title} ({_gb(one['checkpoint_mb'])} on the disk)"
            sizes = [size for size in sizes if not size.startswith(" ")]
            rows.append([what, f"{one['seconds']:.1f} s, {', '.join(sizes)}"])
    return _markdown(["what", "measured"], rows)


def _pictures(rendering: Mapping[str, Any], name: str) -> str:
    one = rendering[name]
    if one["exit_code"] or "pictures_per_second" not in one:
        return f"ended with exit code {one['exit_code']}"
    words = f"{one['pictures_per_second']:.0f} pictures/s by {one['gl_renderer']}"
    before, now = rendering.get("jax_alone_per_second"), one.get("jax_per_second")
    return words + (f"; JAX at {now / before:.0%} of its speed" if before and now else "")


def _gb(mb: float | None) -> str:
    return "" if mb is None else f"{mb / 1024:.3g} GB"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    run(main)
