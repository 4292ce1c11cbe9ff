"""Recommends a cutoff from a run, with the evidence for it.

A cutoff is *admissible* when the upper confidence bound, over prompts, of its measured loss is within the goal. The
recommendation is the smallest admissible cutoff from which every larger one is admissible too. It is compared with the
regions, which do not use the loss, and says whether they agree.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.cutoffs.answer import answer
from diagnostics.cutoffs.bounds import MIN_PROMPTS, upper_bound
from diagnostics.cutoffs.goals import goals_in_words
from diagnostics.cutoffs.regions import Region, RegionRules, Regions, find_regions
from diagnostics.cutoffs.savings import LENGTHS, predict_savings
from diagnostics.runs.run import Run, load_run
from diagnostics.support.defaults import CONFIDENCE, MAX_KL
from diagnostics.support.errors import UserError, require
from diagnostics.support.files import dump_json, read_json, write_sealed
from diagnostics.support.overview import Overview, Readable

MAX_LOSS = 1000.0  # nats per token; the largest goal that is accepted
ROUNDING = 1e-9  # so that an agreement of 0.9 meets a goal of 0.9


@dataclass(frozen=True)
class Criterion:
    """The limits that a cutoff must meet; None means no limit.

    ``max_kl`` and ``max_nll_increase`` are in nats per token, ``min_agreement`` and ``kv_budget`` are shares 0..1.
    ``kv_budget`` excludes the others: it requests the largest cutoff that fits, whatever its loss. With
    ``every_category`` the mean of every category of prompts must also be within the limits.
    """

    max_kl: float | None = None
    max_nll_increase: float | None = None
    min_agreement: float | None = None
    kv_budget: float | None = None
    confidence: float = CONFIDENCE
    every_category: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_kl", 0, MAX_LOSS),
            ("max_nll_increase", 0, MAX_LOSS),
            ("min_agreement", 0, 1),
            ("kv_budget", 0, 1),
        ):
            value = getattr(self, name)
            # "not ... <=" so that NaN is refused too
            if value is not None and not (low <= value <= high):
                raise UserError(f"{name} is {value}: give a number from {low} to {high}")
        if not 0.5 <= self.confidence < 1:
            raise UserError(f"confidence is {self.confidence}: give a number from 0.5 to below 1")
        losses = [self.max_kl, self.max_nll_increase, self.min_agreement]
        if self.kv_budget is not None and (self.every_category or any(loss is not None for loss in losses)):
            raise UserError("kv_budget asks for the largest cutoff that fits: give it without a loss goal")

    def limits(self) -> dict[str, float]:
        """Return the limit of each requested loss, by its name in the evidence; for every loss lower is better."""
        limits = {"kl": self.max_kl, "nll_increase": self.max_nll_increase}
        limits["disagreement"] = None if self.min_agreement is None else 1 - self.min_agreement
        return {name: limit for name, limit in limits.items() if limit is not None}


@dataclass(frozen=True, repr=False)
class Recommendation(Readable):
    """A cutoff with its evidence; ``data`` is the content of ``recommendation.json``."""

    data: dict[str, Any]
    regions: Regions

    @property
    def cutoff(self) -> int:
        """Number of layers that prompt tokens should run through, 1..L; L is the stock model."""
        return int(self.data["cutoff"])

    @property
    def selection_region(self) -> Region | None:
        """Layers that select information from the prompt."""
        return self.regions.selection

    @property
    def stabilization_region(self) -> Region | None:
        """Layers in which the prompt no longer changes, up to the last layer."""
        return self.regions.stabilization

    @property
    def evidence(self) -> list[dict[str, Any]]:
        """Per cutoff 1..L: mean and bound of every loss."""
        return self.data["evidence"]

    def overview(self) -> Overview:
        """The answer, the goal, what was measured at the cutoff, and the regions."""
        at, n_layers = self.evidence[self.cutoff - 1], self.data["n_layers"]
        selection, stabilization = self.selection_region, self.stabilization_region
        facts = {
            "goal": goals_in_words(self.data["criterion"]),
            "measured there": f"KL {at['kl']:.4f} nats per token, same top token {at['top1_agreement']:.1%}",
            "selection region": str(selection or "none found"),
            "stabilization region": str(stabilization or "none found"),
            "notes": "; ".join(self.data["notes"]) or None,
        }
        return Overview(f"Cutoff {self.cutoff} of {n_layers} for {self.data['model']}", answer(self), facts)

    def save(self, path: str | Path) -> bool:
        """Write ``recommendation.json`` atomically, unless it says the same already; return whether it was written.

        Raises UserError if it cannot be written.
        """
        path = Path(path)
        if self._is_in(path):
            return False
        try:
            write_sealed(path, self.data)
        except OSError as error:
            raise UserError(f"cannot write {str(path)!r}: {error.strerror or error}") from None
        return True

    def _is_in(self, path: Path) -> bool:
        try:
            return bool(read_json(path) == json.loads(self.to_json()))
        except (OSError, ValueError):  # there is none, or it is damaged
            return False

    def to_json(self) -> str:
        """Return the content of ``recommendation.json``."""
        return dump_json(self.data, "the recommendation")


def recommend(
    run: Run | str | Path,
    *,
    max_kl: float | None = None,
    max_nll_increase: float | None = None,
    min_agreement: float | None = None,
    kv_budget: float | None = None,
    confidence: float = CONFIDENCE,
    every_category: bool = False,
    rules: RegionRules | None = None,
    lengths: Sequence[int] = LENGTHS,
    seed: int = 0,
) -> Recommendation:
    """Recommend a cutoff from a run; the default goal is ``max_kl`` = 0.1 nats per token.

    ``run`` may be its folder. If several goals are given, all must hold. With too few prompts for a bound the mean
    decides, and the notes say so.
    If no cutoff below L is admissible, full depth is recommended. Raises UserError for invalid goals.
    """
    if not isinstance(run, Run):
        require(isinstance(run, str | Path), f"the run is {run!r:.60}: give what `diagnose` returns, or a run folder")
        run = load_run(run)
    if all(goal is None for goal in (max_kl, max_nll_increase, min_agreement, kv_budget)):
        max_kl = MAX_KL
    criterion = Criterion(max_kl, max_nll_increase, min_agreement, kv_budget, confidence, bool(every_category))
    losses = _losses(run)
    # One bootstrap for all losses: every loss gets the same resamples of prompts.
    joint = upper_bound(np.hstack([*losses.values()]), confidence=confidence, seed=seed)
    bounds = dict(zip(losses, [None] * len(losses) if joint is None else np.split(joint, len(losses)), strict=True))
    means = {name: rows.mean(axis=0) for name, rows in losses.items()}
    n_layers, anchors = run.n_layers, int(run.manifest["identity"]["anchors"])
    notes = list(run.manifest["notes"])
    if not run.complete:
        notes.append(f"the run is not complete: {len(run.prompts)} of {run.manifest['n_prompts']} prompts")
    if len(run.prompts) < MIN_PROMPTS and criterion.limits():
        notes.append(
            f"too few prompts for a confidence bound ({len(run.prompts)} of at least {MIN_PROMPTS}): "
            "the mean alone decides"
        )
    # A cutoff changes nothing in a prompt that consists of the anchors and the first decode-phase token.
    if empty := int((run.prompts["n_prompt"] <= anchors + 1).sum()):
        notes.append(f"{empty} of {len(run.prompts)} prompts are too short to be cut: their loss says nothing")
    admissible = np.ones(n_layers, dtype=bool)
    for name, limit in criterion.limits().items():
        bound = bounds[name]
        admissible &= (means[name] if bound is None else bound) <= limit + ROUNDING
        if criterion.every_category:
            admissible &= by_category(run, losses[name]).max(axis=0).to_numpy() <= limit + ROUNDING
    if criterion.kv_budget is not None:
        admissible = _fits(criterion.kv_budget, n_layers)
        cutoff = int(admissible.sum())
    else:
        cutoff = smallest_admissible(admissible)
        if cutoff == n_layers:
            notes.append("no cutoff below full depth is admissible: run the model as it is, or relax the goal")
    category_means = by_category(run, losses["kl"])
    notes += _category_above_goal(category_means, cutoff, criterion.max_kl)
    regions = find_regions(run, rules, seed=seed)
    shape, positions = run.manifest["shape"], run.manifest["max_positions"]
    predicted = predict_savings(shape, cutoff, anchors=anchors, lengths=lengths, max_positions=positions)
    data = {
        "model": run.manifest["model"],
        "weight_hash": run.manifest["identity"]["weight_hash"],
        "n_layers": n_layers,
        "cutoff": cutoff,
        "depth_fraction": cutoff / n_layers,
        "anchors": anchors,
        "criterion": {k: v for k, v in vars(criterion).items() if v is not None and v is not False},
        "n_prompts": len(run.prompts),
        "selection_region": regions.selection.to_dict() if regions.selection else None,
        "stabilization_region": regions.stabilization.to_dict() if regions.stabilization else None,
        "region_rules": vars(regions.rules),
        "agreement": _agreement(cutoff, regions, n_layers),
        "retention": retention_at(run, cutoff),
        "by_category": category_means[cutoff].to_dict(),
        "evidence": [_evidence(k, means, bounds, admissible) for k in range(1, n_layers + 1)],
        "predicted": [savings.to_dict() for savings in predicted],
        "notes": notes,
    }
    return Recommendation(data, regions)


def _losses(run: Run) -> dict[str, np.ndarray]:
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


def _fits(kv_budget: float, n_layers: int) -> np.ndarray:
    """Whether k/L, the share that a long prompt's cache approaches, is within the budget: bool [L]."""
    fits = np.arange(1, n_layers + 1) <= kv_budget * n_layers + ROUNDING
    if not fits.any():
        raise UserError(
            f"kv_budget {kv_budget} is less than one of {n_layers} layers: give at least {1 / n_layers:.3f}"
        )
    return fits


