"""The statistics: intervals, tests, adjustments, and how many seeds a drop needs. Formulas and sources: docs/report.md.

scipy does the distributions; the only numerics here is the hierarchical bootstrap. Left out on purpose: models of the
rates (logistic, beta-binomial): with a handful of seeds their assumptions would carry the answer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

ALPHA = 0.05
POWER = 0.8
DRAWS = 10_000
MAX_SEEDS = 1000
"""Where the search for a number of seeds ends: nobody trains that many."""

Interval = tuple[float, float]


def t_interval(values: Sequence[float], alpha: float = ALPHA) -> Interval | None:
    """mean ± t(1 - α/2, n - 1) · SD / √n; None with fewer than two values."""
    if len(values) < 2:
        return None
    half = float(stats.t.ppf(1 - alpha / 2, len(values) - 1)) * standard_error(values)
    mean = float(np.mean(values))
    return mean - half, mean + half


def standard_error(values: Sequence[float]) -> float | None:
    """SD / √n, with n - 1 under the SD; None with fewer than two values."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def t_test(differences: Sequence[float]) -> float | None:
    """Two-sided p that the mean difference is 0: 1 where all are 0. None with fewer than two, or where all are one
    number other than 0, of which the test knows nothing."""
    if len(differences) < 2 or np.ptp(differences) < 1e-12:
        return 1.0 if len(differences) > 1 and abs(differences[0]) < 1e-12 else None
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def sign_test(differences: Sequence[float]) -> float | None:
    """Exact two-sided sign test; differences of 0 are left out, and p is 1 where that leaves none. None without any."""
    signs = [difference > 0 for difference in differences if abs(difference) > 1e-12]
    if not signs:
        return 1.0 if len(differences) else None
    return float(stats.binomtest(sum(signs), len(signs), 0.5).pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjustment of those that are there: max over smaller ones of (m - rank) · p, at most 1."""
    there = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(there):
        largest = max(largest, min(1.0, (len(there) - rank) * p))
        adjusted[i] = largest
    return adjusted


@dataclass(frozen=True)
class PairCounts:
    """One seed's pair of runs over the same problems, (n_problems, n_measures) each: hits and completions.

    `first` is the arm, `second` what it is compared with.
    """

    problems: tuple[str, ...]
    n_met: int
    """Problems that either of the two met; the arrays are over those that both did."""
    first_hits: np.ndarray
    first_n: np.ndarray
    second_hits: np.ndarray
    second_n: np.ndarray

    def difference(self, weights: np.ndarray) -> np.ndarray:
        """(draws, n_measures): rate of the first minus rate of the second, problems counted `weights` times."""
        with np.errstate(invalid="ignore", divide="ignore"):  # a draw without any completion of a mode is nan
            first = (weights @ self.first_hits) / (weights @ self.first_n)
            return first - (weights @ self.second_hits) / (weights @ self.second_n)


def paired_bootstrap(pairs: Sequence[PairCounts], generator: np.random.Generator, draws: int = DRAWS) -> np.ndarray:
    """(draws, n_measures) mean differences: seeds drawn with replacement, then problems, the same for both of a pair.

    Where all seeds saw the same problems, one draw of problems serves all seeds of a replicate, since a problem that is
    odd is odd in all of them; otherwise every drawn seed draws among its own.
    """
    n_seeds = len(pairs)
    chosen = generator.integers(n_seeds, size=(draws, n_seeds))
    if all(pair.problems == pairs[0].problems for pair in pairs):
        weights = _weights(generator, len(pairs[0].problems), draws)
        each = np.stack([pair.difference(weights) for pair in pairs], axis=1)
        return np.take_along_axis(each, chosen[:, :, None], axis=1).mean(axis=1)
    total = np.zeros((draws, pairs[0].first_hits.shape[1]))
    for slot in range(n_seeds):
        for which, pair in enumerate(pairs):
            rows = np.flatnonzero(chosen[:, slot] == which)
            total[rows] += pair.difference(_weights(generator, len(pair.problems), len(rows)))
    return total / n_seeds


def _weights(generator: np.random.Generator, n_problems: int, draws: int) -> np.ndarray:
    return generator.multinomial(n_problems, np.full(n_problems, 1 / n_problems), size=draws).astype(float)


def percentile_interval(replicates: np.ndarray, alpha: float = ALPHA) -> Interval | None:
    """The α/2 and 1 - α/2 quantiles; None where no replicate has a value."""
    kept = replicates[np.isfinite(replicates)]
    return tuple(np.quantile(kept, [alpha / 2, 1 - alpha / 2]).tolist()) if len(kept) else None


def power(drop: float, sd: float, n: int, alpha: float = ALPHA) -> float:
    """Of the two-sided one-sample t test of n paired differences with this mean and SD (noncentral t)."""
    if n < 2:
        return 0.0
    if sd <= 0:
        return 1.0
    noncentrality = drop / sd * math.sqrt(n)
    critical = stats.t.ppf(1 - alpha / 2, n - 1)
    above = stats.nct.sf(critical, n - 1, noncentrality)
    below = stats.nct.cdf(-critical, n - 1, noncentrality)  # nan far out, where it is 0 to every digit
    return float(above + np.nan_to_num(below))


def seeds_needed(drop: float, sd: float, alpha: float = ALPHA, wanted: float = POWER) -> int | None:
    """The smallest number of seeds with that power; None where MAX_SEEDS would not do."""
    return next((n for n in range(2, MAX_SEEDS + 1) if power(drop, sd, n, alpha) >= wanted), None)


def sd_interval(sd: float, n: int, alpha: float = ALPHA) -> Interval | None:
    """Of the SD itself, as for normal values: SD · √((n - 1) / χ²). None with fewer than two."""
    if n < 2:
        return None
    low, high = stats.chi2.ppf([alpha / 2, 1 - alpha / 2], n - 1)
    return sd * math.sqrt((n - 1) / high), sd * math.sqrt((n - 1) / low)
