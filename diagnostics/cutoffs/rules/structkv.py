"""StructKV: the pivot layer, at which the attention over the prompt changes most."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from diagnostics.cutoffs.rules.rule import Curves, Rule


@dataclass(frozen=True)
class Pivot(Rule):
    """Layer with the largest weighted change of entropy, top share and variance of the window's attention."""

    entropy_weight: float = 0.2
    top_weight: float = 0.3
    variance_weight: float = 0.5
    name = "structkv"
    title = "StructKV: pivot"
    source = "StructKV, arXiv 2604.06746"
    thresholds = "weights 0.2 (less entropy), 0.3 (top share), 0.5 (variance) of the last 8 prompt queries"
    mapping = "k = 1 + the layer of the largest change; changes are scaled to 0..1, layer 0 and the last one left out"
    blind = "layers with sliding windows; whether anything changes at all, since changes are relative"
    reads: ClassVar[tuple[str, ...]] = ("window_entropy", "window_top20", "window_variance")

    def cutoff(self, curves: Curves) -> int | None:
        """Return 1 + the pivot, the lowest of equal ones; None where no layer differs from another."""
        change = self.curve(curves)
        if change is None:
            return None
        inner = change[1:-1]
        return int(np.argmax(inner)) + 2 if len(inner) and np.ptp(inner) > 0 else None

    def curve(self, curves: Curves) -> np.ndarray | None:
        """Return the weighted change [L], NaN in layer 0; None where a column is missing."""
        if not all(map(curves.complete, self.reads)):
            return None
        entropy, top, variance = (curves.layers[name] for name in self.reads)
        weighted = (
            self.entropy_weight * _scaled_change(-entropy)
            + self.top_weight * _scaled_change(top)
            + self.variance_weight * _scaled_change(variance)
        )
        return np.concatenate([[np.nan], weighted])


def _scaled_change(values: np.ndarray) -> np.ndarray:
    """Differences between consecutive layers, scaled to 0..1: [L] -> [L - 1]; 0 where all are equal."""
    change = np.diff(values)
    if not len(change) or np.ptp(change) == 0:
        return np.zeros(len(change))
    return (change - change.min()) / np.ptp(change)


RULES = (Pivot(),)
