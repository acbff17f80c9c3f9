"""The speed of a training step: the real compiled step on random data, beside PyTorch's."""

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

from mvjax.experiment import Experiment
from mvjax.models.flops import peak_flops
from mvjax.training.objectives import Batch
from mvjax.training.step import create_state, make_program

Name = TypeVar("Name", bound=Hashable)
Measured = TypeVar("Measured")


def take_turns(
    measurements: Mapping[Name, Callable[[], Measured]], rounds: int
) -> dict[Name, list[Measured]]:
    """Makes measurements in turns, so that other load on the machine affects all of them alike."""
    taken: dict[Name, list[Measured]] = {name: [] for name in measurements}
    for _ in range(rounds):
        for name, measure in measurements.items():
            taken[name].append(measure())
    return taken


class Competitor(Protocol):
    """An implementation of a training step.

    Attributes:
        name: Of the implementation.
        batch_size, flops: Samples of a step, and its analytic operations.
        prepare_seconds: Compiling, and the first steps.
        peak_mb: Highest memory use of a device so far; None where the backend does not tell.
    """

    name: str
    batch_size: int
    flops: float
    prepare_seconds: float
    peak_mb: float | None

    def run(self, steps: int) -> float:
        """Makes some steps; returns the seconds until the devices have finished them."""
        ...


@dataclass(frozen=True)
class Speed:
    """The figures of one `Competitor`.

    Attributes:
        seconds_per_step: One figure per round.
        samples_per_second: At the median.
        mfu: Share of the devices' peak that the step's analytic FLOPs use; None on a CPU.
    """

    name: str
    seconds_per_step: list[float]
    samples_per_second: float
    mfu: float | None
    peak_mb: float | None
    prepare_seconds: float


class OurStep:
    """The train step of a configuration, compiled for the devices of this machine.

    The networks are untrained and the batch is noise: neither changes the time.

    Attributes:
        planned_mb: See the function; None where the backend does not tell.
    """

    name = "mvjax"

    def __init__(self, experiment: Experiment):
        """Compiles the step of a training run and makes the first two; no data is read."""
        start = time.perf_counter()
        settings = experiment.config.training
        if experiment.stage == "action":
            experiment = experiment.changed({"backbone.checkpoint": ""})
        program = make_program(experiment, experiment.mesh())
        with jax.set_mesh(program.mesh):
            self._state = create_state(
                program.stage, program.optimizer, program.state, settings.seed
            )
        self._batch, self._frozen = _noise(program.batch), program.stage.frozen
        self._step = program.compile()
        self.planned_mb = planned_mb(self._step)
        self.flops = program.stage.flops * settings.batch_size
        self.batch_size = settings.batch_size
        self.run(2)
        self.prepare_seconds = time.perf_counter() - start

    def run(self, steps: int) -> float:
        """As `Competitor.run`."""
        start = time.perf_counter()
        for _ in range(steps):
            self._state, metrics = self._step(self._state, self._frozen, self._batch)
        jax.block_until_ready(metrics["loss"])
        return time.perf_counter() - start

    @property
    def peak_mb(self) -> float | None:
        """As of `Competitor`."""
        stats = jax.local_devices()[0].memory_stats() or {}
        return stats["peak_bytes_in_use"] / 2**20 if "peak_bytes_in_use" in stats else None


def planned_mb(compiled: Any) -> float | None:
    """Memory that the compiler plans for a program: arguments, results and all between them."""
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    both = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return (both + plan.temp_size_in_bytes) / 2**20


def compare(
    competitors: list[Competitor], steps: int, rounds: int, peak: float | None = None
) -> list[Speed]:
    """Measures competitors in turns of some steps each.

    `peak` is that of all devices in FLOP/s, where they are not the devices of JAX.
    """
    taken = take_turns({one: lambda one=one: one.run(steps) / steps for one in competitors}, rounds)
    if peak is None and (known := peak_flops(jax.devices()[0])):
        peak = known * jax.device_count()
    return [
        Speed(
            name=one.name,
            seconds_per_step=seconds,
            samples_per_second=one.batch_size / median(seconds),
            mfu=one.flops / median(seconds) / peak if peak else None,
            peak_mb=one.peak_mb,
            prepare_seconds=one.prepare_seconds,
        )
        for one, seconds in taken.items()
    ]


def _noise(abstract: Batch) -> Batch:
    rng = np.random.default_rng(0)
    batch = {name: rng.standard_normal(leaf.shape, np.float32) for name, leaf in abstract.items()}
    if "action_mask" in batch:
        batch["action_mask"] = np.ones_like(batch["action_mask"])
    return {name: jax.device_put(array, abstract[name].sharding) for name, array in batch.items()}
