"""Scores of items -> the table of an evaluation: per task and policy, against full depth, and averaged over tasks."""

from typing import Any

import numpy as np
import pandas as pd

from diagnostics.evaluate.answer_metrics import FAILURES
from diagnostics.evaluate.evaluation_folder import Evaluation
from diagnostics.evaluate.items import AVERAGE
from diagnostics.evaluate.statistics import Estimate, average, difference, estimate, holm
from diagnostics.policies.full import FullPolicy
from diagnostics.support.defaults import MARGIN

FULL = FullPolicy.name  # the baseline
KEPT = "kept, %"


def summarize(evaluation: Evaluation, *, margin: float = MARGIN, seed: int = 0) -> pd.DataFrame:
    """Return one row per policy and task, and one per policy for the average over tasks.

    Columns: policy, task, n, score, standard_error, low, high (95% bootstrap interval); ``retention``, the score as a
    share of full depth's, NaN where that is 0 or missing; difference to full depth with its interval
    (``difference``, ``difference_low``, ``difference_high``) and one-sided 95% ``lower_bound``; ``p_value`` and
    ``p_holm``, corrected over the tasks of a policy; ``non_inferior``, whether by that bound the score is at most
    ``margin`` below that of full depth; and the rates of each way to fail, NaN for choice tasks. A task that a policy
    did not finish has no row, and a policy no average unless it finished every task that full depth did.
    """
    items = evaluation.items
    wide = {
        str(task): rows.pivot(index="item_id", columns="policy", values="score")
        for task, rows in items.groupby("task", sort=False)
    }
    rows = []
    for policy in items["policy"].unique():
        own_scores: dict[str, np.ndarray] = {}
        of_policy = []
        for task, table in wide.items():
            if policy not in table:
                continue
            scores = table[policy].to_numpy(float)
            own_scores[task] = scores
            row = {"policy": policy, "task": task} | _estimated(estimate(scores, seed=seed))
            row["retention"] = _share(scores, table[FULL]) if FULL in table else np.nan
            if policy != FULL and FULL in table:
                gap = difference(scores, table[FULL].to_numpy(float), seed=seed)
                row |= {
                    "difference": gap.mean,
                    "difference_low": gap.low,
                    "difference_high": gap.high,
                    "lower_bound": gap.lower_bound,
                    "p_value": gap.p_value,
                    "test": gap.test,
                    "non_inferior": gap.non_inferior(margin),
                }
            of_policy.append(row | _failure_rates(items, policy, task))
        for row, corrected in zip(of_policy, holm([row.get("p_value", np.nan) for row in of_policy]), strict=True):
            row["p_holm"] = corrected
        rows += of_policy
        if set(own_scores) == {task for task, table in wide.items() if FULL in table}:
            rows.append({"policy": policy, "task": AVERAGE} | _averaged(own_scores, wide, policy, margin, seed))
    return pd.DataFrame(rows)


def texts(summary: pd.DataFrame, *, spread: bool = True) -> pd.DataFrame:
    """Return the table as texts: policies in rows; tasks, the average, its retention, and ways to fail in columns.

    A score is in percent, with ``spread`` also the half-width of its interval; ``*`` marks a difference to full depth
    that is significant at 5% after correction over tasks. Ways to fail appear if answers were generated.
    """
    tasks = sorted(dict.fromkeys(summary["task"]), key=lambda task: task == AVERAGE)
    failing = [name for name in FAILURES if name in summary and summary[name].notna().any()]
    lines = {}
    for policy, rows in summary.groupby("policy", sort=False):
        by_task, of_tasks = rows.set_index("task"), rows[rows["task"] != AVERAGE]
        line = {task: cell(by_task.loc[task], spread) if task in by_task.index else "-" for task in tasks}
        kept = by_task["retention"].get(AVERAGE, np.nan)
        line[KEPT] = "-" if np.isnan(kept) else f"{100 * kept:.0f}"
        for name in failing:
            rate = of_tasks[name].mean()
            line[f"{name}, %"] = "-" if np.isnan(rate) else f"{100 * rate:.1f}"
        lines[str(policy)] = line
    return pd.DataFrame.from_dict(lines, orient="index")


