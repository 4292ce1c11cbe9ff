"""The page of an evaluation: what every policy keeps of full depth's scores, and how answers fail."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from diagnostics import figures
from diagnostics.evaluate.items import AVERAGE
from diagnostics.evaluate.score_table import FULL, kept, summarize, texts
from diagnostics.figures.quality import policy_label
from diagnostics.report.document import Card, Facts, Page, Part, Picture, Section, Table
from diagnostics.report.facts import measured_facts, named
from diagnostics.report.tables import from_frame
from diagnostics.support.defaults import MARGIN

if TYPE_CHECKING:
    from diagnostics.evaluate.evaluation_folder import Evaluation

SCORES_CAPTION = (
    "Scores in percent ± half of the 95% interval. * differs from full depth (5%, corrected over tasks). Kept: the "
    "average as a share of full depth's."
)


def evaluation_report(evaluation: Evaluation) -> str:
    """Return the page of an evaluation as HTML, with its own margin and seed."""
    m = evaluation.manifest
    margin = asked_margin(m)
    table = summarize(evaluation, margin=margin, seed=asked_seed(m))
    policies = list(dict.fromkeys(table["policy"]))
    verdicts = [
        f"{policy_label(policy)} {kept(table, policy, margin)}."
        for policy in policies
        if policy != FULL and "difference" in table
    ]
    items = evaluation.items.groupby("task", sort=False)["item_id"].nunique()
    identity = m.get("identity", {})
    facts = measured_facts(m, evaluation.path) | {
        "Items": ", ".join(f"{name} {count}" for name, count in items.items()),
        "Margin": f"{100 * margin:g} points",
    }
    facts |= named({name: identity[name] for name in ("dtype", "query", "seed") if name in identity})
    return Page(
        title=f"Quality of {m['model']} under {len(policies)} policies",
        answer=_answer(table, margin),
        cards=_cards(table),
        remarks=verdicts,
        sections=[
            Section("Scores", [_scores(table)]),
            Section("Figures", _pictures(table, margin)),
            Section("How this was measured", [Facts(facts)]),
        ],
    ).render()


def asked_margin(manifest: Mapping[str, Any]) -> float:
    """Return an evaluation's margin of non-inferiority, as a share of the score."""
    margin = manifest.get("margin", manifest.get("arguments", {}).get("margin"))  # older manifests: only an argument
    return float(margin) if isinstance(margin, int | float) and 0 <= margin <= 1 else MARGIN


def asked_seed(manifest: Mapping[str, Any]) -> int:
    """Return the seed of an evaluation."""
    seed = manifest.get("identity", {}).get("seed")
    return seed if isinstance(seed, int) and seed >= 0 else 0


def _answer(table: pd.DataFrame, margin: float) -> str:
    averages = _averages(table)
    compared = averages.drop(index=FULL, errors="ignore")
    if "non_inferior" not in table or compared.empty:
        return "There is nothing to compare: full depth or a second policy is missing."
    fits = compared["non_inferior"].fillna(False).astype(bool)
    points = f"the margin of {100 * margin:g} points"
    if not fits.any():
        return f"No policy is non-inferior to full depth on the average over tasks, at {points}."
    good = ", ".join(policy_label(str(policy)) for policy in compared.index[fits])
    return f"On the average over tasks {int(fits.sum())} of {len(compared)} policies keep within {points}: {good}."


def _cards(table: pd.DataFrame) -> list[Card]:
    return [
        Card(policy_label(str(policy)), f"{100 * row['score']:.1f}", _interval(row))
        for policy, row in _averages(table).iterrows()
    ]


def _scores(table: pd.DataFrame) -> Table:
    """Return the scores with the fewer columns: policies or tasks."""
    shown = texts(table).rename(index=policy_label)
    if len(shown) < len(shown.columns):
        return from_frame(shown.T, "task", strong=AVERAGE, caption=SCORES_CAPTION)
    return from_frame(shown, "policy", strong=policy_label(FULL), caption=SCORES_CAPTION)


def _interval(row: pd.Series) -> str:
    text = "points, average over tasks"
    return text if pd.isna(row["low"]) else f"{text} ({100 * row['low']:.1f} to {100 * row['high']:.1f})"


def _averages(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["task"] == AVERAGE].set_index("policy")


def _pictures(table: pd.DataFrame, margin: float) -> list[Part]:
    drawn = (
        (
            figures.quality_differences(table, margin),
            "Left of 0 a policy scores less than full depth on the same items. An interval that crosses 0 may be "
            "chance; dashed: the margin.",
        ),
        (
            figures.quality_scores(table),
            "The grey bar of each task is full depth, over its interval. Where a dot's interval touches it, few items "
            "may be the reason.",
        ),
        (figures.quality_by_cutoff(table), "Each line is a task: how fast its score falls as fewer layers run."),
        (figures.quality_failures(table), "Answers that fail, by how; a policy that breaks a model shows here first."),
    )
    return [Picture(figure, caption) for figure, caption in drawn if figure is not None]
