"""DASH's measure layer by layer: how much attention adds to the prompt's residuals."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from diagnostics.cutoffs.rules.rule import Curves, Rule, first_from


@dataclass(frozen=True)
class AttentionUpdate(Rule):
    """Smallest k from which on attention adds less than a share of the median to prompt rows."""

    share_of_median: float = 0.5
    name = "dash-update"
    title = "DASH: attention update"
    source = "DASH (Delta Attention Selective Halting), arXiv 2604.18103"
    thresholds = "none for layers: the published rule ranks the tokens of one layer by it"
    mapping = "smallest k from which on the mean update relative to the residual is below half of its median"
    blind = "what decode rows take from the prompt"
    reads: ClassVar[tuple[str, ...]] = ("attention_update_prompt",)

    def cutoff(self, curves: Curves) -> int | None:
        """Return the start of the layers with small updates that reach the last one; None if that is not small."""
        if not curves.complete("attention_update_prompt"):
            return None
        update = curves.layers["attention_update_prompt"]
        found = first_from(update < self.share_of_median * np.median(update))
        return None if found is None else max(1, found)


RULES = (AttentionUpdate(),)