def markdown(summary: pd.DataFrame) -> str:
    """Return the table of `texts` as Markdown."""
    table = texts(summary)
    rows = [["policy", *table.columns], ["---"] * (1 + len(table.columns))]
    rows += [[policy, *row] for policy, row in zip(table.index, table.to_numpy().tolist(), strict=True)]
    return "".join("| " + " | ".join(str(text).replace("|", r"\|") for text in row) + " |\n" for row in rows)


def cell(row: pd.Series, spread: bool = True) -> str:
    """Return a score of the table in percent, as `texts` has it."""
    half = (row["high"] - row["low"]) / 2 if spread else np.nan
    interval = "" if np.isnan(half) else f" ± {100 * half:.1f}"
    significant = row.get("p_holm", np.nan) < 0.05
    return f"{100 * row['score']:.1f}{interval}{'*' if significant else ''}"


def kept(summary: pd.DataFrame, policy: str, margin: float) -> str:
    """Say in plain words what a policy keeps of full depth, from a summary with ``non_inferior`` at the margin."""
    of_tasks = summary[summary["task"] != AVERAGE]
    rows = of_tasks[(of_tasks["policy"] == policy) & of_tasks["difference"].notna()]
    averages = summary[summary["task"] == AVERAGE].set_index("policy")["score"]
    n = of_tasks["task"].nunique()
    parts = [f"finished {len(rows)} of {plural(n)}"]
    if policy in averages and averages.get(FULL, 0) > 0:
        ours, full = averages[policy], averages[FULL]
        parts = [f"keeps {ours / full:.0%} of the average score ({100 * ours:.1f} of {100 * full:.1f} points)"]
    significant = rows["p_holm"].astype(float) < 0.05
    below, above = (int((significant & (sign * rows["difference"] > 0)).sum()) for sign in (-1, 1))
    parts.append(f"significantly below full depth on {below} of {plural(len(rows))}")
    if above:
        parts.append(f"above it on {above}")
    parts.append(f"non-inferior at {100 * margin:g} points on {int(rows['non_inferior'].sum())} of {len(rows)}")
    return "; ".join(parts)


def plural(n_tasks: int) -> str:
    """Count tasks."""
    return f"{n_tasks} task{'' if n_tasks == 1 else 's'}"


def _share(scores: Any, full: Any) -> float:
    return float(np.mean(scores) / np.mean(full)) if np.mean(full) > 0 else np.nan


def _estimated(score: Estimate) -> dict[str, Any]:
    return {
        "n": score.n,
        "score": score.mean,
        "standard_error": score.standard_error,
        "low": score.low,
        "high": score.high,
    }


def _averaged(
    own_scores: dict[str, np.ndarray], wide: dict[str, pd.DataFrame], policy: str, margin: float, seed: int
) -> dict[str, Any]:
    """The mean over tasks, and its paired difference to full depth: items are drawn within tasks."""
    row = _estimated(average(own_scores, seed=seed))
    means = [[scores.mean(), wide[task][FULL].mean()] for task, scores in own_scores.items()]
    row["retention"] = _share(*np.transpose(means)) if means else np.nan
    if policy != FULL:
        paired = {task: scores - wide[task][FULL].to_numpy(float) for task, scores in own_scores.items()}
        gap = average(paired, seed=seed)
        row |= {"difference": gap.mean, "difference_low": gap.low, "difference_high": gap.high}
        row |= {"lower_bound": gap.lower_bound, "non_inferior": gap.lower_bound > -margin}
    return row


def _failure_rates(items: pd.DataFrame, policy: str, task: object) -> dict[str, Any]:
    rows = items[(items["policy"] == policy) & (items["task"] == task)]
    measured = [name for name in FAILURES if name in rows and rows[name].notna().any()]
    return {name: float(rows[name].astype(float).mean()) for name in measured}
