"""Confidence bounds by bootstrap over prompts: the prompt is the unit that is sampled, not the token."""

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
N_RESAMPLES = 9999
# Below this a bootstrap only reshuffles a handful of numbers; its bound would promise what it cannot know.
MIN_PROMPTS = 5


def upper_bound(
    values: np.ndarray, *, confidence: float = CONFIDENCE, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> np.ndarray | None:
    """Return the one-sided upper confidence bound of the mean over prompts: [prompts, columns] -> [columns].

    Bias-corrected and accelerated bootstrap (Efron, 1987), since losses are skewed to the right; percentile bootstrap
    where that is undefined; the value itself where all prompts agree. None with fewer than `MIN_PROMPTS` prompts.
    """
    if len(values) < MIN_PROMPTS:
        return None
    bound = values.mean(axis=0)
    varied = np.flatnonzero(np.ptp(values, axis=0) > 0)
    if not len(varied):
        return bound
    for method in ("BCa", "percentile"):
        unknown = varied if method == "BCa" else varied[~np.isfinite(bound[varied])]
        if not len(unknown):
            break
        with np.errstate(all="ignore"):
            found = stats.bootstrap(
                (values[:, unknown],),
                np.mean,
                axis=0,
                alternative="less",
                confidence_level=confidence,
                n_resamples=n_resamples,
                method=method,
                rng=np.random.default_rng(seed),
            )
        bound[unknown] = found.confidence_interval.high
    return bound
