"""The measured losses of a run at every cutoff, and which cutoffs they admit."""

import numpy as np
import pandas as pd

from diagnostics.runs.run import Run
from diagnostics.support.errors import UserError

ROUNDING = 1e-9  # so that an agreement of 0.9 meets a goal of 0.9


def measured_losses(run: Run) -> dict[str, np.ndarray]:
    """Return every loss as [prompts, cutoffs 1..L], in the order of the prompts table."""
    table = run.cutoffs.assign(
        nll_increase=run.cutoffs["nll"] - run.cutoffs["nll_full"],
        disagreement=1 - run.cutoffs["top1_agreement"],
    )
    order = run.prompts["prompt_id"]
    losses = {
        name: table.pivot(index="prompt_id", columns="cutoff", values=name).loc[order].to_numpy()
        for name in ("kl", "nll_increase", "disagreement")
    }
    for name, rows in losses.items():
        if not np.isfinite(rows).all():
            worst = order.iloc[int(np.argmin(np.isfinite(rows).all(axis=1)))]
            raise UserError(
                f"run {run.name!r} cannot be judged: {name} of prompt {worst!r} is not a number at some cutoff"
            )
    return losses


def smallest_admissible(admissible: np.ndarray) -> int:
    """Return the smallest k such that cutoffs k..L-1 are all admissible, from bool [L], entry k-1 for k; L if none."""
    k = len(admissible)
    while k > 1 and admissible[k - 2]:
        k -= 1
    return k


def by_category(run: Run, losses: np.ndarray) -> pd.DataFrame:
    """Return the mean loss of every category of prompts at every cutoff: frame [categories, 1..L]."""
    table = pd.DataFrame(losses, columns=range(1, run.n_layers + 1))
    return table.groupby(run.prompts["category"].astype(str).to_numpy()).mean()


def loss_by_category(run: Run, cutoff: int) -> dict[str, float]:
    """Return the mean KL at the cutoff for each category of prompts, nats per token."""
    return {str(name): float(kl) for name, kl in by_category(run, measured_losses(run)["kl"])[cutoff].items()}
