"""Mean, standard deviation, and paired differences with Student's interval."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation of n values; the deviation is None for one value."""

    mean: float
    deviation: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences and its 95 % interval; the interval is None for one pair."""

    mean: float
    interval: tuple[float, float] | None
    n: int


def summarize(values: list[float]) -> Summary:
    """Summary of one value or more."""
    return Summary(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def paired_difference(values: dict[int, float], baseline: dict[int, float]) -> Difference | None:
    """values - baseline over the seeds both have, with Student's t interval; None where they share no seed."""
    shared = sorted(values.keys() & baseline.keys())
    if not shared:
        return None
    differences = [values[seed] - baseline[seed] for seed in shared]
    mean, half = statistics.fmean(differences), half_interval(differences)
    return Difference(mean, None if half is None else (mean - half, mean + half), len(differences))


def half_interval(values: list[float]) -> float | None:
    """Half of Student's 95 % interval of the mean of these values; None for one value."""
    n = len(values)
    if n == 1:
        return None
    return student_quantile((1 + CONFIDENCE) / 2, n - 1) * statistics.stdev(values) / math.sqrt(n)


def student_quantile(probability: float, degrees: int) -> float:
    """The t below which Student's distribution with these degrees of freedom has this probability, > 0.5.

    By bisection on the distribution function, which is integrated from its density: with t = tan(u)
    sqrt(degrees) the density becomes cos(u)^(degrees - 1), smooth on a finite interval.
    """
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(math.pi)
    nodes, weights = np.polynomial.legendre.leggauss(200)

    def distribution(u: float) -> float:
        return 0.5 + scale * float((weights * np.cos((nodes + 1) * u / 2) ** (degrees - 1)).sum()) * u / 2

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if distribution(middle) < probability else (low, middle)
    return math.tan(low) * math.sqrt(degrees)
