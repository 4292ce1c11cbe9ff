"""Compares every cutoff before and after a fine-tuning."""

from __future__ import annotations

import pandas as pd

from diagnostics.finetune.finetuning_folder import FineTuning

COLUMNS = ("kl", "top1_agreement", "nll")


def compare_cutoffs(finetuning: FineTuning) -> pd.DataFrame:
    """Return a row per cutoff 1..L: means over the held-out prompts before training and at the last measurement.

    Columns: ``cutoff``, then ``kl_before``, ``kl_after`` (nats per token), and so on for ``top1_agreement`` (0..1) and
    ``nll`` (nats per token, of the reference).
    """
    columns = {
        f"{name}_{when}": finetuning.curve(step, name)
        for name in COLUMNS
        for when, step in (("before", 0), ("after", None))
    }
    return pd.DataFrame(columns).rename_axis("cutoff").reset_index()


def by_category(finetuning: FineTuning, cutoff: int) -> pd.DataFrame:
    """Return the mean KL at a cutoff for each category of held-out prompts: columns ``before`` and ``after``."""
    at = finetuning.sweeps[finetuning.sweeps["cutoff"] == cutoff]
    means = at.pivot_table(index="category", columns="step", values="kl")
    return pd.DataFrame({"before": means[0], "after": means[means.columns.max()]})
