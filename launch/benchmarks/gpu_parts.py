"""One part of the measurements on a GPU, in its own process: `launch.benchmarks.gpu` starts it.

    python -m launch.benchmarks.gpu_parts --part=video_lora --out=lora.json --folder=day

A part writes its figures whenever there are new ones, so that nothing is lost when it is ended. A
process has either JAX or PyTorch on the GPU. Networks are untrained and data is noise. --rehearse
uses tiny networks on the CPU.
"""

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from configs import bridge_action, bridge_video, quickstart_action, quickstart_video
from data_pipelines.atomic import write_json
from data_pipelines.normalize import Normalizer
from data_pipelines.representations import Mode
from data_pipelines.statistics import compute_statistics
from launch.benchmarks.policy_speed import (
    compile_parts,
    measure,
    measure_policy,
    random_linear_tokenizer,
    random_observations,
    their_parts,
    untrained_policy,
)
from launch.benchmarks.training_speed import OurStep, compare, planned_mb
from launch.entry import path_flag, run
from mvjax.evaluation.suites.metaworld import MetaWorld
from mvjax.evaluation.suites.mujoco_camera import renderer
from mvjax.experiment import Experiment
from mvjax.identity import digest
from mvjax.models.attention import attend
from mvjax.models.flops import step_flops
from mvjax.models.network import Params
from mvjax.models.stand_ins import save_linear_tokenizer
from mvjax.parallel import chip
from mvjax.policy.load import load_policy
from mvjax.training.bridge import abstract_backbone, backbone_identity
from mvjax.training.checkpoint import Store, leaf_paths
from mvjax.training.directory import find_checkpoint
from mvjax.training.objectives import make_stage
from mvjax.training.resume import describe, first_state
from mvjax.training.step import TrainState, make_program

PART = flags.DEFINE_string("part", None, "What is measured, see PARTS.", required=True)
OUT = path_flag("out", "JSON file that receives the figures.")
FOLDER = path_flag("folder", "Folder for checkpoints, kept from one part to the next.")
REHEARSE = flags.DEFINE_bool("rehearse", False, "Tiny networks on the CPU.")
CHECKPOINT = flags.DEFINE_string("checkpoint", "", "A stage-1 directory of the 2B; random if ''.")
STEPS = flags.DEFINE_integer("steps", 4, "Training steps per turn.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns.", lower_bound=1)

BATCHES = (1, 8)  # queries at a time
WINDOW = 2.0  # seconds for which pictures are drawn
_FOUND: dict[str, Any] = {}
_WRITING = threading.Lock()


def report(**found: Any) -> None:
    """Adds to the figures of this part, and writes them."""
    with _WRITING:
        _FOUND.update(found)
        write_json(Path(OUT.value), _FOUND)


def make_experiment(stage: str, *, lora: bool = False) -> Experiment:
    """A stage at the released size, 19,200 tokens, or tiny; one clip per step, untrained."""
    if REHEARSE.value:
        configs = {"video": quickstart_video, "action": quickstart_action}
        config = configs[stage].get_config("smoke")
        config.clip.height = config.clip.width = 32
        config.video_model.update(width=48, num_blocks=2, num_heads=2, adaln_rank=4)
        config.decoder.update(width=32, num_blocks=2, num_heads=2, adaln_rank=4, time_rank=16)
        config.context_layer = 1
        config.lora.rank = 4
    else:
        config = {"video": bridge_video, "action": bridge_action}[stage].get_config()
    if not lora:
        config.lora.rank = 0
    config.training.batch_size = 1
    if stage == "action":
        config.backbone.checkpoint = ""
    return Experiment.from_config(config)


STEP_PARTS = {
    "video_lora": dict(stage="video", lora=True),
    "video_full": dict(stage="video"),
    "action": dict(stage="action"),
}


# --- Compiling: everything at once, for the parts that follow to find in JAX's cache ---


def compile_everything() -> None:
    """Attention alone, then every large program of JAX, side by side and without weights."""
    report(attention=_attention())
    seconds, planned = {}, {}

    def step(name: str) -> None:
        experiment, start = make_experiment(**STEP_PARTS[name]), time.perf_counter()
        program = make_program(experiment, experiment.mesh(), abstract_backbone).compile()
        seconds[name], planned[name] = time.perf_counter() - start, planned_mb(program)
        report(compile_seconds=dict(seconds), planned_mb=dict(planned))

    def query(size: int) -> None:
        name, start = f"query of {size}", time.perf_counter()
        policy = _abstract_policy(size)
        inputs = policy.inputs(random_observations(policy, size), with_future=False)
        programs = compile_parts(policy, inputs)
        seconds[name], planned[name] = time.perf_counter() - start, planned_mb(programs["query"])
        report(compile_seconds=dict(seconds), planned_mb=dict(planned))

    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(step, name) for name in STEP_PARTS]
        jobs += [pool.submit(query, size) for size in BATCHES]
    for job in jobs:
        job.result()


