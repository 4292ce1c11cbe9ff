"""Cutoffs: regions, bounds, savings and the recommendation, all computed from a finished run without a model."""

from typing import TYPE_CHECKING

from diagnostics.support.lazy import find_on_demand

if TYPE_CHECKING:
    from diagnostics.cutoffs.bounds import upper_bound
    from diagnostics.cutoffs.criterion import Criterion
    from diagnostics.cutoffs.judgement import judge_rules
    from diagnostics.cutoffs.recommendation import Recommendation, recommend
    from diagnostics.cutoffs.regions import Region, RegionRules, Regions, find_regions
    from diagnostics.cutoffs.savings import predict_savings

_HOMES = {
    "bounds": ("upper_bound",),
    "criterion": ("Criterion",),
    "judgement": ("judge_rules",),
    "recommendation": ("Recommendation", "recommend"),
    "regions": (
        "Region",
        "RegionRules",
        "Regions",
        "find_regions",
    ),
    "savings": ("predict_savings",),
}

__all__ = [
    "Criterion",
    "Recommendation",
    "Region",
    "RegionRules",
    "Regions",
    "find_regions",
    "judge_rules",
    "predict_savings",
    "recommend",
    "upper_bound",
]

find_on_demand(__name__, _HOMES)
