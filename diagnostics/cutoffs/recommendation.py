"""Recommends a cutoff from a run, with the evidence for it.

A cutoff is *admissible* when the upper confidence bound, over prompts, of its measured loss is within the goal. The
recommendation is the smallest admissible cutoff from which every larger one is admissible too. It is compared with the
cutoff by selection, which does not use the loss, and says whether they agree. A run without a sweep has the cutoff by
selection alone, and says that it was not measured.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.cutoffs.answer import answer
from diagnostics.cutoffs.bounds import MIN_PROMPTS, upper_bound
from diagnostics.cutoffs.criterion import Criterion
from diagnostics.cutoffs.goals import goals_in_words
from diagnostics.cutoffs.judgement import judged_records
from diagnostics.cutoffs.losses import ROUNDING, by_category, measured_losses, smallest_admissible
from diagnostics.cutoffs.must_see import must_see
from diagnostics.cutoffs.notes import region_notes, run_notes
from diagnostics.cutoffs.regions import Region, RegionRules, Regions, find_regions
from diagnostics.cutoffs.savings import LENGTHS, predict_savings
from diagnostics.runs.run import Run, load_run
from diagnostics.support.defaults import CONFIDENCE, MAX_KL
from diagnostics.support.errors import UserError, require
from diagnostics.support.files import dump_json, read_json, write_sealed
from diagnostics.support.overview import Overview, Readable


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
        """Per cutoff 1..L: mean and bound of every loss; empty if none was measured."""
        return self.data["evidence"]

    @property
    def measured(self) -> bool:
        """Whether the loss at the cutoff was measured; else the cutoff is by a rule, or by the budget."""
        return bool(self.evidence)

    def overview(self) -> Overview:
        """The answer, the goal, what was measured at the cutoff, and the regions."""
        n_layers = self.data["n_layers"]
        selection, stabilization = self.selection_region, self.stabilization_region
        measured = "nothing"
        if self.measured:
            at = self.evidence[self.cutoff - 1]
            measured = f"KL {at['kl']:.4f} nats per token, same top token {at['top1_agreement']:.1%}"
        facts = {
            "goal": goals_in_words(self.data["criterion"]),
            "measured there": measured,
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
    If no cutoff below L is admissible, full depth is recommended.

    In a run without a sweep the cutoff is the one by selection, or the largest that fits ``kv_budget``, and
    ``data["measured"]`` is False. Raises UserError for invalid goals, and for those that need a sweep that the run does
    not have.
    """
    if not isinstance(run, Run):
        require(isinstance(run, str | Path), f"the run is {run!r:.60}: give what `diagnose` returns, or a run folder")
        run = load_run(run)
    if all(goal is None for goal in (max_kl, max_nll_increase, min_agreement, kv_budget)):
        max_kl = MAX_KL
    criterion = Criterion(max_kl, max_nll_increase, min_agreement, kv_budget, confidence, bool(every_category))
    regions = find_regions(run, rules, max_kl=max_kl, seed=seed)
    if run.has_sweep:
        choice = _by_loss(run, criterion, seed)
    else:
        criterion.require_no_sweep()
        choice = _by_rule(run, criterion, regions)
    n_layers, cutoff, anchors = run.n_layers, choice.cutoff, int(run.manifest["identity"]["anchors"])
    shape, positions = run.manifest["shape"], run.manifest["max_positions"]
    predicted = predict_savings(shape, cutoff, anchors=anchors, lengths=lengths, max_positions=positions)
    judged_at = MAX_KL if max_kl is None else max_kl
    data = {
        "model": run.manifest["model"],
        "weight_hash": run.manifest["identity"]["weight_hash"],
        "n_layers": n_layers,
        "cutoff": cutoff,
        "measured": run.has_sweep,
        "depth_fraction": cutoff / n_layers,
        "anchors": anchors,
        "criterion": {k: v for k, v in vars(criterion).items() if v is not None and v is not False},
        "n_prompts": len(run.prompts),
        "measured_lengths": {"min": int(run.prompts["n_prompt"].min()), "max": int(run.prompts["n_prompt"].max())},
        "selection_region": regions.selection.to_dict() if regions.selection else None,
        "stabilization_region": regions.stabilization.to_dict() if regions.stabilization else None,
        "region_rules": vars(regions.rules),
        "agreement": _agreement(cutoff if run.has_sweep else None, regions, n_layers),
        "rules": judged_records(run, max_kl=judged_at, seed=seed),
        "must_see": must_see(run, regions.uptake),
        "retention": retention_at(run, cutoff),
        "by_category": choice.by_category,
        "evidence": choice.evidence,
        "predicted": [savings.to_dict() for savings in predicted],
        "notes": [*run_notes(run), *choice.notes, *region_notes(regions)],
    }
    return Recommendation(data, regions)


