"""Reads leave-one-out losses: the layers in which the prompt must be seen.

The leave-one-out loss of a layer is KL from full depth where decode rows do not see the prompt in this layer alone. A
layer must see the prompt if its loss is above an even share of the losses of all layers, which is their mean. An even
share of the goal would not do: it is so small that nearly all layers are above it.
"""

from typing import Any

import numpy as np
from scipy import stats

from diagnostics.cutoffs.regions import per_prompt
from diagnostics.runs.run import Run
from diagnostics.support.finite import finite_mean

COLUMN = "leave_one_out_kl"


def must_see(run: Run, uptake: np.ndarray) -> dict[str, Any] | None:
    """Return the layers in which the prompt must be seen, and how uptake [L] follows; None where it was not measured.

    ``leave_one_out_kl`` is the mean over prompts per layer [L] in nats per token, None where a layer has none;
    ``above`` the mean of all layers; ``layers`` those above it; ``uptake_rank_correlation`` Spearman's, -1..1, None
    where it is not defined.
    """
    if COLUMN not in run.layers:
        return None
    losses = finite_mean(per_prompt(run, COLUMN), axis=0)
    share = float(finite_mean(losses, axis=0))
    both = np.isfinite(losses) & np.isfinite(uptake)
    varied = both.sum() > 1 and np.ptp(losses[both]) > 0 and np.ptp(uptake[both]) > 0
    return {
        COLUMN: [float(loss) if np.isfinite(loss) else None for loss in losses],
        "above": share,
        "layers": np.flatnonzero(losses > share).tolist(),
        "uptake_rank_correlation": float(stats.spearmanr(losses[both], uptake[both]).statistic) if varied else None,
    }
