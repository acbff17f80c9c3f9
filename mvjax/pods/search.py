"""Finds the best mesh, rematerialisation and batch for a pod by compiling a few of them.

Three searches, one after the other: the mesh at the smallest batch; on that mesh, what the backward
pass keeps; then the batch. What takes least time per clip is best (`Estimate.step_seconds.middle`).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from mvjax.experiment import Experiment
from mvjax.parallel import MESH_AXES, abstract_mesh
from mvjax.pods.compile import DoesNotFit, Estimate
from mvjax.training.bridge import abstract_backbone
from mvjax.training.memory import LADDER, most_kept, step_bytes
from mvjax.training.step import make_program

log = logging.getLogger(__name__)

CONTEXTS = (1, 2, 4, 8)
STATE_SHARE = 0.6  # of the memory; larger parameters and optimizer state leave too little
FSDP_SIZES = 3  # tried per context


@dataclass(frozen=True)
class Found:
    """The best experiment that was compiled, its estimate, and why no larger batch was taken."""

    experiment: Experiment
    estimate: Estimate
    ended: str

    @property
    def flags(self) -> str:
        """The flags that give a training run this mesh, rematerialisation and batch."""
        config = self.experiment.config
        sizes = [f"--config.mesh.{axis}={config.mesh[axis]}" for axis in MESH_AXES]
        if self.experiment.learns_video:
            sizes.append(f"--config.video_model.remat={config.video_model.remat}")
        return " ".join([*sizes, f"--config.training.batch_size={config.training.batch_size}"])


def search(
    experiment: Experiment,
    *,
    devices: int,
    slices: int,
    hbm_bytes: int,
    compiled: Callable[[Experiment], Estimate],
    batch_size: int | None,
    max_compiles: int,
) -> Found:
    """Compiles meshes, policies of remat and batches; logs each of them.

    Memory comes first: context parallelism is tried only where a clip per device does not fit, or
    where the batch is smaller than the pod. For each context three meshes are tried, from the
    smallest fsdp that holds the state to the largest; where none fits, policies that keep less are
    tried on the last. The tensor axis stays as configured. On the best mesh those that keep more
    are tried if they may fit, from the most, up to the first that does. The growth of memory
    between two batches predicts the largest one; it is tried, and then its neighbours until one
    fits and the next does not, or a clip takes longer.

    Args:
        experiment: A training run; its mesh, `video_model.remat` and batch are searched.
        devices, slices: Of the whole pod.
        hbm_bytes: Memory of a device.
        compiled: An experiment -> its estimate; raises `DoesNotFit`.
        batch_size: Samples per step of the pod; None for the largest.
        max_compiles: Number of programs after which the search stops.

    Raises:
        DoesNotFit: If nothing that was tried fits.
    """
    budget = _Budget(compiled, max_compiles)
    best = None
    for context in CONTEXTS:
        meshes = _candidates(experiment, devices, slices, context, batch_size, hbm_bytes)
        for candidate in meshes:
            best = _better(best, budget.compile(candidate))
        if best is None and meshes:
            best = _first(budget, _other_remats(meshes[0], devices, hbm_bytes, keep_more=False))
        if best:
            break
    if not budget.made:
        raise DoesNotFit(
            f"no mesh of {devices} devices was worth compiling: at any fsdp, parameters and "
            f"optimizer leave less than {1 - STATE_SHARE:.0%} of the memory, or the batch is not "
            "a multiple of data x fsdp; use a larger --topology or another --batch_per_chip."
        )
    if best is None:
        raise DoesNotFit(
            f"none of the {budget.made} programs tried fits; use a larger --topology or a larger "
            "--max_compiles."
        )
    more = _other_remats(best[0], devices, hbm_bytes, keep_more=True)
    best = _better(best, _first(budget, more))
    if batch_size is not None:
        return Found(*best, "the batch was given")
    return _largest_batch(best, budget)


def seconds_per_clip(made: Estimate) -> float:
    """The middle of the range, for all chips together."""
    return made.step_seconds.middle / made.batch_size


_Tried = tuple[Experiment, Estimate]


class _Budget:
    def __init__(self, compiled: Callable[[Experiment], Estimate], max_compiles: int):
        self._compiled, self._most, self.made = compiled, max_compiles, 0

    @property
    def spent(self) -> bool:
        return self.made == self._most

    def compile(self, experiment: Experiment) -> _Tried | None:
        """The experiment and its estimate if it fits and the budget allows it."""
        if self.spent:
            return None
        self.made += 1
        config = experiment.config
        sizes = " ".join(f"{axis}={config.mesh[axis]}" for axis in MESH_AXES)
        head = f"[{self.made}/{self._most}] {sizes}, {config.training.batch_size} clips"
        if experiment.learns_video:
            head += f", remat {config.video_model.remat}"
        try:
            result = self._compiled(experiment)
        except DoesNotFit:
            log.info(f"{head}: does not fit")
            return None
        log.info(
            f"{head}: {result.peak_bytes / result.hbm_bytes:.0%} of the memory, "
            f"{seconds_per_clip(result) * result.devices:.3g} s per clip and chip, "
            f"compiled in {result.compile_seconds:.0f} s"
        )
        return experiment, result


def _better(one: _Tried | None, other: _Tried | None) -> _Tried | None:
    """The one with less time per clip; the first if both take the same."""
    if one is None or other is None:
        return one or other
    return other if seconds_per_clip(other[1]) < seconds_per_clip(one[1]) else one


def _first(budget: _Budget, experiments: list[Experiment]) -> _Tried | None:
    """The first that fits; the others are not compiled."""
    return next(filter(None, map(budget.compile, experiments)), None)


def _other_remats(
    experiment: Experiment, devices: int, hbm_bytes: int, keep_more: bool
) -> list[Experiment]:
    """The experiment with policies that keep more, or less, than its own; the most first.

    Those that keep more are left out if by `step_bytes`, which is on the safe side, they need a
    tenth more memory than there is.
    """
    own = experiment.config.video_model.remat
    if not experiment.learns_video or own == "none":  # nothing is kept, or everything
        return []
    # "offload" keeps what "attention" keeps, in the host.
    at = LADDER.index(own) if own in LADDER else LADDER.index("attention")
    mesh = abstract_mesh(experiment.config.mesh, devices)
    names = [
        name
        for name in (LADDER[:at] if keep_more else LADDER[at + 1 :])
        if not keep_more or step_bytes(experiment, mesh, name) <= 1.1 * hbm_bytes
    ]
    return [experiment.changed({"video_model.remat": name}) for name in names]


def _largest_batch(best: _Tried, budget: _Budget) -> Found:
    """The largest multiple of a mesh's smallest batch that fits and is not slower per clip."""
    unit = best[0].config.training.batch_size
    peaks, too_many = {1: best[1].peak_bytes}, None  # by multiples of the least batch
    while too_many != max(peaks) + 1:
        n = _next_multiple(peaks, too_many, best[1].hbm_bytes)
        larger = best[0].changed({"training.batch_size": n * unit})
        if budget.spent:
            return Found(*best, f"--max_compiles={budget.made}; {n * unit} clips were not tried")
        tried = budget.compile(larger)
        if tried and seconds_per_clip(tried[1]) > seconds_per_clip(best[1]):
            return Found(*best, f"with {n * unit} clips a step takes longer per clip")
        if tried:
            peaks[n], best = tried[1].peak_bytes, tried
        else:
            too_many = n
    return Found(*best, f"{too_many * unit} clips do not fit")


