"""What foretells the loss of a task: the sweep's KL, agreement and likelihood, and each diagnostic.

Every predictor has one number per cutoff, from prompts that have nothing to do with the tasks; every task has one loss
per cutoff. The rank correlation over cutoffs says how well the one orders the other. Since both fall with depth, depth
itself is the predictor to beat.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from diagnostics import Run, SpeedPolicy
from diagnostics.cutoffs.regions import uptake
from diagnostics.evaluate.evaluation_folder import Evaluation
from diagnostics.policies import parse_policy

N_RESAMPLES = 500


def predictors(run: Run) -> dict[str, np.ndarray]:
    """Return what speaks for a loss at each cutoff 1..L, larger for more, from a diagnosis.

    Sums over the layers that lose the prompt for what decode tokens take from it; the first of those layers for what
    happens to the prompt there; the lens after the last layer that has it.
    """
    n_layers = run.n_layers
    cutoffs = run.cutoffs.groupby("cutoff")[["kl", "top1_agreement", "nll"]].mean()
    layers = run.layers.groupby("layer").mean(numeric_only=True)
    lost = {
        "uptake above": uptake(run).mean(axis=0),
        "prompt contribution above": layers["prompt_contribution"].to_numpy(),
        "prompt mass above": layers["mass_prompt"].to_numpy(),
        "selectivity above": layers["selectivity"].to_numpy(),
    }
    found = {
        "KL": cutoffs["kl"].to_numpy(),
        "disagreement": 1 - cutoffs["top1_agreement"].to_numpy(),
        "NLL increase": cutoffs["nll"].to_numpy() - cutoffs["nll"].iloc[-1],
        "depth alone": np.arange(n_layers, 0, -1.0),
    }
    for name, values in lost.items():
        found[name] = np.array([values[k:].sum() for k in range(1, n_layers + 1)])
    at = {
        "drift of the prompt at k (centred)": layers["drift_prompt_centred"],
        "1 - saliency overlap at k": 1 - layers["saliency_overlap"],
    }
    for name, column in at.items():
        found[name] = np.append(column.to_numpy()[1:], np.nan)  # at full depth no layer loses the prompt
    found["lens KL below k"] = layers["lens_kl"].to_numpy()
    return found


def task_losses(evaluation: Evaluation) -> dict[str, dict[str, pd.DataFrame]]:
    """Return per measure and task the loss of every item at every cutoff of SPEED: frames [items, cutoffs].

    Measures: ``score`` (points lost) and ``likelihood`` (nats lost of the right continuation).
    """
    items = evaluation.items
    found: dict[str, dict[str, pd.DataFrame]] = {"score": {}, "likelihood": {}}
    for measure, column in (("score", "score"), ("likelihood", "gold_log_likelihood")):
        for task, rows in items.groupby("task", sort=False):
            wide = rows.pivot(index="item_id", columns="policy", values=column)
            policies = {spec: parse_policy(spec) for spec in wide if spec != "full"}
            cutoffs = {spec: policy.cutoff for spec, policy in policies.items() if isinstance(policy, SpeedPolicy)}
            lost = -wide[list(cutoffs)].sub(wide["full"], axis=0)
            found[measure][str(task)] = lost.rename(columns=cutoffs).sort_index(axis=1)
    return found


def correlations(run: Run, evaluation: Evaluation, *, from_cutoffs: Sequence[int], seed: int = 0) -> pd.DataFrame:
    """Return Spearman's rank correlation over cutoffs of every predictor with every task's loss.

    Columns: from_cutoff (the smallest cutoff taken in), measure, task (or ``all``, the mean over tasks), predictor, rho
    and its 95% bootstrap interval over items (low, high), and Pearson's correlation, which asks for more than order.
    """
    rng = np.random.default_rng(seed)
    by_predictor, rows = predictors(run), []
    for measure, tasks in task_losses(evaluation).items():
        resampled = {
            task: np.stack(
                [lost.to_numpy()[rng.integers(len(lost), size=len(lost))].mean(0) for _ in range(N_RESAMPLES)]
            )
            for task, lost in tasks.items()
        }
        curves = {task: (lost.mean().to_numpy(), resampled[task]) for task, lost in tasks.items()}
        curves["all"] = (np.mean([c for c, _ in curves.values()], axis=0), np.mean(list(resampled.values()), axis=0))
        cutoffs = np.array(next(iter(tasks.values())).columns)
        for first in from_cutoffs:
            for name, values in by_predictor.items():
                # Undefined at the end for what compares a layer with later ones.
                chosen = (cutoffs >= first) & (cutoffs < run.n_layers) & np.isfinite(values[cutoffs - 1])
                predicted = values[cutoffs[chosen] - 1]
                for task, (curve, samples) in curves.items():
                    rho = spearman(predicted, curve[None, chosen])[0]
                    spread = spearman(predicted, samples[:, chosen])
                    spread = spread[np.isfinite(spread)]
                    low, high = np.quantile(spread, [0.025, 0.975]) if len(spread) else (np.nan, np.nan)
                    row = {"from_cutoff": first, "measure": measure, "task": task, "predictor": name}
                    r = _correlation(predicted - predicted.mean(), (curve - curve[chosen].mean())[None, chosen])[0]
                    rows.append(row | {"rho": rho, "low": low, "high": high, "pearson": r})
    return pd.DataFrame(rows)


def spearman(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the rank correlation of ``values`` [n] with each of ``rows`` [m, n]; NaN where either does not vary."""
    mine, theirs = stats.rankdata(values) - (len(values) + 1) / 2, stats.rankdata(rows, axis=1)
    theirs -= (len(values) + 1) / 2
    return _correlation(mine, theirs)


def _correlation(centred: np.ndarray, rows: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return rows @ centred / np.sqrt((rows**2).sum(axis=1) * (centred**2).sum())


def price(run: Run, evaluation: Evaluation) -> pd.DataFrame:
    """Return per cutoff what the tasks lose beside the KL measured on other prompts.

    Columns: cutoff, kl (nats per token), score (mean over tasks, 0..1), lost (points below full depth, with a 95%
    bootstrap interval over items within tasks: low, high), and the points lost of each task.
    """
    from diagnostics.evaluate.statistics import average

    kl = predictors(run)["KL"]
    tasks = task_losses(evaluation)["score"]
    full = {
        str(task): rows.loc[rows["policy"] == "full", "score"].mean() for task, rows in evaluation.items.groupby("task")
    }
    rows = []
    for k in next(iter(tasks.values())).columns:
        found = average({task: lost[k].to_numpy() for task, lost in tasks.items()})
        row = {"cutoff": int(k), "kl": kl[k - 1], "score": np.mean(list(full.values())) - found.mean}
        row |= {"lost": found.mean, "low": found.low, "high": found.high}
        rows.append(row | {task: float(lost[k].mean()) for task, lost in tasks.items()})
    return pd.DataFrame(rows)