@dataclass(frozen=True)
class _Choice:
    """A cutoff, what was measured of it, and what must be said of it."""

    cutoff: int
    notes: list[str]
    evidence: list[dict[str, Any]] = field(default_factory=list)
    by_category: dict[str, float] = field(default_factory=dict)


def _by_loss(run: Run, criterion: Criterion, seed: int) -> _Choice:
    """Choose the cutoff by its measured loss."""
    losses, n_layers = measured_losses(run), run.n_layers
    notes: list[str] = []
    # One bootstrap for all losses: every loss gets the same resamples of prompts.
    joint = upper_bound(np.hstack([*losses.values()]), confidence=criterion.confidence, seed=seed)
    bounds = dict(zip(losses, [None] * len(losses) if joint is None else np.split(joint, len(losses)), strict=True))
    means = {name: rows.mean(axis=0) for name, rows in losses.items()}
    if len(run.prompts) < MIN_PROMPTS and criterion.limits():
        notes.append(
            f"too few prompts for a confidence bound ({len(run.prompts)} of at least {MIN_PROMPTS}): "
            "the mean alone decides"
        )
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
    evidence = [_evidence(k, means, bounds, admissible) for k in range(1, n_layers + 1)]
    return _Choice(cutoff, notes, evidence, {str(name): kl for name, kl in category_means[cutoff].items()})


def _by_rule(run: Run, criterion: Criterion, regions: Regions) -> _Choice:
    """Choose the cutoff without a measured loss: the one by selection, or the largest that the budget allows."""
    if criterion.kv_budget is not None:
        return _Choice(int(_fits(criterion.kv_budget, run.n_layers).sum()), [])
    if regions.cutoff is None:
        raise UserError(
            f"run {run.name!r} has no cutoff by selection, since some layers have no uptake that could be measured, "
            "and with `sweep=False` it has no measured loss: run it again with the sweep"
        )
    return _Choice(regions.cutoff, [])


def _fits(kv_budget: float, n_layers: int) -> np.ndarray:
    """Whether k/L, the share that a long prompt's cache approaches, is within the budget: bool [L]."""
    fits = np.arange(1, n_layers + 1) <= kv_budget * n_layers + ROUNDING
    if not fits.any():
        raise UserError(
            f"kv_budget {kv_budget} is less than one of {n_layers} layers: give at least {1 / n_layers:.3f}"
        )
    return fits


def _agreement(cutoff: int | None, regions: Regions, n_layers: int) -> dict[str, Any]:
    """Return the cutoff by selection, and whether the measured one is near; None if there is nothing to compare."""
    tolerance, agree = max(1, round(0.05 * n_layers)), None
    if cutoff is not None and regions.cutoff is not None and regions.selection is not None:
        agree = abs(regions.cutoff - cutoff) <= tolerance
    return {
        "cutoff_by_selection": regions.cutoff,
        "stands_for_kl": regions.stands_for_kl,
        "max_uptake_above": regions.max_uptake_above,
        "tolerance_layers": tolerance,
        "agree": agree,
    }


def retention_at(run: Run, cutoff: int) -> dict[str, float | None]:
    """Return the share of the prompt mass and of the prompt contribution in the layers below the cutoff, 0..1."""
    means = run.layers.groupby("layer")[["mass_prompt", "prompt_contribution"]].mean()
    kept, total = means.iloc[:cutoff].sum(), means.sum()
    return {
        name: float(kept[name] / total[name]) if 0 < total[name] < math.inf else None
        for name in ("mass_prompt", "prompt_contribution")
    }


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