def _next_multiple(peaks: dict[int, int], too_many: int | None, hbm_bytes: int) -> int:
    """The batch to try next, as a multiple of the smallest one."""
    *_, last = peaks
    if too_many is not None:
        return (last + too_many) // 2
    if len(peaks) == 1:
        return 2
    # The largest that fits if memory grows as between the last two batches that fit.
    before = list(peaks)[-2]
    per_multiple = max((peaks[last] - peaks[before]) / (last - before), 1)
    return max(last + int((hbm_bytes - peaks[last]) / per_multiple), last + 1)


def _candidates(
    experiment: Experiment,
    devices: int,
    slices: int,
    context: int,
    batch_size: int | None,
    hbm_bytes: int,
) -> list[Experiment]:
    """Experiments with this context and several fsdp, of which each holds the state."""
    config = experiment.config
    tensor, inside = max(int(config.mesh.get("tensor", 1)), 1), devices // slices
    if inside % (context * tensor) or experiment.clip.tokens % context:
        return []
    groups = inside // (context * tensor)  # of a slice: data x fsdp
    least = groups * slices * config.training.accumulate
    if batch_size is not None and batch_size % least:
        return []
    fitting = []
    for fsdp in (n for n in range(1, groups + 1) if groups % n == 0):
        sizes = dict(data=groups // fsdp * slices, fsdp=fsdp, context=context, tensor=tensor)
        settings = {f"mesh.{axis}": size for axis, size in sizes.items()}
        candidate = experiment.changed(settings | {"training.batch_size": batch_size or least})
        mesh = abstract_mesh(sizes, devices)
        if candidate.learns_video and config.video_model.remat == "auto":
            remat = most_kept(candidate, mesh, hbm_bytes)
            candidate = candidate.changed({"video_model.remat": remat})
        try:
            arguments = make_program(candidate, mesh, abstract_backbone).argument_bytes
        except ValueError:  # a dimension that fsdp does not divide
            continue
        if arguments <= STATE_SHARE * hbm_bytes:
            fitting.append(candidate)
    last = len(fitting) - 1
    chosen = {round(last * i / (FSDP_SIZES - 1)) for i in range(FSDP_SIZES)} if fitting else ()
    return [fitting[i] for i in sorted(chosen, reverse=True)]  # the largest takes least memory
