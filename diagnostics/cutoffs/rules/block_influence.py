"""ShortGPT's block influence: how much a layer turns the prompt's residuals."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from diagnostics.cutoffs.rules.rule import Curves, Rule, first_from


@dataclass(frozen=True)
class BlockInfluence(Rule):
    """Smallest k from which on no layer but the last turns prompt rows by more than a share of the median."""

    share_of_median: float = 0.5
    name = "block-influence"
    title = "ShortGPT: block influence"
    source = "ShortGPT, arXiv 2403.03853"
    thresholds = "none for a depth: the published rule removes the layers with the least influence"
    mapping = "smallest k with 1 - cos below half of its median in the layers from k on, the last one left out"
    blind = "what decode rows take from the prompt; outlier dimensions hide changes in the raw cosine"
    reads: ClassVar[tuple[str, ...]] = ("drift_prompt",)

    def cutoff(self, curves: Curves) -> int | None:
        """Return the start of the layers of little influence below the last one, 1 at least; None if there is none."""
        if not curves.complete("drift_prompt"):
            return None
        influence = curves.layers["drift_prompt"]
        found = first_from(influence[:-1] < self.share_of_median * np.median(influence))
        return None if found is None else max(1, found)


RULES = (BlockInfluence(),)
