"""Early exit: the depth at which the logit lens of decode rows already says what the model will say."""

from dataclasses import dataclass
from typing import ClassVar

from diagnostics.cutoffs.rules.rule import Curves, Rule, first_where

BLIND = "the prompt: it looks at decode rows, which run through all layers under SPEED"


@dataclass(frozen=True)
class ConfidentExit(Rule):
    """Smallest depth at which most decode rows would have left: their lens put one token far above the next."""

    share_of_rows: float = 0.9
    name = "calm"
    title = "CALM: confident exit"
    source = "CALM, arXiv 2207.07061"
    thresholds = "gap of the two largest probabilities at least 0.9"
    mapping = "depth by which 90% of the decode rows have left; full depth if fewer do"
    blind = BLIND
    reads: ClassVar[tuple[str, ...]] = ("lens_exited",)

    def cutoff(self, curves: Curves) -> int | None:
        """Return the layers that most rows need."""
        if not curves.complete("lens_exited"):
            return None
        found = first_where(curves.layers["lens_exited"] >= self.share_of_rows)
        return curves.n_layers if found is None else found + 1


@dataclass(frozen=True)
class DraftAcceptance(Rule):
    """Smallest depth at which most drafts by the lens are what the model says."""

    min_acceptance: float = 0.8
    name = "layerskip"
    title = "LayerSkip: accepted drafts"
    source = "LayerSkip, arXiv 2404.16710"
    thresholds = "none for a depth: exits are chosen by hand; acceptance above 0.8 is ours"
    mapping = "first depth whose lens has the model's own top token at more than 80% of decode rows"
    blind = BLIND
    reads: ClassVar[tuple[str, ...]] = ("lens_top1",)

    def cutoff(self, curves: Curves) -> int | None:
        """Return the layers after which drafts are accepted."""
        if not curves.complete("lens_top1"):
            return None
        found = first_where(curves.layers["lens_top1"] > self.min_acceptance)
        return None if found is None else found + 1


RULES = (ConfidentExit(), DraftAcceptance())
