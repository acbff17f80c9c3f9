"""How fast a training step is here: the real compiled step on random data, beside PyTorch's."""

import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import jax
import numpy as np

from mvjax.experiment import Experiment
from mvjax.models.flops import peak_flops
from mvjax.training.objectives import Batch
from mvjax.training.step import create_state, make_program


@dataclass(frozen=True)
class Speed:
    """What was measured of one implementation.

    Attributes:
        name: of it.
        seconds_per_step: one figure per round.
        samples_per_second: at the median.
        mfu: share of the devices' peak that the step's analytic FLOPs use; None on a CPU.
        peak_mb: the most memory of a device so far; None where the backend does not tell.
        prepare_seconds: compiling, and the first steps.
    """

    name: str
    seconds_per_step: list[float]
    samples_per_second: float
    mfu: float | None
    peak_mb: float | None
    prepare_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class OurStep:
    """The train step of a configuration, compiled for the devices that are here.

    The networks are untrained and the batch is noise: neither changes the time.
    """

    name = "mvjax"

    def __init__(self, experiment: Experiment):
        """Compiles the step and makes its first two.

        Args:
            experiment: a training run; datasets and checkpoints are not read.
        """
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
        self.flops = program.stage.flops * settings.batch_size
        self.batch_size = settings.batch_size
        self.run(2)
        self.prepare_seconds = time.perf_counter() - start

    def run(self, steps: int) -> float:
        """Makes so many steps; seconds until the devices have finished them."""
        start = time.perf_counter()
        for _ in range(steps):
            self._state, metrics = self._step(self._state, self._frozen, self._batch)
        jax.block_until_ready(metrics["loss"])
        return time.perf_counter() - start

    @property
    def peak_mb(self) -> float | None:
        """The most memory of a device so far."""
        stats = jax.local_devices()[0].memory_stats() or {}
        return stats["peak_bytes_in_use"] / 2**20 if "peak_bytes_in_use" in stats else None


def compare(competitors: list[Any], steps: int, rounds: int) -> list[Speed]:
    """Measures them in turns, so that what else the machine does hits all alike.

    Args:
        competitors: objects with name, run, batch_size, flops, peak_mb and prepare_seconds.
        steps: per turn.
        rounds: turns of each.
    """
    taken: list[list[float]] = [[] for _ in competitors]
    for _ in range(rounds):
        for seconds, one in zip(taken, competitors):
            seconds.append(one.run(steps) / steps)
    peak = peak_flops(jax.devices()[0])
    devices = jax.device_count()
    return [
        Speed(
            name=one.name,
            seconds_per_step=seconds,
            samples_per_second=one.batch_size / median(seconds),
            mfu=one.flops / median(seconds) / (peak * devices) if peak else None,
            peak_mb=one.peak_mb,
            prepare_seconds=one.prepare_seconds,
        )
        for seconds, one in zip(taken, competitors)
    ]


def _noise(abstract: Batch) -> Batch:
    rng = np.random.default_rng(0)
    batch = {name: rng.standard_normal(leaf.shape, np.float32) for name, leaf in abstract.items()}
    if "action_mask" in batch:
        batch["action_mask"] = np.ones_like(batch["action_mask"])
    return {name: jax.device_put(array, abstract[name].sharding) for name, array in batch.items()}
