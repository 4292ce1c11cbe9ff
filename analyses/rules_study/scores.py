"""How well rules find the knee: by rule over all runs, with thresholds as published and fitted to the other models."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pandas as pd

from diagnostics import Run
from diagnostics.cutoffs.judgement import knee
from diagnostics.cutoffs.rules.reading import curves_of
from diagnostics.cutoffs.rules.rule import Rule

# Factors of a rule's own threshold that are tried, 1 among them.
FACTORS = 2.0 ** (np.arange(-40, 41) / 8)
WITHIN = 1  # layers


@dataclass(frozen=True)
class Measured:
    """One run of the study: ``model``, ``prompts`` (their kind), ``length`` in tokens, and the run."""

    model: str
    prompts: str
    length: int
    run: Run


def readings(measured: Iterable[Measured], goals: Iterable[float], judge: Any) -> pd.DataFrame:
    """Return every rule's reading of every run at every goal, as `judge_rules` gives it."""
    tables = [
        judge(one.run, max_kl=goal).assign(
            model=one.model, prompts=one.prompts, length=one.length, n_prompts=len(one.run.prompts), goal=goal
        )
        for one in measured
        for goal in goals
    ]
    table = pd.concat(tables, ignore_index=True)
    return table[["model", "prompts", "length", "n_prompts", "goal", *(c for c in tables[0] if c in table)][: None]].loc[
        :, lambda t: ~t.columns.duplicated()
    ]


def by_rule(table: pd.DataFrame, n_runs: int) -> pd.DataFrame:
    """Return per rule and goal: runs with a cutoff, shares exact and within one layer of all runs, the worst errors."""
    rows = []
    for (goal, rule), group in table.groupby(["goal", "rule"], sort=False):
        off = group["off"].dropna().astype(int)
        rows.append(
            {
                "goal": goal,
                "rule": rule,
                "title": group["title"].iloc[0],
                "runs": n_runs,
                "found": len(off),
                "exact": (off == 0).sum() / n_runs,
                "within_1": (off.abs() <= WITHIN).sum() / n_runs,
                "mean_error": off.abs().mean(),
                "lowest": off.min(),
                "highest": off.max(),
                "worst_kl": group["kl"].max(),
            }
        )
    return pd.DataFrame(rows)


def fitted(measured: list[Measured], goals: Iterable[float], rules: Mapping[str, Rule]) -> pd.DataFrame:
    """Return per rule and goal how it does with its threshold fitted to all models but the one that it is tried on.

    ``low`` and ``high`` bound the thresholds that stay within one layer on every run, where there are any.
    """
    rows = []
    for name, rule in rules.items():
        threshold = threshold_of(rule)
        for goal in goals if threshold else ():
            errors = {
                value: np.array([_error(variant, one, goal) for one in measured]) for value, variant in _variants(rule)
            }
            models = np.array([one.model for one in measured])
            left_out = np.concatenate([_tried(errors, models == model) for model in dict.fromkeys(models)])
            room = [value for value, found in errors.items() if (np.abs(found) <= WITHIN).all()]
            rows.append(
                {
                    "goal": goal,
                    "rule": name,
                    "threshold": threshold,
                    "own": getattr(rule, str(threshold)),
                    "low": min(room, default=np.nan),
                    "high": max(room, default=np.nan),
                    "left_out_within_1": (np.abs(left_out) <= WITHIN).mean(),
                    "left_out_mean_error": np.abs(left_out).mean(),
                    "left_out_worst": left_out[np.abs(left_out).argmax()],
                }
            )
    return pd.DataFrame(rows)


def threshold_of(rule: Rule) -> str | None:
    """Return the name of a rule's one threshold; None for a rule that has none, or several."""
    names = [field.name for field in fields(rule) if isinstance(getattr(rule, field.name), float)]  # type: ignore[arg-type]
    return names[0] if len(names) == 1 else None


def _variants(rule: Rule) -> Iterator[tuple[float, Rule]]:
    name = threshold_of(rule)
    assert name is not None
    for factor in FACTORS:
        value = getattr(rule, name) * float(factor)
        yield value, replace(rule, **{name: value})  # type: ignore[type-var]


def _error(rule: Rule, one: Measured, goal: float) -> int:
    """Cutoff minus knee; a rule that finds none is off by all layers."""
    cutoff, wanted = rule.cutoff(curves_of(one.run, goal)), knee(one.run, goal)
    return one.run.n_layers if cutoff is None else cutoff - wanted


def _tried(errors: Mapping[float, np.ndarray], left_out: np.ndarray) -> np.ndarray:
    """Return the errors on some runs, with the threshold that is best on the others; of equal ones the middle one."""
    loss = {value: np.abs(found[~left_out]).sum() for value, found in errors.items()}
    best = [value for value in errors if loss[value] == min(loss.values())]
    return errors[best[len(best) // 2]][left_out]
