"""Success rates with confidence intervals."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist, fmean


@dataclass(frozen=True)
class SuccessRate:
    """A success rate with its Wilson interval; rate, low and high are fractions."""

    name: str
    successes: int
    trials: int
    rate: float
    low: float
    high: float


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a success probability.

    Unlike the normal approximation it stays inside [0, 1] and does not shrink to a point at 0 or
    all successes (Wilson 1927; Brown, Cai and DasGupta 2001, eq. 4).

    Args:
        successes: how many trials succeeded.
        trials: how many there were; with none, nothing is known and the interval is (0, 1).
        confidence: the two-sided confidence level.

    Returns:
        The lower and upper end, as fractions.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials is not possible.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is a fraction between 0 and 1, not {confidence}.")
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / trials
    scale = 1 + z * z / trials
    centre = (rate + z * z / (2 * trials)) / scale
    spread = z / scale * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    # Exact at the ends, where rounding would leave 1e-17.
    low = 0.0 if successes == 0 else centre - spread
    high = 1.0 if successes == trials else centre + spread
    return low, high


def success_rate(name: str, successes: int, trials: int) -> SuccessRate:
    """A rate with its 95 % Wilson interval."""
    rate = successes / trials if trials else 0.0
    return SuccessRate(name, successes, trials, rate, *wilson_interval(successes, trials))


def success_table(outcomes: Iterable[tuple[str, bool]]) -> list[SuccessRate]:
    """Success per task, in order of first appearance.

    Args:
        outcomes: (task, success) of every episode.
    """
    by_task: dict[str, list[bool]] = {}
    for task, success in outcomes:
        by_task.setdefault(task, []).append(bool(success))
    return [success_rate(task, sum(tried), len(tried)) for task, tried in by_task.items()]


def mean_success(table: list[SuccessRate]) -> SuccessRate:
    """The mean over tasks, every task weighing the same, with the Wilson interval of all episodes.

    The interval pools the episodes: it says how sure the number is for these tasks, not how it
    would be on other tasks.
    """
    successes = sum(row.successes for row in table)
    trials = sum(row.trials for row in table)
    rate = fmean(row.rate for row in table) if table else 0.0
    return SuccessRate("mean", successes, trials, rate, *wilson_interval(successes, trials))
