"""Compiles the real train step for a TPU pod that is not here: does it fit, and what does it cost?

Nothing is allocated: parameters, optimizer state, batch and frozen backbone are shapes with
shardings, and the compiler needs no device.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jax

from mvjax.experiment import Experiment
from mvjax.models.flops import step_flops
from mvjax.models.network import split
from mvjax.parallel import GB, Chip, chip, slice_count
from mvjax.pods.collectives import Collective, collectives
from mvjax.pods.cost import Product, Range, cost
from mvjax.pods.hlo import HLO
from mvjax.pods.topology import generation
from mvjax.training.bridge import abstract_backbone
from mvjax.training.memory import most_kept
from mvjax.training.step import Program, make_program


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
        kept: What a video DiT that learns keeps for the backward pass, `video_model.remat` with
            "auto" resolved; "" in stage 2.
        parameters, trainable, frozen: Numbers of parameters: of what is trained, those of them that
            learn, and of the frozen backbone.
        array_bytes: State, frozen backbone and batch, by their shapes.
        argument_bytes: The same as the compiler lays them out, padded to the tiles of the chip.
        peak_bytes: The most that is in memory at once, arguments included.
        host_bytes: Activations kept in the host's memory (remat "offload").
        hbm_bytes: The memory of the device.
        collectives: Exchanges in one step.
        link_seconds: The least time of the exchanges inside a slice, with all links busy.
        flops: Of one step, analytic, recomputation not counted.
        peak_flops: Of the device, per second.
        step_seconds: The time of a step, see `mvjax.pods.cost`; exchanges between slices, the input
            and the host's work are not in it.
        mfu: The share of `peak_flops` that `flops` are in that time.
        clips_per_second: Of the whole pod at the middle step time.
        parts: Seconds by part of the step (`mvjax.pods.cost.PARTS`); they add up.
        products_peak_share: Of `peak_flops`, of all matrix products in their own time.
        worst_products: Those that lose most time.
        notes: What the times were made from where a kernel's cycles were not known exactly.
        compile_seconds: Tracing and compiling, on this machine.
        hlo: The program's text; not among the figures.
    """

    device: str
    devices: int
    slices: int
    mesh: dict[str, int]
    batch_size: int
    kept: str
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
    step_seconds: Range
    mfu: Range
    clips_per_second: float
    parts: dict[str, Range]
    products_peak_share: float
    worst_products: tuple[Product, ...]
    notes: tuple[str, ...]
    compile_seconds: float
    hlo: str = field(default="", repr=False)

    @property
    def figures(self) -> dict[str, Any]:
        """Everything but the program's text, as JSON values."""
        return {key: value for key, value in asdict(self).items() if key != "hlo"}


def estimate(experiment: Experiment, devices: Sequence[jax.Device]) -> Estimate:
    """Compiles the train step of a configuration for the devices of `pod_devices`.

    Args:
        experiment: A training run; no data and no checkpoint that it names is read.
        devices: Of one or several slices.

    Raises:
        DoesNotFit: If the step needs more memory than a device has.
        ValueError: If batch, mesh, network and devices do not go together.
    """
    kind, slices = chip(devices[0].device_kind), slice_count(devices)
    assert kind is not None  # every generation of `pod_devices` is in the table of chips
    program = make_program(experiment, experiment.mesh(devices), abstract_backbone)
    start = time.perf_counter()
    try:
        compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        raise _explained(error, experiment, program, kind) from error
    compile_seconds = time.perf_counter() - start
    hlo, shapes = compiled.as_text(), before_compiling(experiment, program, kind)
    text = HLO(hlo)
    exchanges = collectives(text, len(devices) // slices)
    inside = sum(c.sent_bytes for c in exchanges if not c.across_slices)
    found = cost(text, generation(devices[0].device_kind), kind, exchanges)
    memory = compiled.memory_analysis()
    return Estimate(
        **shapes,
        kept=_kept(experiment, program, kind),
        slices=slices,
        argument_bytes=memory.argument_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        host_bytes=memory.host_temp_size_in_bytes,
        collectives=tuple(exchanges),
        link_seconds=inside / kind.link_bytes,
        step_seconds=found.seconds,
        mfu=found.seconds.share_of(shapes["flops"] / kind.peak_flops),
        clips_per_second=shapes["batch_size"] / found.seconds.middle,
        parts=found.parts,
        products_peak_share=found.products_peak_share,
        worst_products=found.worst_products,
        notes=found.notes,
        compile_seconds=compile_seconds,
        hlo=hlo,
    )


def before_compiling(experiment: Experiment, program: Program, kind: Chip) -> dict[str, Any]:
    """The fields of an `Estimate` that follow from shapes and shardings; no compiler is needed."""
    devices, samples = program.mesh.size, experiment.config.training.batch_size
    flops = step_flops(experiment) * samples / devices
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


def _kept(experiment: Experiment, program: Program, kind: Chip) -> str:
    if not experiment.learns_video:
        return ""
    remat = experiment.video.remat
    return most_kept(experiment, program.mesh, kind.hbm_bytes) if remat == "auto" else remat


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
