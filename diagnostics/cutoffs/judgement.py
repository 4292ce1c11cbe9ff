"""Judges rules that name a cutoff from the layers alone by the loss that was measured there."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.cutoffs.bounds import MIN_PROMPTS, resample_counts
from diagnostics.cutoffs.losses import ROUNDING, measured_losses, smallest_admissible
from diagnostics.cutoffs.regions import per_prompt, uptake
from diagnostics.cutoffs.rules import all_rules
from diagnostics.cutoffs.rules.rule import Curves, Rule
from diagnostics.runs.run import Run
from diagnostics.support.defaults import MAX_KL
from diagnostics.support.finite import weighted_mean

N_RESAMPLES = 200
NOT_MEASURED = "not measured"  # begins the note of a rule whose measures the run lacks
OURS = ("uptake", "removal-effect")  # the rules of this project stand first
COLUMNS = {
    **dict.fromkeys(("rule", "title"), "str"),
    **dict.fromkeys(("cutoff", "low", "high", "knee", "off"), "Int64"),
    **dict.fromkeys(("kl", "nll_increase", "saved", "saved_vs_knee"), "float64"),
    "note": "str",
}


def judge_rules(
    run: Run,
    *,
    max_kl: float = MAX_KL,
    rules: Iterable[Rule] | None = None,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Ask rules for their cutoffs, and judge each by the measured loss; a run without a sweep has the cutoffs alone.

    Parameters
    ----------
    run
        The run; a rule whose measures it does not have has a row that says so.
    max_kl
        The goal, in nats per token: of the knee, and of rules whose threshold follows it.
    rules
        Every rule by default.
    n_resamples
        Resamples of the prompts for the range of a rule's cutoff.
    seed
        Of the resamples.

    Returns
    -------
    pandas.DataFrame
        A row per rule, ours first: rule, title; cutoff, 1..L or missing; low and high, between which 90% of the
        resamples have it, missing with too few prompts; knee; off, cutoff - knee; kl and nll_increase measured at the
        cutoff, nats per token; saved, the share of the prefill's layers that do not run, and saved_vs_knee, the same
        against the knee, below 0 where the rule saves less; note, why there is no cutoff and how to read it.
    """
    rules = list(all_rules().values() if rules is None else rules)
    rules.sort(key=lambda rule: OURS.index(rule.name) if rule.name in OURS else len(OURS))
    measures = Measures(run, rules)
    n_prompts = len(run.prompts)
    every = next(measures.means(np.ones((1, n_prompts)), max_kl))
    counts = resample_counts(np.random.default_rng(seed), n_prompts, n_resamples if n_prompts >= MIN_PROMPTS else 0)
    resampled = [curves for block in counts for curves in measures.means(block, max_kl)]
    losses = _mean_losses(run)
    at_knee = _knee(losses, max_kl)
    rows = []
    for rule in rules:
        absent = measures.absent(rule)
        cutoff = None if absent else rule.cutoff(every)
        row: dict[str, Any] = {"rule": rule.name, "title": rule.title, "cutoff": cutoff, "knee": at_knee}
        notes = [f"{NOT_MEASURED}: diagnose with `rules='all,{rule.name}'`"] if absent else [rule.remark(every)]
        if cutoff is not None:
            found = [k for curves in resampled if (k := rule.cutoff(curves)) is not None]
            if found:
                row["low"], row["high"] = np.percentile(found, (5, 95), method="nearest").astype(int).tolist()
            if len(found) < len(resampled):
                notes.append(f"found in {len(found)} of {len(resampled)} resamples")
            row["saved"] = 1 - cutoff / run.n_layers
            row |= {name: values[cutoff - 1] for name, values in losses.items()}
            if at_knee is not None:
                row |= {"off": cutoff - at_knee, "saved_vs_knee": (at_knee - cutoff) / run.n_layers}
            if rule.ours and rule.name not in OURS:
                notes.append("map ours")
        elif not absent:
            notes.append(rule.why_none(every))
        rows.append({name: row.get(name) for name in COLUMNS} | {"note": "; ".join(filter(None, notes))})
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


def judged_records(run: Run, *, max_kl: float, seed: int) -> list[dict[str, Any]]:
    """Return the rows of `judge_rules` as plain values for JSON; what is missing is None."""
    rows = judge_rules(run, max_kl=max_kl, seed=seed).to_dict("records")
    return [{str(name): None if pd.isna(value) else value for name, value in row.items()} for row in rows]


def knee(run: Run, max_kl: float) -> int | None:
    """Return the smallest cutoff from which on every measured mean KL is within ``max_kl``, in nats per token.

    None without a sweep, and where even full depth is not within it, as against a teacher.
    """
    return _knee(_mean_losses(run), max_kl)


def _knee(losses: dict[str, np.ndarray], max_kl: float) -> int | None:
    """Return the knee from the mean losses of a run; None where there are none."""
    if not losses:
        return None
    within = losses["kl"] <= max_kl + ROUNDING
    return smallest_admissible(within) if within[-1] else None


class Measures:
    """What rules read of a run, prompt by prompt, from which the curves of any resample follow.

    ``layers`` are columns [prompts, L], ``heads`` columns [prompts, L, heads].
    """

    def __init__(self, run: Run, rules: Iterable[Rule]) -> None:
        rules = list(rules)
        self.n_layers, self.shortest = run.n_layers, int(run.prompts["n_prompt"].min())
        wanted = {column for rule in rules for column in rule.reads}
        self.layers = {name: per_prompt(run, name) for name in sorted(wanted) if name in run.layers}
        if "uptake" in wanted:
            self.layers["uptake"] = uptake(run)
        wanted = {column for rule in rules for column in rule.reads_heads}
        self.heads = {name: run.array(name) for name in sorted(wanted) if name in run.heads}

    def absent(self, rule: Rule) -> bool:
        """Whether the run lacks a column that the rule reads."""
        return not (set(rule.reads) <= self.layers.keys() and set(rule.reads_heads) <= self.heads.keys())

    def means(self, counts: np.ndarray, max_kl: float) -> Iterator[Curves]:
        """Yield the mean curves of resamples, from how often each counts each prompt: [resamples, prompts]."""
        layers = {name: weighted_mean(values, counts) for name, values in self.layers.items()}
        heads = {
            name: weighted_mean(values.reshape(len(values), -1), counts).reshape(len(counts), *values.shape[1:])
            for name, values in self.heads.items()
        }
        for i in range(len(counts)):
            yield Curves(
                layers={name: values[i] for name, values in layers.items()},
                heads={name: values[i] for name, values in heads.items()},
                n_layers=self.n_layers,
                max_kl=max_kl,
                shortest=self.shortest,
            )


def _mean_losses(run: Run) -> dict[str, np.ndarray]:
    """Return the mean KL and rise of the NLL at every cutoff, [L] each; nothing without a sweep."""
    if not run.has_sweep:
        return {}
    losses = measured_losses(run)
    return {name: losses[name].mean(axis=0) for name in ("kl", "nll_increase")}
