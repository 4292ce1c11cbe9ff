"""POP: the Fisher information of a gate on each layer's residual branches."""

from dataclasses import dataclass
from typing import ClassVar

from diagnostics.cutoffs.rules.rule import Curves, Rule, first_tail_share


@dataclass(frozen=True)
class FisherGate(Rule):
    """Smallest k with little of the total Fisher information in the layers from k on."""

    share_above: float = 0.05
    name = "fisher-gate"
    title = "POP: Fisher gate"
    source = "POP, arXiv 2602.03295"
    thresholds = "the published rule skips a given number of layers, those of least information; 5% is ours"
    mapping = "smallest k with at most 5% of the summed (dL/dg)^2 in the layers from k on"
    blind = "prompt and decode rows apart: the gate is on all of them"
    reads: ClassVar[tuple[str, ...]] = ("fisher_gate",)

    def cutoff(self, curves: Curves) -> int | None:
        """Return the smallest cutoff above which at most the share is left; None where there is no information."""
        if not curves.complete("fisher_gate"):
            return None
        return first_tail_share(curves.layers["fisher_gate"], self.share_above)


RULES = (FisherGate(),)
