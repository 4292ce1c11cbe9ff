"""What rules say beside the measured knee, as a frame and in sentences: the same wherever rules are shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from diagnostics.cutoffs.judgement import COLUMNS, NOT_MEASURED, OURS
from diagnostics.cutoffs.rules import all_rules
from diagnostics.cutoffs.rules.rule import Rule
from diagnostics.support.defaults import MAX_KL

if TYPE_CHECKING:
    from diagnostics.cutoffs.recommendation import Recommendation

NEAR, NEAR_IN_WORDS = 1, "one layer"  # how far from the knee a rule may be to count as right


def rule_verdicts(recommendation: Recommendation) -> pd.DataFrame:
    """Return what each rule says: ours first, then those nearest to the knee, last those that name no cutoff.

    A row per rule, empty where no rule was asked. Columns as `diagnostics.cutoffs.judgement.judge_rules` has them,
    numbers as floats and NaN where there is none; ``ours``, whether the rule is of this project; ``fixed``, whether it
    reads nothing of the model; ``absent``, whether the run lacks what it reads.
    """
    rows = pd.DataFrame(recommendation.data.get("rules") or [], columns=list(COLUMNS))
    numbers = [name for name, kind in COLUMNS.items() if kind != "str"]
    rows[numbers] = rows[numbers].astype(float)
    rows["ours"] = rows["rule"].isin(OURS)
    rows["fixed"] = rows["rule"].isin(
        [name for name, rule in all_rules().items() if not (rule.reads or rule.reads_heads)]
    )
    rows["absent"] = rows["note"].str.startswith(NOT_MEASURED)
    keys = pd.DataFrame(
        {
            "group": (~rows["ours"]).astype(int),
            "silent": rows["cutoff"].isna(),
            "far": rows["off"].abs().where(~rows["ours"], 0),
            "deep": rows["cutoff"].where(~rows["ours"], 0),
        }
    )
    order = keys.sort_values(["group", "silent", "far", "deep"], kind="stable").index
    return rows.loc[order].reset_index(drop=True)


def rules_goal(recommendation: Recommendation) -> float:
    """Return the mean KL by which rules are judged, nats per token: the goal's, 0.1 where it limits another loss."""
    limit = recommendation.data["criterion"].get("max_kl")
    return MAX_KL if limit is None else float(limit)


def measured_knee(verdicts: pd.DataFrame) -> int | None:
    """Return the knee that rules were compared with; None where no loss was measured, or none is within the goal."""
    knees = verdicts["knee"].dropna()
    return int(knees.iloc[0]) if len(knees) else None


def rules_sentence(recommendation: Recommendation) -> str:
    """Say what our rule names, where the measured knee is, and how many other rules come near; "" without rules."""
    verdicts = rule_verdicts(recommendation)
    if verdicts.empty:
        return ""
    others = verdicts[~verdicts["ours"]]
    knee = measured_knee(verdicts)
    parts = [_our_cutoff(verdicts), _no_knee(recommendation) if knee is None else f"the measured knee is {knee}"]
    text = ", ".join(filter(None, parts))
    if len(others):
        text += f"; of {len(others)} other rule{'s' if len(others) > 1 else ''} {_counted(others, knee)}"
    return f"{text[:1].upper()}{text[1:]}."


def must_see_sentence(recommendation: Recommendation) -> str:
    """Say in which layers the prompt must be seen, and how uptake follows; "" where that was not measured."""
    found = recommendation.data.get("must_see")
    if not found:
        return ""
    layers = ", ".join(map(str, found["layers"])) or "none"
    text = (
        f"Layers in which the prompt must be seen: {layers}. Without it in one of them alone, KL rises by more than in "
        f"the mean layer, {found['above']:.2g} nats per token."
    )
    correlation = found["uptake_rank_correlation"]
    return text if correlation is None else f"{text} Rank correlation with uptake over the layers: {correlation:.2f}."


def description(rule: Rule) -> str:
    """Return a rule's own texts as one: how its cutoff comes about, thresholds, what it cannot judge, its source."""
    mapping = f"{rule.mapping} (this step is ours)" if rule.ours else rule.mapping
    parts = (mapping, f"thresholds: {rule.thresholds}", f"cannot judge: {rule.blind}", f"source: {rule.source}")
    return "; ".join(parts) + "."


def _our_cutoff(verdicts: pd.DataFrame) -> str:
    """Say what the first of our rules names; "" if it was not asked."""
    ours = verdicts[verdicts["rule"] == OURS[0]]["cutoff"]
    if not len(ours):
        return ""
    return "our rule names no cutoff" if ours.isna().all() else f"our rule says {ours.iloc[0]:.0f}"


def _no_knee(recommendation: Recommendation) -> str:
    if not recommendation.measured:
        return "no loss was measured"
    return f"no cutoff has a mean KL within {rules_goal(recommendation):g}"


def _counted(others: pd.DataFrame, knee: int | None) -> str:
    """Say how many rules are near the knee, or between which cutoffs they lie, and how many name none."""
    named = others["cutoff"].dropna()
    parts = []
    if knee is not None:
        near = int((others["off"].abs() <= NEAR).sum())
        parts.append(f"{near or 'none'} {'is' if near == 1 else 'are'} within {NEAR_IN_WORDS}")
    elif len(named):
        parts.append(f"{len(named)} say from {named.min():.0f} to {named.max():.0f}")
    absent = int(others["absent"].sum())
    if silent := len(others) - len(named) - absent:
        parts.append(f"{silent} name{'s' if silent == 1 else ''} no cutoff")
    if absent:
        parts.append(f"{absent} {'was' if absent == 1 else 'were'} not measured")
    return ", ".join(parts)
