r"""Measures a training step on the devices of this machine, beside the same network in PyTorch.

    python -m launch.benchmarks.speed --config=configs/quickstart_video.py
    python -m launch.benchmarks.speed --config=configs/bridge_video.py \
        --config.training.batch_size=1
    python -m launch.benchmarks.speed --config=configs/bridge_video.py --data --minutes=10
    python -m launch.benchmarks.speed --config=configs/bridge_action.py --policy --batches=1,8

Data and checkpoints are not needed: the networks are untrained and the batch is noise. If torch and
diffusers are installed (requirements-torch.txt), PyTorch is measured too, in turns with JAX.
--data measures the data pipeline instead: records and videos of noise, in the sizes of the
configuration, beside a plain read of the same bytes and PyAV alone. --policy measures the latency
of a query, by part; on a GPU it leaves half of the memory to PyTorch.
"""

import importlib.util
import os
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median

import jax
from absl import flags

from data_pipelines.atomic import write_json
from launch.benchmarks import data
from launch.benchmarks.policy_speed import measure_policy, policy_table
from launch.benchmarks.training_speed import OurStep, Speed, compare
from launch.entry import config_flag, run
from mvjax.experiment import Experiment
from mvjax.training.memory import keep_freed_memory

CONFIG = config_flag()
STEPS = flags.DEFINE_integer("steps", 10, "Training steps per turn.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each implementation.", lower_bound=1)
TORCH = flags.DEFINE_bool("torch", True, "Measure PyTorch too, if it is installed.")
COMPILE = flags.DEFINE_bool("torch_compile", True, "Use torch.compile.")
DATA = flags.DEFINE_bool("data", False, "Measure the data pipeline instead of a step.")
MINUTES = flags.DEFINE_float(
    "minutes",
    1.0,
    "With --data: minutes for which the memory is watched; 0: not at all.",
    lower_bound=0,
)
RECORDS = flags.DEFINE_integer("records", 200, "With --data: records to read.", lower_bound=60)
ROWS = flags.DEFINE_integer(
    "rows",
    1_000_000,
    "With --data: action chunks for the statistics of the normalizer.",
    lower_bound=1,
)
POLICY = flags.DEFINE_bool("policy", False, "Measure queries to the policy instead of a step.")
BATCHES = flags.DEFINE_list("batches", ["1", "8", "64"], "With --policy: queries per batch.")
STOP_STEP = flags.DEFINE_integer(
    "stop_step", 0, "With --policy: denoising steps of the video before it is read."
)
OUT = flags.DEFINE_string("out", None, "JSON file to write the figures to.")


def main() -> None:
    """Prints a table."""
    if not (DATA.value or POLICY.value):
        keep_freed_memory()  # as the train command does; PyTorch shares it
    experiment = Experiment.from_config(CONFIG.value)
    if DATA.value:
        with tempfile.TemporaryDirectory() as folder:
            content = _measure_data(experiment, Path(folder))
    else:
        content = _measure_policy(experiment) if POLICY.value else _measure_steps(experiment)
        devices = {"device": jax.devices()[0].device_kind, "devices": jax.device_count()}
        print(f"{devices['devices']} x {devices['device']}, jax {jax.__version__}")
        content = devices | content
    if OUT.value:
        write_json(Path(OUT.value), content)


def _measure_steps(experiment: Experiment) -> dict:
    competitors = [OurStep(experiment)]
    if _with_torch():
        from launch.benchmarks.torch_peer import TorchStep

        competitors.append(TorchStep(experiment, competitors[0].flops, COMPILE.value))
    speeds = compare(competitors, STEPS.value, ROUNDS.value)
    for speed in speeds:
        print(_line(speed))
    if len(speeds) > 1:
        ours, theirs = (median(speed.seconds_per_step) for speed in speeds)
        print(f"mvjax makes {theirs / ours:.2f} steps in the time of one step of PyTorch.")
    return {"speeds": [asdict(speed) for speed in speeds]}


def _line(speed: Speed) -> str:
    seconds = sorted(speed.seconds_per_step)
    parts = [
        f"{speed.name}: {median(seconds):.4g} s/step ({seconds[0]:.4g} to {seconds[-1]:.4g})",
        f"{speed.samples_per_second:.4g} clips/s",
    ]
    if speed.mfu is not None:
        parts.append(f"MFU {speed.mfu:.1%}")
    if speed.peak_mb is not None:
        parts.append(f"peak {speed.peak_mb / 1024:.1f} GB")
    return ", ".join([*parts, f"ready after {speed.prepare_seconds:.0f} s"])


def _measure_policy(experiment: Experiment) -> dict:
    peer_of = None
    if _with_torch():
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
        from launch.benchmarks.torch_peer import TorchPolicy

        peer_of = partial(TorchPolicy, compiled=COMPILE.value)
    if not all(size.isdecimal() and int(size) for size in BATCHES.value):
        raise ValueError(f"--batches takes numbers of queries, e.g. 1,8,64; got {BATCHES.value}.")
    sizes, batches = sorted(int(size) for size in BATCHES.value), []
    for batch in measure_policy(
        experiment, sizes, stop_step=STOP_STEP.value, rounds=ROUNDS.value, peer_of=peer_of
    ):
        batches.append(batch.as_dict())
        print(policy_table(batch), flush=True)
    return {"stop_step": STOP_STEP.value, "batches": batches}


def _with_torch() -> bool:
    installed = all(importlib.util.find_spec(name) for name in ("torch", "diffusers"))
    if TORCH.value and not installed:
        print("PyTorch is not measured: pip install -r requirements-torch.txt.")
    return TORCH.value and installed


def _measure_data(experiment: Experiment, folder: Path) -> dict:
    cores, config, rounds = os.cpu_count() or 1, experiment.config, ROUNDS.value
    text = (config.text.length, config.text.dim)
    records = data.make_records(folder / "records", experiment.clip, text, RECORDS.value)
    videos = data.make_videos(folder / "videos", 2 * cores, 150)
    print(f"{cores} cores, {cores} threads, files in the page cache")
    pairs = [
        data.records_speed(records, rounds, cores),
        data.decoding_speed(videos, rounds, cores),
    ]
    for pair in pairs:
        print(pair)
    shape = (config.policy_io.action.horizon, config.policy_io.action.dim)
    seconds = data.statistics_seconds(folder / "statistics", ROWS.value, shape)
    print(f"statistics of {ROWS.value:,} rows of {list(shape)}: {seconds:.1f} s")
    memory = data.memory_over_time(records, videos, 60 * MINUTES.value) if MINUTES.value else []
    if memory:
        quarter = max(1, len(memory) // 4)  # buffers fill during the first quarter
        early, late = memory[quarter : 2 * quarter] or memory, memory[-quarter:]
        print(
            f"memory over {MINUTES.value:g} minutes: {median(mb for _, mb in early):.0f} MB in the "
            f"second quarter, {median(mb for _, mb in late):.0f} MB in the last"
        )
    return {
        "cores": cores,
        "pairs": [asdict(pair) for pair in pairs],
        "statistics_seconds": seconds,
        "memory_mb": memory,
    }


if __name__ == "__main__":
    run(main)
