"""Our second rule: prompts may stop where taking the prompt away from the layers above changes little of what they add.

The removal effect of a layer is the norm of the change of what its attention adds to the residual if the prompt's keys
are taken away, relative to the residual. Changes of different layers are added as if at right angles.
"""

from dataclasses import dataclass
from typing import ClassVar

from diagnostics.cutoffs.rules.rule import Curves, Rule, first_tail_within
from diagnostics.cutoffs.rules.uptake import GOAL_EXPONENT
from diagnostics.support.defaults import MAX_KL


@dataclass(frozen=True)
class RemovalEffect(Rule):
    """Smallest k with the root of the sum of squared removal effects over layers >= k within a limit."""

    max_effect_above: float = 0.2  # at a goal of MAX_KL; fitted to the runs of the study
    name = "removal-effect"
    title = "Removal effect above (ours)"
    source = "this project: measured on real models, see the study of rules"
    thresholds = f"at most 0.2 at a goal of {MAX_KL} nats per token, fitted to the runs of the study"
    mapping = "smallest k with the root of the summed squares over the layers from k on within the limit"
    blind = "how the changes of several layers act together, and whether the change matters to the next token"
    reads: ClassVar[tuple[str, ...]] = ("removal_effect",)

    def cutoff(self, curves: Curves) -> int | None:
        """Return the smallest cutoff above which at most the limit is left."""
        effect = curves.layers.get("removal_effect")
        limit = self.max_effect_above * (curves.max_kl / MAX_KL) ** GOAL_EXPONENT
        return None if effect is None else first_tail_within(effect**2, limit**2)


RULES = (RemovalEffect(),)
