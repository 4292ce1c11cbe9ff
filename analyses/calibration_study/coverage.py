"""How often a recommended cutoff keeps its promise on prompts that it has not seen.

Prompts are drawn to recommend from; the others tell the truth. The promise is kept if the mean KL of the others, at the
recommended cutoff, is within the goal. Rules differ in what they hold against the goal: the mean over the drawn
prompts, or an upper 95% bound of it, which claims that the promise is kept in 95 of 100 draws.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from diagnostics.cutoffs.bounds import CONFIDENCE, upper_bound
from diagnostics.cutoffs.losses import smallest_admissible

SIZES = (8, 16, 32, 64)
GOALS = (0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)
# Fewer resamples than the recommender takes: noise of the bound is small beside that of the draw.
N_RESAMPLES = 999

Rule = Callable[[np.ndarray, int], np.ndarray]


def mean_rule(rows: np.ndarray, _: int) -> np.ndarray:
    """The mean alone, without a bound."""
    return rows.mean(axis=0)


def bca_rule(rows: np.ndarray, seed: int) -> np.ndarray:
    """The recommender's own bound: bias-corrected and accelerated bootstrap."""
    found = upper_bound(rows, n_resamples=N_RESAMPLES, seed=seed)
    assert found is not None
    return found


def percentile_rule(rows: np.ndarray, seed: int) -> np.ndarray:
    """The percentile bootstrap."""
    drawn = np.random.default_rng(seed).integers(len(rows), size=(N_RESAMPLES, len(rows)))
    return np.quantile(rows[drawn].mean(axis=1), CONFIDENCE, axis=0)


def student_rule(rows: np.ndarray, _: int) -> np.ndarray:
    """Student's t, as if losses were normal."""
    error = rows.std(axis=0, ddof=1) / np.sqrt(len(rows))
    return rows.mean(axis=0) + stats.t.ppf(CONFIDENCE, len(rows) - 1) * error


def bootstrap_t_rule(rows: np.ndarray, seed: int) -> np.ndarray:
    """The studentized bootstrap, which takes up the skew of the losses."""
    n, mean = len(rows), rows.mean(axis=0)
    drawn = rows[np.random.default_rng(seed).integers(n, size=(N_RESAMPLES, n))]
    error = rows.std(axis=0, ddof=1) / np.sqrt(n)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (drawn.mean(axis=1) - mean) / (drawn.std(axis=1, ddof=1) / np.sqrt(n))
    # Draws of one prompt over and over say nothing of the spread; where all prompts agree there is none.
    t = np.where(np.isfinite(t) | (error == 0), t, np.nan)
    low = np.nanquantile(np.where(error == 0, 0, t), 1 - CONFIDENCE, axis=0)
    return mean - low * error


RULES: dict[str, Rule] = {
    "mean": mean_rule,
    "percentile": percentile_rule,
    "bca": bca_rule,
    "student": student_rule,
    "bootstrap-t": bootstrap_t_rule,
}


def cutoff_by(rule: Rule, rows: np.ndarray, goals: Sequence[float], seed: int) -> list[int]:
    """Return the cutoff that a rule takes from losses [prompts, L], for each goal."""
    bound = rule(rows, seed)
    return [smallest_admissible(bound <= goal) for goal in goals]


def coverage(losses: np.ndarray, *, draws: int = 400, seed: int = 0) -> pd.DataFrame:
    """Return, per size, rule and goal, how often the promise is kept and how deep the cutoff is.

    ``losses`` [prompts, L] of the whole pool. Columns: n, rule, goal, kept (share of draws), cutoff (mean), excess
    (mean of the cutoff minus the smallest that the others allow), worst (95th percentile of the others' loss / goal).
    """
    rng = np.random.default_rng(seed)
    rows = []
    for n in SIZES:
        if n > len(losses) // 2:
            continue
        kept: dict[tuple[str, float], list[tuple[bool, int, int, float]]] = {}
        for draw in range(draws):
            order = rng.permutation(len(losses))
            seen, truth = losses[order[:n]], losses[order[n:]].mean(axis=0)
            best = [smallest_admissible(truth <= goal) for goal in GOALS]
            for name, rule in RULES.items():
                for goal, ideal, k in zip(GOALS, best, cutoff_by(rule, seen, GOALS, draw), strict=True):
                    met = bool(truth[k - 1] <= goal)
                    kept.setdefault((name, goal), []).append((met, k, k - ideal, truth[k - 1] / goal))
        for (name, goal), found in kept.items():
            met, k, excess, ratio = (np.array(values, dtype=float) for values in zip(*found, strict=True))
            row = {"n": n, "rule": name, "goal": goal, "kept": met.mean(), "cutoff": k.mean()}
            rows.append(row | {"excess": excess.mean(), "worst": float(np.quantile(ratio, 0.95))})
    return pd.DataFrame(rows)


def transfer(seen: np.ndarray, others: dict[str, np.ndarray]) -> pd.DataFrame:
    """Return, per goal and set of other prompts, whether the cutoff recommended from ``seen`` [prompts, L] holds there.

    Columns: prompts, n, goal, cutoff, loss (mean of the others at that cutoff), kept, ideal (the smallest cutoff that
    they allow).
    """
    cutoffs = cutoff_by(bca_rule, seen, GOALS, 0)
    return pd.DataFrame([row for name, losses in others.items() for row in _held_against(cutoffs, name, losses)])


def left_out(by_source: dict[str, np.ndarray]) -> pd.DataFrame:
    """Return whether a cutoff recommended from all sources but one holds for that one, in the columns of `transfer`.

    By two rules: ``bca``, on all prompts alike; and ``every source``, where in addition the mean of every source that
    was seen has to be within the goal.
    """
    rows = []
    for name, losses in by_source.items():
        seen = [others for source, others in by_source.items() if source != name]
        bound = bca_rule(np.concatenate(seen), 0)
        strict = np.max([bound, *(others.mean(axis=0) for others in seen)], axis=0)
        for rule, values in (("bca", bound), ("every source", strict)):
            cutoffs = [smallest_admissible(values <= goal) for goal in GOALS]
            rows += [{"rule": rule} | row for row in _held_against(cutoffs, name, losses)]
    return pd.DataFrame(rows)


def _held_against(cutoffs: Sequence[int], name: str, losses: np.ndarray) -> list[dict[str, Any]]:
    truth = losses.mean(axis=0)
    return [
        {
            "prompts": name,
            "n": len(losses),
            "goal": goal,
            "cutoff": k,
            "loss": truth[k - 1],
            "kept": bool(truth[k - 1] <= goal),
            "ideal": smallest_admissible(truth <= goal),
        }
        for goal, k in zip(GOALS, cutoffs, strict=True)
    ]