def _abstract_policy(size: int):
    experiment = make_experiment("action")
    sampling = experiment.sampling(fresh_noise=False, stop_step=0)
    return untrained_policy(experiment, sampling, size, abstract=True)


def _attention() -> dict[str, float]:
    """Self-attention of one clip: milliseconds, and the error against XLA's in float32."""
    model, tokens = make_experiment("video").video, make_experiment("video").clip.tokens
    shape = (1, tokens, model.num_heads, model.width // model.num_heads)
    keys = jax.random.split(jax.random.key(0), 4)
    dtype = jnp.float32 if REHEARSE.value else jnp.bfloat16

    @jax.jit
    def forward_backward(q, k, v, dy):
        y, pullback = jax.vjp(attend, q, k, v)
        return y, *pullback(dy)

    arrays = [jax.random.normal(key, shape, dtype) for key in keys]
    found = {
        "forward_ms": _milliseconds(jax.jit(attend), *arrays[:3]),
        "forward_backward_ms": _milliseconds(forward_backward, *arrays),
    }
    # Just above the length from which the platform's own kernel is taken.
    short = [x[:, : min(tokens, 1152)] for x in arrays]
    plain = jax.jit(lambda *args: jax.vjp(lambda q, k, v: attend(q, k, v, "xla"), *args[:3]))
    with jax.default_matmul_precision("highest"):
        wide = [x.astype(jnp.float32) for x in short]
        y, pullback = plain(*wide)
        expected = y, *pullback(wide[3])
    for name, a, b in zip(("y", "dq", "dk", "dv"), forward_backward(*short), expected):
        error = jnp.linalg.norm((a.astype(jnp.float32) - b).ravel()) / jnp.linalg.norm(b.ravel())
        found[f"error_{name}"] = float(error)
    return found


def _milliseconds(function: Callable[..., Any], *args: Any, count: int = 5) -> float:
    jax.block_until_ready(function(*args))
    start = time.perf_counter()
    for _ in range(count):
        result = function(*args)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / count * 1e3


# --- Training steps and queries, of JAX and of PyTorch ---


def our_step(name: str) -> None:
    """A training step."""
    step = OurStep(make_experiment(**STEP_PARTS[name]))
    report(prepare_seconds=step.prepare_seconds, planned_mb=step.planned_mb)
    (speed,) = compare([step], STEPS.value, ROUNDS.value)
    report(**asdict(speed))


def their_step(stage: str) -> None:
    """The same in PyTorch; in stage 1 always the whole network learns."""
    peak = _prepare_torch()
    from launch.benchmarks.torch_peer import TorchStep

    experiment = make_experiment(stage)
    flops = step_flops(experiment) * experiment.config.training.batch_size
    step = TorchStep(experiment, flops, compiled=True)
    report(prepare_seconds=step.prepare_seconds, recomputes=step.recomputes)
    (speed,) = compare([step], STEPS.value, ROUNDS.value, peak)
    report(**asdict(speed))


def our_policy() -> None:
    """Queries to the policy, by part."""
    batches = []
    for batch in measure_policy(
        make_experiment("action"), BATCHES, stop_step=0, rounds=ROUNDS.value, peer_of=None
    ):
        batches.append(batch.as_dict())
        report(batches=batches)


def their_policy() -> None:
    """The same queries in PyTorch, with random weights of the same sizes."""
    peak = _prepare_torch()
    from launch.benchmarks.torch_peer import TorchPolicy

    policy, batches = _abstract_policy(1), []
    peer = TorchPolicy(policy, compiled=True)
    for size in BATCHES:
        policy = replace(policy, batch_size=size)
        parts = their_parts(peer, random_observations(policy, size))
        (answer,) = measure({"PyTorch": parts}, policy, ROUNDS.value, peak)
        content = asdict(answer)
        del content["actions"]
        batches.append({"size": size, "answers": [content]})
        report(batches=batches)


def _prepare_torch() -> float | None:
    """The settings with which PyTorch is fastest; returns the GPU's peak."""
    import torch

    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.automatic_dynamic_shapes = False  # each batch size is compiled for itself
    gpu, compiler = torch.cuda.is_available(), "torch.compile, default mode, each block"
    if not gpu:  # traced as there, but a C++ compiler would take minutes
        compiler = "torch.compile, aot_eager, the whole network"
        torch.compile = partial(torch.compile, backend="aot_eager")
    report(torch=torch.__version__, compiler=compiler)
    if not gpu:
        return None
    from launch.benchmarks.torch_peer import choose_attention

    model, tokens = make_experiment("video").video, make_experiment("video").clip.tokens
    times = choose_attention(model.num_heads, tokens, model.width // model.num_heads)
    report(attention_ms=times)
    known = chip(torch.cuda.get_device_name())
    return known.peak_flops if known else None


# --- Memory of loading ---


def write_checkpoints() -> None:
    """A random backbone as stage 1 leaves it (or that of --checkpoint), and a decoder on it."""
    folder, start = Path(FOLDER.value), time.perf_counter()
    if not CHECKPOINT.value:
        video = make_experiment("video")
        _save(video, folder / "video", _random(video.video_network, video), {})
    action = _on_checkpoint(make_experiment("action"), "backbone.checkpoint")
    save_linear_tokenizer(folder / "tokenizer.npz", random_linear_tokenizer())
    extra = {"backbone": backbone_identity(action, find_checkpoint(_backbone()))}
    _save(action, folder / "action", _random(action.decoder_network, action), extra)
    io, rng = action.config.policy_io, np.random.default_rng(0)
    shapes = {"actions": (io.action.horizon, io.action.dim)}
    shapes["proprio"] = (io.proprio.horizon, io.proprio.dim)
    statistics = {k: compute_statistics(rng.normal(size=(8, *v))) for k, v in shapes.items()}
    modes = dict.fromkeys(statistics, Mode.VARIANCE)
    Normalizer(statistics, modes).save(folder / "action" / "normalizer.json")
    report(random=not CHECKPOINT.value, seconds=time.perf_counter() - start)


def load_as_policy() -> None:
    """`load_policy`: the backbone in bfloat16, the decoder in float32.

    The tokenizer is the linear one and texts are embedded by n-grams: the Wan VAE (0.3 GB) and the
    text encoder are not part of it.
    """
    changes = {"tokenizer": f"{FOLDER.value}/tokenizer.npz", "text_encoder": ""}
    experiment = _on_checkpoint(make_experiment("action"), "backbone.checkpoint", changes)
    with _Memory():
        policy = load_policy(experiment, Path(FOLDER.value) / "action", experiment.sampling(), 1)
        jax.block_until_ready(policy.weights)


def load_as_stage_1() -> None:
    """The first state of a LoRA run from the backbone: parameters in float32, new adapters."""
    experiment = _on_checkpoint(make_experiment("video", lora=True), "init_from")
    program = make_program(experiment, experiment.mesh())
    args = experiment, program.stage, program.optimizer, program.state
    workdir = Path(FOLDER.value) / "stage_1"
    with _Memory(), jax.set_mesh(program.mesh), Store(workdir, keep=1) as store:
        meta = describe(experiment, program.stage, {})
        jax.block_until_ready(first_state(*args, store, None, meta))


class _Memory:
    """Reports the seconds and the memory of what is done inside, when it is done."""

    def __enter__(self) -> None:
        jax.block_until_ready(jnp.zeros(()))  # starts the device
        self._start, self._before = time.perf_counter(), _host_mb()

    def __exit__(self, *exception: object) -> None:
        stats = jax.local_devices()[0].memory_stats() or {}
        device = {
            f"device_{name}_mb": stats[key] / 2**20
            for name, key in (("peak", "peak_bytes_in_use"), ("after", "bytes_in_use"))
            if key in stats
        }
        files = [f for f in Path(_backbone()).rglob("*") if f.is_file()]
        report(
            seconds=time.perf_counter() - self._start,
            checkpoint_mb=sum(f.stat().st_size for f in files) / 2**20,
            host_before_mb=self._before,
            host_peak_mb=_host_mb(),
            **device,
        )


def _host_mb() -> float:
    """The most memory this process has had, without what it has on the GPU."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**20


def _backbone() -> str:
    return CHECKPOINT.value or str(Path(FOLDER.value) / "video")


def _on_checkpoint(
    experiment: Experiment, setting: str, changes: dict[str, Any] | None = None
) -> Experiment:
    return experiment.changed({setting: _backbone(), **(changes or {})})


def _random(network: Any, experiment: Experiment) -> Params:
    with jax.set_mesh(experiment.mesh()):
        return jax.jit(network.init)(jax.random.key(0))


def _save(experiment: Experiment, workdir: Path, params: Params, extra: dict[str, Any]) -> None:
    stage = make_stage(experiment, experiment.mesh(), abstract_backbone)
    meta = describe(experiment, stage, {"digest": digest(leaf_paths(params)), **extra})
    with Store(workdir, keep=1) as store:
        store.save(0, TrainState(jnp.zeros((), jnp.int32), params, {}, {}), None, meta)


# --- Drawing pictures by EGL beside JAX on one card ---


def rendering() -> None:
    """Pictures alone, beside JAX in the same process, and beside JAX in another one."""
    for name, part in (("alone", "frames"), ("one_process", "frames_beside_jax")):
        process = _start(part)
        process.stdout.readline()  # it draws
        report(**{name: _end(process)})
    # Only now does this process take most of the GPU's memory, as JAX does.
    with _Busy() as busy:
        report(jax_alone_per_second=busy.rate(WINDOW))
        process = _start("frames")
        process.stdout.readline()
        rate = busy.rate(0.8 * WINDOW)
        report(two_processes=_end(process) | {"jax_per_second": rate})


def draw_frames() -> None:
    """Draws a Meta-World task at the size of the released clips for a while."""
    _draw()


def draw_frames_beside_jax() -> None:
    """The same while a thread of this process keeps JAX busy."""
    with _Busy() as busy:
        busy.rate(0.2)
        _draw(busy)


def _draw(busy: "_Busy | None" = None) -> None:
    size = (64, 64) if REHEARSE.value else (480, 640)
    simulator = MetaWorld("drawer-close-v3", *size)
    simulator.reset(0)
    simulator.render("corner")
    print("drawing", flush=True)
    before, start, count = busy.calls if busy else 0, time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < WINDOW:
        simulator.step(np.zeros(4, np.float32))
        spread = int(np.ptp(simulator.render("corner")))
        count += 1
    found = {"pictures_per_second": count / seconds, "picture_is_blank": spread == 0}
    if busy:
        found["jax_per_second"] = (busy.calls - before) / seconds
    report(**found, **renderer())
    simulator.close()


class _Busy:
    """A thread that keeps JAX busy with matrix products while it is entered."""

    def __enter__(self) -> "_Busy":
        size = 128 if REHEARSE.value else 8192
        self.calls, self._stop = 0, threading.Event()
        x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16) / size**0.5
        multiply = jax.jit(lambda x: jax.lax.fori_loop(0, 8, lambda _, y: x @ y, x))
        jax.block_until_ready(multiply(x))

        def work() -> None:
            while not self._stop.is_set():
                jax.block_until_ready(multiply(x))
                self.calls += 1

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def rate(self, seconds: float) -> float:
        """Calls per second, watched for a while."""
        before, start = self.calls, time.perf_counter()
        time.sleep(seconds)
        return (self.calls - before) / (time.perf_counter() - start)


def _start(part: str) -> subprocess.Popen:
    """Another process of this file; its errors go where ours go."""
    out = Path(OUT.value).with_suffix(f".{part}.json")
    out.unlink(missing_ok=True)
    words = [f"--part={part}", f"--out={out}", f"--folder={FOLDER.value}"]
    words += ["--rehearse"] if REHEARSE.value else []
    return subprocess.Popen(
        [sys.executable, "-m", "launch.benchmarks.gpu_parts", *words],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "MUJOCO_GL": "egl"},
    )


def _end(process: subprocess.Popen) -> dict[str, Any]:
    """What it found, and how it ended; -6 is an abort, -11 a segmentation fault."""
    process.communicate()
    part = process.args[3].removeprefix("--part=")
    found: dict[str, Any] = {}
    with suppress(OSError):
        found = json.loads(Path(OUT.value).with_suffix(f".{part}.json").read_text())
    return found | {"exit_code": process.returncode}


PARTS: dict[str, Callable[[], None]] = {
    "compile": compile_everything,
    **{name: lambda name=name: our_step(name) for name in STEP_PARTS},
    "video_torch": lambda: their_step("video"),
    "action_torch": lambda: their_step("action"),
    "policy": our_policy,
    "policy_torch": their_policy,
    "rendering": rendering,
    "checkpoints": write_checkpoints,
    "load_policy": load_as_policy,
    "load_stage_1": load_as_stage_1,
    "frames": draw_frames,
    "frames_beside_jax": draw_frames_beside_jax,
}


def main() -> None:
    """Measures the part that the flags name."""
    if PART.value not in PARTS:
        raise ValueError(f"--part must be one of {', '.join(PARTS)}; got {PART.value!r}.")
    PARTS[PART.value]()


if __name__ == "__main__":
    run(main)
