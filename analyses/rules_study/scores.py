"""How well rules find the knee: by rule over all runs, with thresholds as published and fitted to the other models."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import pandas as pd

from diagnostics import Run
from diagnostics.cutoffs.judgement import NOT_MEASURED, Measures, judge_rules, knee
from diagnostics.cutoffs.must_see import must_see
from diagnostics.cutoffs.regions import uptake
from diagnostics.cutoffs.rules.rule import Curves, Rule
from diagnostics.support.finite import finite_mean

# Factors that are tried of the odds t / (1 - t) of a rule's own threshold t: all thresholds are between 0 and 1.
FACTORS = 2.0 ** (np.arange(-40, 41) / 8)
WITHIN = 1  # layers


@dataclass(frozen=True)
class Measured:
    """One run of the study: ``model``, ``prompts`` (their kind), ``length`` in tokens, and the run."""

    model: str
    prompts: str
    length: int
    run: Run


def readings(measured: Iterable[Measured], goals: Iterable[float]) -> pd.DataFrame:
    """Return every rule's reading of every run at every goal, as `judge_rules` gives it."""
    tables = []
    for one in measured:
        about = {"model": one.model, "prompts": one.prompts, "length": one.length, "n_prompts": len(one.run.prompts)}
        for goal in goals:
            read = judge_rules(one.run, max_kl=goal)
            tables.append(pd.DataFrame(about | {"goal": goal}, index=read.index).join(read))
    return pd.concat(tables, ignore_index=True)


def by_rule(table: pd.DataFrame) -> pd.DataFrame:
    """Return per rule and goal: runs that have its measures, shares exact and within one layer of them, worst errors.

    A run where the rule finds no cutoff counts as missed.
    """
    rows = []
    asked = table[~table["note"].str.startswith(NOT_MEASURED)]
    for (goal, rule), group in asked.groupby(["goal", "rule"], sort=False):
        off = group["off"].dropna().astype(int)
        rows.append(
            {
                "goal": goal,
                "rule": rule,
                "title": group["title"].iloc[0],
                "runs": len(group),
                "found": len(off),
                "exact": (off == 0).sum() / len(group),
                "within_1": (off.abs() <= WITHIN).sum() / len(group),
                "mean_error": off.abs().mean(),
                "lowest": off.min(),
                "highest": off.max(),
                "worst_kl": group["kl"].max(),
            }
        )
    return pd.DataFrame(rows)


def fitted(measured: list[Measured], goals: Iterable[float], rules: Mapping[str, Rule]) -> pd.DataFrame:
    """Return per rule and goal how it does with its threshold fitted to all models but the one that it is tried on.

    Only rules with one threshold, on the runs that have their measures. ``low`` and ``high`` bound the thresholds that
    stay within one layer on all of these, where there are any.
    """
    rows = []
    for name, rule in rules.items():
        threshold = threshold_of(rule)
        every = [(one, measures) for one in measured if not (measures := Measures(one.run, [rule])).absent(rule)]
        if threshold is None or not every:
            continue
        models = np.array([one.model for one, _ in every])
        for goal in goals:
            wanted = [knee(one.run, goal) for one, _ in every]
            curves = [next(measures.means(np.ones((1, len(one.run.prompts))), goal)) for one, measures in every]
            errors = {value: _errors(variant, curves, wanted) for value, variant in _variants(rule, threshold)}
            left_out = np.concatenate([_tried(errors, models == model) for model in dict.fromkeys(models)])
            room = [value for value, found in errors.items() if (np.abs(found) <= WITHIN).all()]
            rows.append(
                {
                    "goal": goal,
                    "rule": name,
                    "threshold": threshold,
                    "runs": len(every),
                    "own": getattr(rule, threshold),
                    "low": min(room, default=np.nan),
                    "high": max(room, default=np.nan),
                    "left_out_within_1": (np.abs(left_out) <= WITHIN).mean(),
                    "left_out_mean_error": np.abs(left_out).mean(),
                    "left_out_worst": left_out[np.abs(left_out).argmax()],
                }
            )
    return pd.DataFrame(rows)


def must_see_layers(measured: Iterable[Measured]) -> pd.DataFrame:
    """Return, per run with leave-one-out losses, the layers in which the prompt must be seen, and how uptake agrees."""
    rows = []
    for one in measured:
        seen = must_see(one.run, finite_mean(uptake(one.run), axis=0))
        if seen is not None:
            about = {"model": one.model, "prompts": one.prompts, "length": one.length, "n_layers": one.run.n_layers}
            layers = " ".join(map(str, seen["layers"]))
            rows.append(about | {"layers": layers, "uptake_rank_correlation": seen["uptake_rank_correlation"]})
    return pd.DataFrame(rows)


def threshold_of(rule: Rule) -> str | None:
    """Return the name of a rule's one threshold; None for a rule that has none, or several."""
    names = [field.name for field in fields(rule) if isinstance(getattr(rule, field.name), float)]
    return names[0] if len(names) == 1 else None


def _variants(rule: Rule, threshold: str) -> Iterator[tuple[float, Rule]]:
    own = getattr(rule, threshold)
    for odds in own / (1 - own) * FACTORS:
        value = float(odds / (1 + odds))
        yield value, replace(rule, **{threshold: value})


def _errors(rule: Rule, curves: list[Curves], wanted: list[int]) -> np.ndarray:
    """Return cutoff minus knee of every run; a rule that finds none is off by all layers."""
    found = [rule.cutoff(one) for one in curves]
    return np.array([one.n_layers if k is None else k - at for one, k, at in zip(curves, found, wanted, strict=True)])


def _tried(errors: Mapping[float, np.ndarray], left_out: np.ndarray) -> np.ndarray:
    """Return the errors on some runs, with the threshold that is best on the others; of equal ones the middle one."""
    loss = {value: np.abs(found[~left_out]).sum() for value, found in errors.items()}
    best = [value for value in errors if loss[value] == min(loss.values())]
    return errors[best[len(best) // 2]][left_out]
