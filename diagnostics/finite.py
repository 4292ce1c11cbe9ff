"""Means over what is there: measures are NaN where a prompt, layer or head has nothing to measure."""

import numpy as np


def finite_mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean along one axis of what is not NaN; NaN where nothing is."""
    counted = np.isfinite(values)
    total = np.where(counted, values, 0).sum(axis=axis)
    return np.divide(total, counted.sum(axis=axis), out=np.full(total.shape, np.nan), where=counted.any(axis=axis))
