"""Estimates from scores of items: the mean of a task, and the difference of two policies on the same items.

Every policy answers the same items, so policies are compared item by item: the interval is that of the mean paired
difference, never of two independent means. Tests: McNemar's exact test (1947) for right or wrong, Wilcoxon's
signed-rank test (1945) for other scores, Holm's correction (1979) over tasks. Non-inferiority: the one-sided lower
bound of the mean difference is above minus a margin; for right or wrong the bound is Tango's (1998), since
resamples of items without a single loss contain none, and their bound would be too high.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from diagnostics.support.defaults import CONFIDENCE

N_RESAMPLES = 9999
# Resamples drawn at once: they take this many numbers per distinct score.
BLOCK = 500

Scores = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` items with its standard error and bootstrap interval; NaN where n is too small.

    ``low`` and ``high`` bound it on both sides, ``lower_bound`` on one side at the same confidence.
    """

    n: int
    mean: float
    standard_error: float
    low: float
    high: float
    lower_bound: float


@dataclass(frozen=True)
class Difference:
    """A mean paired difference: positive if the policy scores higher than the baseline.

    ``low`` and ``high`` bound it on both sides, ``lower_bound`` on one side at the same confidence; ``p_value`` is
    two-sided, by ``test`` (``mcnemar`` or ``wilcoxon``).
    """

    n: int
    mean: float
    low: float
    high: float
    lower_bound: float
    p_value: float
    test: str

    def non_inferior(self, margin: float) -> bool:
        """Whether the policy is at most ``margin`` below the baseline, at the confidence of ``lower_bound``."""
        return self.lower_bound > -margin


def estimate(scores: Scores, *, confidence: float = CONFIDENCE, seed: int = 0) -> Estimate:
    """Estimate the mean of one task's scores [items]."""
    values = np.asarray(scores, dtype=float)
    n = len(values)
    if n == 0:
        return Estimate(0, *[np.nan] * 5)
    error = float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else np.nan
    return Estimate(n, float(values.mean()), error, *_bounds(_resampled([values], seed), confidence))


def average(tasks: Mapping[str, Scores], *, confidence: float = CONFIDENCE, seed: int = 0) -> Estimate:
    """Estimate the mean over tasks of their mean scores, each task counting the same; items are drawn within tasks."""
    values = [np.asarray(scores, dtype=float) for scores in tasks.values()]
    if not values or not all(len(v) for v in values):
        return Estimate(0, *[np.nan] * 5)
    # The spread of a task with one item is unknown, and so is that of the average.
    variance = sum(v.var(ddof=1) / len(v) if len(v) > 1 else np.nan for v in values)
    mean = float(np.mean([v.mean() for v in values]))
    error = float(np.sqrt(variance)) / len(values)
    return Estimate(sum(map(len, values)), mean, error, *_bounds(_resampled(values, seed), confidence))


def difference(scores: Scores, baseline: Scores, *, confidence: float = CONFIDENCE, seed: int = 0) -> Difference:
    """Compare two policies on the same items, both [items] in the same order; raise ValueError if they do not match."""
    ours, theirs = np.asarray(scores, dtype=float), np.asarray(baseline, dtype=float)
    if ours.shape != theirs.shape or ours.ndim != 1:
        raise ValueError(f"scores of {ours.shape} and {theirs.shape} items cannot be paired")
    binary = bool(np.isin(np.concatenate([ours, theirs]), (0, 1)).all())
    test = "mcnemar" if binary else "wilcoxon"
    if not len(ours):
        return Difference(0, np.nan, np.nan, np.nan, np.nan, np.nan, test)
    paired = ours - theirs
    p_value = mcnemar(ours, theirs) if binary else wilcoxon(paired)
    low, high, lower_bound = _bounds(_resampled([paired], seed), confidence)
    if binary:
        wins, losses = int((paired > 0).sum()), int((paired < 0).sum())
        lower_bound = tango_lower_bound(wins, losses, len(paired), confidence=confidence)
    return Difference(len(paired), float(paired.mean()), low, high, lower_bound, p_value, test)


def tango_lower_bound(wins: int, losses: int, n: int, *, confidence: float = CONFIDENCE) -> float:
    """Return the one-sided lower bound of a difference of paired shares, ``(wins - losses) / n``.

    It is the difference at which the score statistic of Tango (1998), Statistics in Medicine 17, 891-908, equals the
    quantile of ``confidence``; -1 if there is none.
    """

    def excess(difference: float) -> float:
        # The maximum-likelihood share of losses at this difference.
        b = -wins - losses + (2 * n - wins + losses) * difference
        c = -losses * difference * (1 - difference)
        loss_share = (math.sqrt(b * b - 8 * n * c) - b) / (4 * n)
        variance = n * (2 * loss_share + difference * (1 - difference))
        return (wins - losses - n * difference) - stats.norm.ppf(confidence) * math.sqrt(max(variance, 0))

    # At the observed difference the statistic is 0, or undefined where nothing differs.
    least, most = -1 + 1e-12, (wins - losses) / n - 1e-9
    return float(optimize.brentq(excess, least, most)) if least < most and excess(least) > 0 else -1.0


def mcnemar(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the exact two-sided p-value that wins and losses among the items that differ are equally likely."""
    wins, losses = int((ours > theirs).sum()), int((ours < theirs).sum())
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def wilcoxon(paired: np.ndarray) -> float:
    """Return the two-sided p-value of the signed-rank test; equal items count for neither side."""
    return float(stats.wilcoxon(paired[paired != 0]).pvalue) if (paired != 0).any() else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number, so that the chance of any false rejection stays below the level.

    The smallest is multiplied by their number m, the next by m - 1, and so on, none becoming smaller than the one
    before; NaN stays NaN and is not counted.
    """
    values = np.asarray(p_values, dtype=float)
    corrected = np.full(values.shape, np.nan)
    known = np.flatnonzero(np.isfinite(values))
    order = known[np.argsort(values[known], kind="stable")]
    steps = values[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1) if len(order) else steps
    return corrected.tolist()


def _resampled(tasks: Sequence[np.ndarray], seed: int) -> np.ndarray | None:
    """Means over tasks of the means of items drawn with replacement within each task; `N_RESAMPLES` of them.

    None if a task has a single item, whose spread is unknown.
    """
    if any(len(values) < 2 for values in tasks):
        return None
    rng = np.random.default_rng(seed)
    means = np.zeros(N_RESAMPLES)
    for values in tasks:
        # How often each value is drawn, rather than which items: the same draws, and most scores are 0 or 1.
        different, counts = np.unique(values, return_counts=True)
        for start in range(0, N_RESAMPLES, BLOCK):
            block = slice(start, min(start + BLOCK, N_RESAMPLES))
            drawn = rng.multinomial(len(values), counts / len(values), size=block.stop - block.start)
            means[block] += drawn @ different / len(values) / len(tasks)
    return means


def _bounds(means: np.ndarray | None, confidence: float) -> tuple[float, float, float]:
    """Percentiles of resampled means: the two-sided interval and the one-sided lower bound."""
    if means is None:
        return np.nan, np.nan, np.nan
    low, high, lower_bound = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2, 1 - confidence])
    return float(low), float(high), float(lower_bound)