def _agreement(cutoff: int, regions: Regions, n_layers: int) -> dict[str, Any]:
    """Return the cutoffs by the regions: above the last selecting layer, and at the first stable layer."""
    by_selection = regions.selection.last + 1 if regions.selection else None
    by_stabilization = regions.stabilization.first if regions.stabilization else None
    tolerance = max(1, round(0.05 * n_layers))
    by_regions = [k for k in (by_selection, by_stabilization) if k is not None]
    return {
        "cutoff_by_selection": by_selection,
        "cutoff_by_stabilization": by_stabilization,
        "tolerance_layers": tolerance,
        "agree": all(abs(k - cutoff) <= tolerance for k in by_regions) if by_regions else None,
    }


def retention_at(run: Run, cutoff: int) -> dict[str, float | None]:
    """Return the share of the prompt mass and of the prompt contribution in the layers below the cutoff, 0..1."""
    means = run.layers.groupby("layer")[["mass_prompt", "prompt_contribution"]].mean()
    kept, total = means.iloc[:cutoff].sum(), means.sum()
    return {
        name: float(kept[name] / total[name]) if 0 < total[name] < math.inf else None
        for name in ("mass_prompt", "prompt_contribution")
    }


def by_category(run: Run, losses: np.ndarray) -> pd.DataFrame:
    """Return the mean loss of every category of prompts at every cutoff: frame [categories, 1..L]."""
    table = pd.DataFrame(losses, columns=range(1, run.n_layers + 1))
    return table.groupby(run.prompts["category"].astype(str).to_numpy()).mean()


