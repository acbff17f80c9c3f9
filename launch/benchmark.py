"""Measures a training step on the devices that are here, beside the same network in PyTorch.

    python -m launch.benchmark --config=configs/quickstart_video.py
    python -m launch.benchmark --config=configs/bridge_video.py --config.training.batch_size=1

Data and checkpoints are not needed: the networks are untrained, the batch is noise. PyTorch takes
part where torch and diffusers are installed (requirements-torch.txt); both are measured in turns.
"""

import importlib.util
import json
from pathlib import Path
from statistics import median

import jax
from absl import flags

from launch.entry import config_flag, run
from mvjax.training.benchmark import OurStep, Speed, compare

CONFIG = config_flag()
STEPS = flags.DEFINE_integer("steps", 10, "Steps per turn.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each.", lower_bound=1)
TORCH = flags.DEFINE_bool("torch", True, "Measure PyTorch too, where it is installed.")
COMPILE = flags.DEFINE_bool("torch_compile", True, "Use torch.compile.")
OUT = flags.DEFINE_string("out", None, "A .json file for the figures.")


def main() -> None:
    """Prints a table."""
    config = CONFIG.value
    competitors = [OurStep(config)]
    installed = all(importlib.util.find_spec(name) for name in ("torch", "diffusers"))
    if TORCH.value and installed:
        from mvjax.training.torch_peer import TorchStep

        competitors.append(TorchStep(config, competitors[0].flops, COMPILE.value))
    elif TORCH.value:
        print("PyTorch is not measured: pip install -r requirements-torch.txt.")
    speeds = compare(competitors, STEPS.value, ROUNDS.value)
    device = jax.devices()[0]
    print(f"{jax.device_count()} x {device.device_kind}, jax {jax.__version__}")
    for speed in speeds:
        print(_line(speed))
    if len(speeds) > 1:
        ours, theirs = (median(speed.seconds_per_step) for speed in speeds)
        print(f"mvjax makes {theirs / ours:.2f} steps in the time of one of PyTorch's.")
    if OUT.value:
        content = {
            "device": device.device_kind,
            "devices": jax.device_count(),
            "speeds": [speed.as_dict() for speed in speeds],
        }
        Path(OUT.value).write_text(json.dumps(content, indent=2) + "\n")


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


if __name__ == "__main__":
    run(main)
