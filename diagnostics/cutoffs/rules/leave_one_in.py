"""ReCache: how much it helps if decode rows see the prompt in one layer alone."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from diagnostics.cutoffs.rules.rule import Curves, Rule, first_tail_share, largest

SOURCE = "ReCache"
BLIND = "layers that help only together"


def _helps(curves: Curves) -> np.ndarray | None:
    """Fall of the NLL by each layer [L], 0 where it rises; None where one is missing."""
    if not curves.complete("leave_one_in_nll"):
        return None
    return np.maximum(curves.layers["leave_one_in_nll"], 0)


@dataclass(frozen=True)
class TopLayers(Rule):
    """All layers up to the last one of the set that helps most."""

    share_of_layers: float = 20 / 36
    name = "recache"
    title = "ReCache: layers that help most"
    source = SOURCE
    thresholds = "20 of 36 layers"
    mapping = "k = 1 + the last layer of the set; a layer that does not help is never in it"
    blind = BLIND
    reads: ClassVar[tuple[str, ...]] = ("leave_one_in_nll",)

    def cutoff(self, curves: Curves) -> int | None:
        """Return the layers up to the last one of the set; None if no layer helps."""
        helps = _helps(curves)
        if helps is None:
            return None
        found = np.flatnonzero(largest(helps, round(self.share_of_layers * curves.n_layers)) & (helps > 0))
        return int(found[-1]) + 1 if len(found) else None


@dataclass(frozen=True)
class HelpAbove(Rule):
    """Smallest k with little of the total help in the layers from k on."""

    share_above: float = 0.05
    name = "leave-one-in"
    title = "Leave-one-in: help above"
    source = SOURCE
    thresholds = "none for a depth; 5% is ours"
    mapping = "smallest k with at most 5% of the summed falls of the NLL in the layers from k on"
    blind = BLIND
    reads: ClassVar[tuple[str, ...]] = ("leave_one_in_nll",)

    def cutoff(self, curves: Curves) -> int | None:
        """Return the smallest cutoff above which at most the share is left; None if no layer helps."""
        helps = _helps(curves)
        return None if helps is None else first_tail_share(helps, self.share_above)


RULES = (HelpAbove(), TopLayers())
