"""Differences between two variants that were run with the same seeds."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from clmoe.report.run import Group

LEVEL = 0.95
ENOUGH_SEEDS = 3


@dataclass(frozen=True, slots=True)
class Difference:
    """``mean`` of ``better - worse`` over the ``n`` seeds that both have, in points, and its confidence interval.

    ``low`` and ``high`` bound the true mean difference with 95 % confidence where the differences are normal: Student's
    t with n - 1 degrees of freedom. None for fewer than two seeds.
    """

    mean: float
    low: float | None
    high: float | None
    n: int


def difference(better: Group, worse: Group, metric: str) -> Difference | None:
    """``better - worse`` in one metric, seed by seed; None where no seed has both."""
    theirs = {run.seed: run.metrics[metric] for run in worse.runs}
    values = [
        ours - other
        for run in better.runs
        if (ours := run.metrics[metric]) is not None and (other := theirs.get(run.seed)) is not None
    ]
    return paired(values) if values else None


def paired(values: list[float]) -> Difference:
    """Mean of at least one difference, and its confidence interval."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return Difference(mean, None, None, n)
    from scipy.stats import t  # takes most of a second

    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n)


def verdict(found: Difference | None) -> str:
    """What the difference says of the claim that it is positive."""
    if found is None:
        return "not run"
    if found.n < ENOUGH_SEEDS or found.low is None or found.high is None:
        return f"not verified ({found.n} {'seed' if found.n == 1 else 'seeds'})"
    if found.low > 0:
        return "holds"
    return "contradicted" if found.high < 0 else "no difference shown"
