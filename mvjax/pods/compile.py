"""Compiles the real train step for a TPU pod that is not here: does it fit, and what does it cost?

Nothing is allocated: parameters, optimizer state, batch and frozen backbone are shapes with
shardings, and the compiler needs no device.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from mvjax.experiment import Experiment
from mvjax.models.flops import step_flops
from mvjax.models.network import split
from mvjax.parallel import GB, Chip, chip, slice_count
from mvjax.pods.collectives import Collective, collectives
from mvjax.training.bridge import abstract_backbone
from mvjax.training.step import Program, make_program

USUAL_MFU = 0.4  # published trainings of such networks on TPUs reach 0.3 to 0.5


class DoesNotFit(ValueError):
    """A program needs more memory than the device has."""


@dataclass(frozen=True)
class Estimate:
    """Memory, exchanges and time of a train step on a pod; bytes and FLOPs are per device.

    Attributes:
        device: Name of the chip.
        devices, slices: Of the whole pod.
        mesh: Devices per axis.
        batch_size: Samples per step of the whole pod.
        parameters, trainable, frozen: Numbers of parameters: of the trained network, those of them
            that learn, and of the frozen backbone.
        array_bytes: State, frozen backbone and batch, by their shapes.
        argument_bytes: The same as the compiler lays them out, padded to the tiles of the chip.
        peak_bytes: The most that is in memory at once, arguments included.
        host_bytes: Activations kept in the host's memory (remat "offload").
        hbm_bytes: The memory of the device.
        collectives: Exchanges in one step.
        link_seconds: The least time of the exchanges inside a slice, with all links busy.
        flops: Of one step, analytic, recomputation not counted.
        peak_flops: Of the device, per second.
        mfu: The assumed share of `peak_flops`.
        step_seconds: The time of the arithmetic of a step at that share.
        clips_per_second: Of the whole pod at that step time.
        compile_seconds: Tracing and compiling, on this machine.
    """

    device: str
    devices: int
    slices: int
    mesh: dict[str, int]
    batch_size: int
    parameters: int
    trainable: int
    frozen: int
    array_bytes: int
    argument_bytes: int
    peak_bytes: int
    host_bytes: int
    hbm_bytes: int
    collectives: tuple[Collective, ...]
    link_seconds: float
    flops: float
    peak_flops: float
    mfu: float
    step_seconds: float
    clips_per_second: float
    compile_seconds: float


def estimate(
    experiment: Experiment, devices: Sequence[jax.Device], mfu: float = USUAL_MFU
) -> Estimate:
    """Compiles the train step of a configuration for the devices of `pod_devices`.

    Args:
        experiment: A training run; no data and no checkpoint that it names is read.
        devices: Of one or several slices.
        mfu: Share of the peak FLOP/s to assume for the step time.

    Raises:
        DoesNotFit: If the step needs more memory than a device has.
        ValueError: If batch, mesh, network and devices do not go together.
    """
    if not 0 < mfu <= 1:
        raise ValueError(f"the MFU is a share of the peak, more than 0 and up to 1; got {mfu}.")
    kind, slices = chip(devices[0].device_kind), slice_count(devices)
    assert kind is not None  # every generation of `pod_devices` is in the table of chips
    program = make_program(experiment, experiment.mesh(devices), abstract_backbone)
    start = time.perf_counter()
    try:
        compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        raise _explained(error, experiment, program, kind) from error
    compile_seconds = time.perf_counter() - start
    exchanges = collectives(compiled.as_text(), len(devices) // slices)
    inside = sum(c.sent_bytes for c in exchanges if not c.across_slices)
    memory = compiled.memory_analysis()
    return Estimate(
        **before_compiling(experiment, program, kind, mfu),
        slices=slices,
        argument_bytes=memory.argument_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        host_bytes=memory.host_temp_size_in_bytes,
        collectives=tuple(exchanges),
        link_seconds=inside / kind.link_bytes,
        compile_seconds=compile_seconds,
    )


def before_compiling(
    experiment: Experiment, program: Program, kind: Chip, mfu: float
) -> dict[str, Any]:
    """The fields of an `Estimate` that follow from shapes and shardings; no compiler is needed."""
    devices, samples = program.mesh.size, experiment.config.training.batch_size
    flops = step_flops(experiment) * samples / devices
    seconds = flops / (kind.peak_flops * mfu)
    return dict(
        device=kind.name,
        devices=devices,
        mesh=dict(program.mesh.shape),
        batch_size=samples,
        parameters=_count(program.state.params),
        trainable=_count(split(program.state.params, program.stage.trainable)[0]),
        frozen=_count(program.stage.frozen),
        array_bytes=program.argument_bytes,
        hbm_bytes=kind.hbm_bytes,
        flops=flops,
        peak_flops=kind.peak_flops,
        mfu=mfu,
        step_seconds=seconds,
        clips_per_second=samples / seconds,
    )


def batch_size(per_chip: float, devices: int) -> int:
    """Samples per step of a pod; ValueError if that is not a whole number."""
    size = per_chip * devices
    if size < 1 or size != round(size):
        raise ValueError(
            f"--batch_per_chip={per_chip:g} makes {size:g} clips on {devices} chips; "
            "the batch must be a whole number of them."
        )
    return round(size)


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _explained(error: Exception, experiment: Experiment, program: Program, kind: Chip) -> Exception:
    """`DoesNotFit` for a program that is too large; other errors unchanged."""
    text = str(error)
    if "Vmem" in text:
        return DoesNotFit(
            f"a kernel does not fit the on-chip memory of {kind.name} "
            f"({' '.join(text.split())[:200]}); change the lengths of config.clip, config.mesh."
            "context, or config.video_model.attention."
        )
    if "Hbm" not in text and "RESOURCE_EXHAUSTED" not in text:
        return error
    needed = re.search(r"\(([\d.]+[KMGT])\) exceeds", text)
    total = f"{needed[1]}B in all" if needed else "more"
    remat = experiment.video.remat
    advice = [] if remat == "full" else [f"config.video_model.remat='full' (now {remat!r})"]
    return DoesNotFit(
        f"the step does not fit a {kind.name} of {kind.hbm_bytes / GB:.2f}GB: it needs {total}, "
        f"{program.argument_bytes / GB:.2f}GB of it for parameters, optimizer and batch; use "
        f"{', '.join([*advice, 'fewer samples per chip (--batch_per_chip)'])}, a larger "
        "config.mesh.fsdp for the parameters, or config.mesh.context for long videos."
    )


# --- Estimates as text ---


def report(experiment: Experiment, topology: str, found: Estimate) -> str:
    """Several lines: what was compiled, whether it fits, what it exchanges, how long it takes."""
    per_chip = found.batch_size / found.devices
    slices = f"{found.slices} x " if found.slices > 1 else ""
    share = found.peak_bytes / found.hbm_bytes
    fits = "fits" if share <= 1 else "DOES NOT FIT"
    frozen = f", {_millions(found.frozen)} frozen in the backbone" if found.frozen else ""
    host = f", {_bytes(found.host_bytes)} in the host" if found.host_bytes else ""
    lora = experiment.video.lora
    training = f"LoRA of rank {lora.rank}" if lora else "full training"
    what = f"video, {training}" if experiment.stage == "video" else "action decoder"
    rows = [
        ("step", f"{what}, {experiment.clip.tokens:,} tokens per clip"),
        ("pod", f"{slices}{topology}, {found.devices} x {found.device}"),
        ("mesh", " ".join(f"{axis}={size}" for axis, size in found.mesh.items())),
        ("batch", f"{found.batch_size} clips, {per_chip:g} per chip"),
        (
            "parameters",
            f"{_millions(found.parameters)}, {_millions(found.trainable)} learn{frozen}",
        ),
        (
            "memory",
            f"arguments {_bytes(found.argument_bytes)}, peak {_bytes(found.peak_bytes)} of "
            f"{_bytes(found.hbm_bytes)} per chip ({share:.0%}): {fits}{host}",
        ),
        (
            "time",
            f"{found.flops / 1e12:.4g} TFLOP per chip: {found.step_seconds:.3g} s per step at "
            f"{found.mfu:.0%} of {found.peak_flops / 1e12:g} TFLOP/s, {found.clips_per_second:.3g} "
            "clips/s in the pod",
        ),
        *zip(["exchange", *[""] * len(found.collectives)], _exchanges(found)),
        ("compiled", f"in {found.compile_seconds:.0f} s"),
    ]
    return "\n".join(f"{name:<12}{text}" for name, text in rows)


def _exchanges(found: Estimate) -> list[str]:
    if not found.collectives:
        return ["none"]
    lines = []
    for exchange in found.collectives:
        where = " between slices" if exchange.across_slices else ""
        size = _bytes(exchange.sent_bytes)
        lines.append(f"{exchange.count:>6} x {exchange.kind}{where}, {size}")
    floor = f"sent per chip and step; {found.link_seconds:.3g} s if all links are busy"
    return [*lines, floor]


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count < 1e9 else f"{count / 1e9:,.2f} G"


def _bytes(count: float) -> str:
    return f"{count / GB:.2f} GB" if count >= GB / 100 else f"{count / 2**20:.2f} MB"


def table(estimates: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of estimates.

    Args:
        estimates: Arguments of `launch.estimate` -> what it wrote with --json; one line for each.
    """
    if not estimates:
        return ""
    head = (
        "| pod | chips | mesh d·f·c·t | clips | peak GB | arguments GB | TFLOP | sent GB | s | "
        "clips/s | `python -m launch.estimate ...` |\n|---|" + "---:|" * 9 + "---|\n"
    )
    return head + "".join(f"| {' | '.join(_cells(*line))} |\n" for line in estimates.items())


def _cells(arguments: str, p: dict[str, Any]) -> list[str]:
    across = sum(c["sent_bytes"] for c in p["collectives"] if c["across_slices"]) / GB
    host = f" + {p['host_bytes'] / GB:.1f} in the host" if p["host_bytes"] else ""
    inside = sum(c["sent_bytes"] for c in p["collectives"] if not c["across_slices"]) / GB
    return [
        f"{p['slices']} x {p['topology']}" if p["slices"] > 1 else p["topology"],
        f"{p['devices']}",
        "·".join(str(size) for size in p["mesh"].values()),
        f"{p['batch_size']}",
        f"{p['peak_bytes'] / GB:.1f} of {p['hbm_bytes'] / GB:.1f}{host}",
        f"{p['argument_bytes'] / GB:.2f}",
        f"{p['flops'] / 1e12:.0f}",
        f"{inside:.1f}" + (f" + {across:.2f}" if across else ""),
        f"{p['step_seconds']:.2f}",
        f"{p['clips_per_second']:.3g}",
        f"`{arguments}`",
    ]
