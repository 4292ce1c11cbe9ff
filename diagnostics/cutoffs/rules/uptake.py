"""Our rule: prompts may stop where little of what later layers take from them is left.

Uptake of a layer is selectivity * contribution / update of the decode rows. Its sum over the layers from k on foretells
the loss at cutoff k; what a single layer takes does not.
"""

from dataclasses import dataclass
from typing import ClassVar

from diagnostics.cutoffs.rules.rule import Curves, Rule, first_tail_within
from diagnostics.support.defaults import MAX_KL

MAX_UPTAKE_ABOVE = 0.2  # at a goal of MAX_KL
# The loss grows with the square of what is left out, so the limit with the root of the goal; not fitted to any run.
GOAL_EXPONENT = 0.5
# How far the rule was off in the study of rules (analyses/study_rules.md), at a goal of MAX_KL.
UPTAKE_HELD = "within one layer of the measured knee on 12 of 12 runs of three models"


def uptake_limit(max_kl: float, max_uptake_above: float = MAX_UPTAKE_ABOVE) -> float:
    """Return the uptake that may be left above a cutoff, from the goal and from what may be left at a goal of 0.1.

    Goals are in nats per token.
    """
    return max_uptake_above * (max_kl / MAX_KL) ** GOAL_EXPONENT


@dataclass(frozen=True)
class Uptake(Rule):
    """Smallest k with the sum of uptake over layers >= k within a limit, which follows the goal."""

    max_uptake_above: float = MAX_UPTAKE_ABOVE  # at a goal of MAX_KL
    name = "uptake"
    title = "Uptake above (ours)"
    source = "this project: measured on real models, see the study of rules"
    thresholds = f"at most {MAX_UPTAKE_ABOVE} at a goal of {MAX_KL} nats per token"
    mapping = "smallest k with the sum of uptake over the layers from k on within the limit"
    blind = "whether what layers take matters to the next token, and how layers act together"
    reads: ClassVar[tuple[str, ...]] = ("uptake",)

    def cutoff(self, curves: Curves) -> int | None:
        """Return the smallest cutoff above which at most the limit is left."""
        uptake = curves.layers.get("uptake")
        return None if uptake is None else first_tail_within(uptake, uptake_limit(curves.max_kl, self.max_uptake_above))


RULES = (Uptake(),)
