"""What the layers say beside the measured loss, in sentences: the same in terminal, dashboard, report and notebooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diagnostics.cutoffs.recommendation import Recommendation

NO_REGION = "none found"


def region_lines(recommendation: Recommendation) -> dict[str, str]:
    """Return in words, by their names: both regions, and the cutoff by selection with the goal that it stands for."""
    agreement = recommendation.data["agreement"]
    cutoff = agreement["cutoff_by_selection"]
    return {
        "Selection region": str(recommendation.selection_region or NO_REGION),
        "Cutoff by selection": NO_REGION if cutoff is None else f"{cutoff}, stands for {_stands_for(agreement)}",
        "Stabilization region": str(recommendation.stabilization_region or NO_REGION),
    }


def region_verdict(recommendation: Recommendation) -> str:
    """Say where the layers put the cutoff, for which goal, and whether the measured loss agrees.

    A region that was not found is named, and agrees with nothing.
    """
    agreement = recommendation.data["agreement"]
    cutoff = agreement["cutoff_by_selection"]
    if cutoff is None:
        return "The layers alone name no cutoff: some have no uptake that could be measured."
    says = f"say {cutoff}, which stands for {_stands_for(agreement)}"
    if recommendation.selection_region is None:
        return f"No selection region was found; by their uptake the layers alone {says}."
    if agreement["agree"] is None:
        return f"The layers alone {says}; no loss was measured to compare it with."
    tolerance = agreement["tolerance_layers"]
    within = f"{tolerance} layer{'' if tolerance == 1 else 's'}"
    if agreement["agree"]:
        return f"The layers alone {says}; the measured loss agrees, within {within}."
    return f"The layers alone {says}; the measured loss DISAGREES, by more than {within}, and decides."


def _stands_for(agreement: dict[str, object]) -> str:
    goal = agreement["stands_for_kl"]
    return f"uptake above it of {agreement['max_uptake_above']:g} at most" if goal is None else f"a KL of {goal:g}"
