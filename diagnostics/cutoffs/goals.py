"""The goals that a cutoff can have to meet: the argument of `recommend`, its wording, and those of a folder."""

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from diagnostics.cutoffs.regions import RegionRules
from diagnostics.policies.recommendation import read_recommendation
from diagnostics.runs.places import RECOMMENDATION
from diagnostics.support.errors import UserError

GOALS = {
    "max_kl": "KL at most",
    "max_nll_increase": "NLL increase at most",
    "min_agreement": "same top token at least",
    "kv_budget": "share of full KV at most",
}


def goals_in_words(criterion: Mapping[str, Any]) -> str:
    """Say the goals of a recommendation's ``criterion`` in a few words."""
    words = " and ".join(f"{label} {criterion[name]:g}" for name, label in GOALS.items() if name in criterion)
    return words + (", in every category" if criterion.get("every_category") else "")


def saved_goals(folder: Path) -> dict[str, Any]:
    """Return the arguments with which `recommend` made a folder's recommendation: goals, confidence and region rules.

    They are empty where there is no recommendation; raises UserError where it cannot be read.
    """
    if not os.path.exists(folder / RECOMMENDATION):
        return {}
    data = read_recommendation(folder)
    known = (*GOALS, "confidence", "every_category")
    goals = _numbers(folder, data.get("criterion"), known)
    rules = _numbers(folder, data.get("region_rules"), tuple(field.name for field in fields(RegionRules)))
    return goals | ({"rules": RegionRules(**rules)} if rules else {})


def _numbers(folder: Path, saved: Any, known: tuple[str, ...]) -> dict[str, Any]:
    """Return the values of known names; what is None or not there, as in files of other versions, has its default."""
    saved = saved if isinstance(saved, dict) else {}
    values = {name: value for name, value in saved.items() if name in known and value is not None}
    if not all(isinstance(value, int | float) for value in values.values()):
        raise UserError(f"the goals in {str(folder / RECOMMENDATION)!r} are not numbers: make it anew with `recommend`")
    return values