def _category_above_goal(kl: pd.DataFrame, cutoff: int, max_kl: float | None) -> list[str]:
    """Return a note on the category of prompts with the largest loss, if that loss is above the goal; else nothing."""
    if max_kl is None or len(kl) < 2 or kl[cutoff].max() <= max_kl + ROUNDING:
        return []
    worst = kl[cutoff].idxmax()
    sufficient = smallest_admissible((kl.max(axis=0) <= max_kl + ROUNDING).to_numpy())
    return [
        f"prompts of category {worst} lose {kl[cutoff].max():.3g} nats per token there, above the goal; "
        f"every category is within it from cutoff {sufficient} on (`every_category=True`)"
    ]


def loss_by_category(run: Run, cutoff: int) -> dict[str, float]:
    """Return the mean KL at the cutoff for each category of prompts, nats per token."""
    return {str(name): float(kl) for name, kl in by_category(run, _losses(run)["kl"])[cutoff].items()}


def _evidence(
    k: int, means: dict[str, np.ndarray], bounds: dict[str, np.ndarray | None], admissible: np.ndarray
) -> dict[str, Any]:
    row: dict[str, Any] = {"cutoff": k}
    for name, values in means.items():
        bound = bounds[name]
        row[name] = float(values[k - 1])
        row[f"{name}_bound"] = None if bound is None else float(bound[k - 1])
    row["top1_agreement"] = 1 - row["disagreement"]
    row["admissible"] = bool(admissible[k - 1])
    return row
