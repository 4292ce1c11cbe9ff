"""Means of finite values: measures are NaN where a prompt, layer or head has nothing to measure."""

import numpy as np


def finite_mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean of the finite values along one axis; NaN where there are none."""
    counted = np.isfinite(values)
    total = np.where(counted, values, 0).sum(axis=axis)
    return np.divide(total, counted.sum(axis=axis), out=np.full(total.shape, np.nan), where=counted.any(axis=axis))


def weighted_mean(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Means of rows, each counted 0 or more times: [n, columns], [resamples, n] -> [resamples, columns].

    Only finite values count; NaN where there are none.
    """
    counted = np.isfinite(values)
    total, weight = counts @ np.where(counted, values, 0), counts @ counted
    return np.divide(total, weight, out=np.full(total.shape, np.nan), where=weight > 0)
