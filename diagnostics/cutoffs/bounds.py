"""Confidence bounds by bootstrap over prompts: the sampling unit is the prompt, not the token."""

from collections.abc import Iterator

import numpy as np
from scipy import special

from diagnostics.support.defaults import CONFIDENCE

N_RESAMPLES = 9999
# With fewer prompts a bootstrap only reshuffles a handful of numbers, and its bound would be misleading.
MIN_PROMPTS = 5
# Number of draws held at once while resampling: 16 MB.
BLOCK = 2_000_000
# A resample that is a permutation of the sample has the same mean up to rounding.
TIE = 1e-12


def upper_bound(
    values: np.ndarray, *, confidence: float = CONFIDENCE, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> np.ndarray | None:
    """Return the one-sided upper confidence bound of the mean over prompts: [prompts, columns] -> [columns].

    Bias-corrected and accelerated bootstrap (Efron, 1987), since losses are skewed to the right; percentile bootstrap
    where that is undefined; the value itself where all prompts agree. None with fewer than `MIN_PROMPTS` prompts.
    """
    if len(values) < MIN_PROMPTS:
        return None
    values = np.asarray(values, dtype=float)
    bound = values.mean(axis=0)
    varied = np.flatnonzero(np.ptp(values, axis=0) > 0)
    if len(varied):
        rng = np.random.default_rng(seed)
        means = np.concatenate(
            [counts @ values[:, varied] for counts in resample_counts(rng, len(values), n_resamples)]
        ) / len(values)
        bound[varied] = _bounds(values[:, varied], means, confidence)
    return bound


def resample_counts(rng: np.random.Generator, n: int, n_resamples: int) -> Iterator[np.ndarray]:
    """Yield how often each of ``n`` items is drawn in each resample, a block of resamples at a time: [block, n].

    The counts of a resample, n numbers, determine the mean of any values; the draws are those of
    `scipy.stats.bootstrap` with the same generator.
    """
    block = max(1, BLOCK // n)
    for start in range(0, n_resamples, block):
        size = min(block, n_resamples - start)
        drawn = rng.integers(0, n, (size, n)) + np.arange(size)[:, None] * n
        yield np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(float)


def _bounds(values: np.ndarray, means: np.ndarray, confidence: float) -> np.ndarray:
    """Upper bounds from the means of resamples [n_resamples, columns]: BCa, percentile where that is undefined."""
    mean, scale = values.mean(axis=0), np.abs(values).max(axis=0)
    distance = means - mean
    ties = np.abs(distance) <= TIE * scale
    below = ((distance < 0) & ~ties).mean(axis=0) + ties.mean(axis=0) / 2
    # Jackknife: leaving out a value shifts the mean by its distance from it, so the skewness gives the acceleration.
    centred = values - mean
    acceleration = (centred**3).sum(axis=0) / (6 * (centred**2).sum(axis=0) ** 1.5)
    bias = special.ndtri(below)
    with np.errstate(all="ignore"):
        moved = bias + special.ndtri(confidence)
        level = special.ndtr(bias + moved / (1 - acceleration * moved))
    level = np.where(np.isfinite(level), level, confidence)
    return np.array([np.quantile(column, share) for column, share in zip(means.T, level, strict=True)])
