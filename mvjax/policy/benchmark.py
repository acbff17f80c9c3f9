"""How long the policy takes for an answer, by part, beside the same computation in PyTorch.

    prepare → encode → video → context → actions → fetch

are measured one by one, each as a program of its own, and all together as `query`: from
observations on the host to actions on the host. Ours is one program between `prepare` and `fetch`.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from mvjax.policy.benchmark_parts import DoesNotFit, Part, our_parts, part_flops, their_parts
from mvjax.policy.policy import Policy
from mvjax.policy.sampling import Sampling
from mvjax.policy.untrained import random_observations, untrained_policy
from mvjax.training.flops import peak_flops

TURN_SECONDS = 0.5  # so long a part is repeated in a turn


@dataclass(frozen=True)
class Latency:
    """Of one part and batch, in milliseconds.

    Attributes:
        p50, p95: of the repetitions.
        cpu: processor time, of all threads together; the mean.
        tflop: analytic operations of the batch, 1e12; None for parts that have none to speak of.
        mfu: share of the device's peak that they are at p50; None on a CPU.
    """

    p50: float
    p95: float
    cpu: float
    tflop: float | None
    mfu: float | None


@dataclass(frozen=True)
class Answers:
    """What was measured of one implementation at one batch size.

    Attributes:
        name: of it.
        parts: by the names of `PARTS`.
        queries_per_second: at the median of `query`.
        actions: of the batch, to be compared.
    """

    name: str
    parts: dict[str, Latency]
    queries_per_second: float
    actions: np.ndarray

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {k: v for k, v in asdict(self).items() if k != "actions"}


@dataclass(frozen=True)
class Batch:
    """What was measured of a batch.

    Attributes:
        size: queries.
        answers: of each implementation.
        difference: the largest one between the actions of both, by their rms; None of one alone.
        missing: why nothing, or only ours, was measured.
    """

    size: int
    answers: list[Answers]
    difference: float | None = None
    missing: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        answers = [one.as_dict() for one in self.answers]
        return {**vars(self), "answers": answers}


def measure_policy(
    config: Any,
    sizes: Sequence[int],
    *,
    stop_step: int,
    rounds: int,
    peer_of: Callable[[Policy], Any] | None,
) -> Iterator[Batch]:
    """Measures an untrained policy at several batch sizes, up to the first that does not fit.

    The noise is the published one, the same at every query, whatever the configuration says.

    Args:
        config: of a stage-2 run.
        sizes: of the batches, rising.
        stop_step: K of the sampling.
        rounds: turns, see `measure`.
        peer_of: makes a `TorchPolicy` of a policy; None where PyTorch does not take part.
    """
    settings = {**config.sampler, "fresh_noise": False}
    policy = untrained_policy(config, Sampling(**settings, stop_step=stop_step))
    peer = peer_of(policy) if peer_of else None
    ways = policy.batch_size
    for size in sizes:
        policy = dataclasses.replace(policy, batch_size=-(-size // ways) * ways)
        observations = random_observations(policy, policy.batch_size)
        missing = ""
        try:
            competitors = {"mvjax": our_parts(policy, observations)}
        except (DoesNotFit, jax.errors.JaxRuntimeError) as error:
            if not _out_of_memory(error):
                raise
            yield Batch(size, [], missing=f"A batch of {size} does not fit: {error}")
            return
        if peer:
            try:
                competitors["PyTorch"] = their_parts(peer, observations)
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                missing = f"A batch of {size} does not fit the memory that is left to PyTorch."
        answers = measure(competitors, policy, rounds)
        difference = None
        if len(answers) > 1:
            ours, theirs = (one.actions.astype(np.float64) for one in answers)
            difference = float(np.abs(ours - theirs).max() / np.sqrt(np.mean(theirs**2)))
        yield Batch(size, answers, difference, missing)


def policy_table(batch: Batch) -> str:
    """The figures of a batch as text, a line for every part."""
    lines = [batch.missing] if batch.missing else []
    for one in batch.answers:
        lines.append(
            f"{one.name}, {batch.size} at a time: {one.queries_per_second:.4g} queries/s, "
            f"p50 {one.parts['query'].p50:.4g} ms"
        )
        for part, found in one.parts.items():
            line = f"  {part:8} p50 {found.p50:9.3f}  p95 {found.p95:9.3f}  cpu {found.cpu:9.3f} ms"
            lines.append(line if found.mfu is None else f"{line}, MFU {found.mfu:.1%}")
    if batch.difference is not None:
        ours, theirs = batch.answers
        lines.append(
            f"mvjax answers {theirs.parts['query'].p50 / ours.parts['query'].p50:.2f} times as "
            f"fast as PyTorch, with {ours.parts['query'].cpu / theirs.parts['query'].cpu:.2f} "
            f"times its processor time; actions differ by at most {batch.difference:.1e} rms"
        )
    return "\n".join(lines)


def _out_of_memory(error: Exception) -> bool:
    words = str(error).lower()
    return isinstance(error, DoesNotFit) or "out of memory" in words or "exhausted" in words


def measure(competitors: dict[str, dict[str, Part]], policy: Policy, rounds: int) -> list[Answers]:
    """Measures them in turns, so that what else the machine does hits all alike.

    Args:
        competitors: parts of each by name.
        policy: gives the batch size and the operations.
        rounds: turns of each; in a turn every part is repeated for half a second, once at least.
    """
    taken = {name: {part: [] for part in parts} for name, parts in competitors.items()}
    for _ in range(rounds):
        for name, parts in competitors.items():
            for part, found in parts.items():
                taken[name][part] += _turn(found)
    flops, peak = part_flops(policy), peak_flops(jax.devices()[0])
    answers = []
    for name, parts in competitors.items():
        latencies = {
            part: _latency(times, flops.get(part), peak, policy)
            for part, times in taken[name].items()
        }
        rate = policy.batch_size / latencies["query"].p50 * 1e3
        answers.append(Answers(name, latencies, rate, parts["query"].run(None)))
    return answers


def _turn(part: Part) -> list[tuple[float, float]]:
    """Wall and processor seconds of every repetition; the first one is not counted."""
    part.run(part.before())
    times, start = [], time.perf_counter()
    while not times or time.perf_counter() - start < TURN_SECONDS:
        argument = part.before()
        cpu, wall = time.process_time(), time.perf_counter()
        part.run(argument)
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
        del argument
    return times


def _latency(
    times: list[tuple[float, float]], flops: float | None, peak: float | None, policy: Policy
) -> Latency:
    wall, cpu = np.asarray(times).T * 1e3
    p50, p95 = np.percentile(wall, (50, 95)).tolist()
    batch = flops * policy.batch_size if flops else None
    mfu = batch / (p50 / 1e3) / (peak * policy.mesh.size) if batch and peak else None
    return Latency(p50, p95, float(cpu.mean()), batch / 1e12 if batch else None, mfu)
