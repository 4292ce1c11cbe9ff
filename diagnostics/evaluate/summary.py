"""Scores of items -> the table of an evaluation: per task and policy, beside full depth, and on average over tasks."""

from typing import Any

import numpy as np
import pandas as pd

from diagnostics.evaluate.answers import FAILURES
from diagnostics.evaluate.folder import Evaluation
from diagnostics.evaluate.items import AVERAGE
from diagnostics.evaluate.statistics import Estimate, average, difference, estimate, holm

# The baseline, as `FullPolicy.name` has it; to import that would load torch.
FULL = "full"
MARGIN = 0.02


def summarize(evaluation: Evaluation, *, margin: float = MARGIN, seed: int = 0) -> pd.DataFrame:
    """Return one row per policy and task, and one per policy for the average over tasks.

    Columns: policy, task, n, score, standard_error, low, high (95% bootstrap interval); difference to full depth with
    its interval (``difference``, ``difference_low``, ``difference_high``) and one-sided 95% ``lower_bound``;
    ``p_value`` and ``p_holm``, corrected over the tasks of a policy; ``non_inferior``, whether by that bound the score
    is at most ``margin`` below that of full depth; and the rates of each way to fail, NaN for choice tasks. A task
    that a policy did not finish has no row, and a policy no average unless it finished every task that full depth did.
    """
    items = evaluation.items
    wide = {
        str(task): rows.pivot(index="item_id", columns="policy", values="score")
        for task, rows in items.groupby("task", sort=False)
    }
    rows = []
    for policy in items["policy"].unique():
        mine: dict[str, np.ndarray] = {}
        of_policy = []
        for task, table in wide.items():
            if policy not in table:
                continue
            scores = table[policy].to_numpy(float)
            mine[task] = scores
            row = {"policy": policy, "task": task} | _estimated(estimate(scores, seed=seed))
            if policy != FULL and FULL in table:
                found = difference(scores, table[FULL].to_numpy(float), seed=seed)
                row |= {
                    "difference": found.mean,
                    "difference_low": found.low,
                    "difference_high": found.high,
                    "lower_bound": found.lower_bound,
                    "p_value": found.p_value,
                    "test": found.test,
                    "non_inferior": found.non_inferior(margin),
                }
            of_policy.append(row | _failure_rates(items, policy, task))
        for row, corrected in zip(of_policy, holm([row.get("p_value", np.nan) for row in of_policy]), strict=True):
            row["p_holm"] = corrected
        rows += of_policy
        if set(mine) == {task for task, table in wide.items() if FULL in table}:
            rows.append({"policy": policy, "task": AVERAGE} | _averaged(mine, wide, policy, margin, seed))
    return pd.DataFrame(rows)


def markdown(summary: pd.DataFrame) -> str:
    """Return the table as Markdown: policies in rows, tasks, the average and the ways to fail in columns.

    A score is in percent with the half-width of its interval; ``*`` marks a difference to full depth that is
    significant at 5% after correction over tasks.
    """
    tasks = list(dict.fromkeys(summary["task"]))
    failing = [name for name in FAILURES if name in summary and summary[name].notna().any()]
    titles = [str(title).replace("|", r"\|") for title in ("policy", *tasks, *failing)]
    lines = ["| " + " | ".join(titles) + " |", "| --- " * (1 + len(tasks) + len(failing)) + "|"]
    for policy, rows in summary.groupby("policy", sort=False):
        cells = [str(policy)]
        for task in tasks:
            found = rows[rows["task"] == task]
            cells.append(cell(found.iloc[0]) if len(found) else "-")
        for name in failing:
            rate = rows.loc[rows["task"] != AVERAGE, name].mean()
            cells.append("-" if np.isnan(rate) else f"{rate:.1%}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cell(row: pd.Series) -> str:
    """Return a score of the table in percent, with the half-width of its interval."""
    half = (row["high"] - row["low"]) / 2
    spread = "" if np.isnan(half) else f" ± {100 * half:.1f}"
    significant = row.get("p_holm", np.nan) < 0.05
    return f"{100 * row['score']:.1f}{spread}{'*' if significant else ''}"


def _estimated(found: Estimate) -> dict[str, Any]:
    return {
        "n": found.n,
        "score": found.mean,
        "standard_error": found.standard_error,
        "low": found.low,
        "high": found.high,
    }


def _averaged(
    mine: dict[str, np.ndarray], wide: dict[str, pd.DataFrame], policy: str, margin: float, seed: int
) -> dict[str, Any]:
    """The mean over tasks, and its paired difference to full depth: items are drawn within tasks."""
    row = _estimated(average(mine, seed=seed))
    if policy != FULL:
        paired = {task: scores - wide[task][FULL].to_numpy(float) for task, scores in mine.items()}
        found = average(paired, seed=seed)
        row |= {"difference": found.mean, "difference_low": found.low, "difference_high": found.high}
        row |= {"lower_bound": found.lower_bound, "non_inferior": found.lower_bound > -margin}
    return row


def _failure_rates(items: pd.DataFrame, policy: str, task: object) -> dict[str, Any]:
    rows = items[(items["policy"] == policy) & (items["task"] == task)]
    there = [name for name in FAILURES if name in rows and rows[name].notna().any()]
    return {name: float(rows[name].astype(float).mean()) for name in there}
