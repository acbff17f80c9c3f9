"""The mesh and the batch that serve a pod best, found by compiling a few of them."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import jax

from mvjax.checkpoints.backbone import abstract_backbone
from mvjax.clip import Clip
from mvjax.parallel.chips import chip
from mvjax.parallel.mesh import MESH_AXES, slice_count
from mvjax.training.plan import DoesNotFit, Plan, plan
from mvjax.training.program import make_program

CONTEXTS = (1, 2, 4, 8)
STATE_SHARE = 0.6  # of the memory: more of it in parameters and optimizer leaves too little
FSDP_SIZES = 3  # tried per context


def search(
    config: Any,
    devices: Sequence[jax.Device],
    *,
    mfu: float,
    batch_size: int | None,
    max_compiles: int,
    say: Callable[[str], None],
) -> tuple[Any, Plan]:
    """Compiles meshes, then batches on the best mesh; returns the best configuration and plan.

    Memory comes first: context parallelism is tried only where a clip per chip does not fit, or
    where the batch is smaller than the pod. Of the meshes that fit, the best has the least time
    per clip if arithmetic at `mfu` and exchanges over all links come one after the other. The
    tensor axis stays as configured.

    Args:
        config: of a training run; its mesh and batch are what is searched.
        devices: of `pod_devices`.
        mfu: share of the peak FLOP/s to assume.
        batch_size: samples per step of the pod; None to double from one per data x fsdp until it
            does not fit.
        max_compiles: stops after so many programs.
        say: is told of each.

    Raises:
        DoesNotFit: if nothing that was tried fits.
    """
    budget = _Budget(devices, mfu, max_compiles, say)
    found: list[tuple[Any, Plan]] = []
    for context in CONTEXTS:
        for candidate in _candidates(config, devices, context, batch_size):
            found += budget.compile(candidate)
        if found:
            break
    if not found:
        raise DoesNotFit(
            f"none of the {budget.made} programs tried fits; use config.video_model.remat='full', "
            "a larger --topology, or a larger --max_compiles."
        )
    best = min(found, key=lambda pair: seconds_per_clip(pair[1]))
    while batch_size is None:
        larger = copy.deepcopy(best[0])
        larger.training.batch_size *= 2
        fits = budget.compile(larger)
        if not fits or seconds_per_clip(fits[0][1]) > seconds_per_clip(best[1]):
            break
        best = fits[0]
    return best


def seconds_per_clip(plan: Plan) -> float:
    """Arithmetic and exchanges inside slices, one after the other."""
    return (plan.step_seconds + plan.link_seconds) / plan.batch_size


class _Budget:
    def __init__(self, devices, mfu: float, max_compiles: int, say: Callable[[str], None]):
        self._devices, self._mfu, self._left, self._say = devices, mfu, max_compiles, say
        self.made = 0

    def compile(self, config: Any) -> list[tuple[Any, Plan]]:
        """The configuration and its plan if it fits and the budget allows it, else nothing."""
        if self.made == self._left:
            return []
        self.made += 1
        sizes = " ".join(f"{axis}={config.mesh[axis]}" for axis in MESH_AXES)
        head = f"[{self.made}/{self._left}] {sizes}, {config.training.batch_size} clips"
        try:
            result = plan(config, self._devices, self._mfu)
        except DoesNotFit:
            self._say(f"{head}: does not fit")
            return []
        self._say(
            f"{head}: {result.peak_bytes / result.hbm_bytes:.0%} of the memory, "
            f"{seconds_per_clip(result) * len(self._devices):.3g} s per clip and chip, "
            f"compiled in {result.compile_seconds:.0f} s"
        )
        return [(config, result)]


def _candidates(config: Any, devices, context: int, batch_size: int | None) -> list[Any]:
    """Configurations with this context, and fsdp from the least that holds the state upwards."""
    slices, tensor = slice_count(devices), max(int(config.mesh.get("tensor", 1)), 1)
    inside = len(devices) // slices
    if inside % (context * tensor) or Clip(**config.clip).tokens % context:
        return []
    groups = inside // (context * tensor)  # of a slice: data x fsdp
    if batch_size is not None and batch_size % (groups * slices):
        return []
    hbm = chip(devices[0].device_kind).hbm_bytes
    fitting = []
    for fsdp in (n for n in range(1, groups + 1) if groups % n == 0):
        candidate = copy.deepcopy(config)
        sizes = dict(data=groups // fsdp * slices, fsdp=fsdp, context=context, tensor=tensor)
        candidate.mesh.update(sizes)
        candidate.training.batch_size = batch_size or groups * slices
        try:
            arguments = make_program(candidate, devices, abstract_backbone).argument_bytes
        except ValueError:  # a dimension that fsdp does not divide
            continue
        if arguments <= STATE_SHARE * hbm:
            fitting.append(candidate)
    last = len(fitting) - 1
    chosen = {round(last * i / (FSDP_SIZES - 1)) for i in range(FSDP_SIZES)} if fitting else ()
    return [fitting[i] for i in sorted(chosen, reverse=True)]  # the largest takes least memory
