"""ASL (adaptive layer selection): tokens may be selected where their ranks no longer change from layer to layer."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from diagnostics.cutoffs.rules.rule import Curves, Rule, first_where

PUBLISHED_DEPTH = 18  # layers from which on the published first eligible layer, 10, and look-back, 8 layers, fit


@dataclass(frozen=True)
class RankVariance(Rule):
    """First layer whose variance of token ranks over the last layers is below a share of the first eligible layer's."""

    max_ratio: float = 0.3
    name = "asl"
    title = "ASL: rank variance"
    source = "ASL, arXiv 2601.07667"
    thresholds = "V_l / V_ref below 0.3, from layer 10 on, over 8 layers; window 32, top 2048 tokens"
    mapping = "the layer that selects still runs on all tokens: k = l + 1"
    ours = False
    blind = "layers with sliding windows, prompts not longer than the window, and layers below the first eligible one"
    reads: ClassVar[tuple[str, ...]] = ("rank_variance_ratio",)

    def cutoff(self, curves: Curves) -> int | None:
        """Return the layers up to the first one below the ratio; None if none is, or one before it has no number."""
        ratio = curves.layers.get("rank_variance_ratio")
        if ratio is None or not np.isfinite(ratio).any():
            return None
        start = int(np.argmax(np.isfinite(ratio)))  # the first eligible layer
        ratio = ratio[start:]
        found = first_where(ratio < self.max_ratio)
        if found is None or not np.isfinite(ratio[:found]).all():
            return None
        return start + found + 1

    def why_none(self, curves: Curves) -> str:
        """Say whether the ratio stays above, or is unknown; layers below the first eligible one have none."""
        ratio = curves.layers["rank_variance_ratio"]
        known = np.isfinite(ratio)
        if not known.any():
            return "finds none: prompts are too short for it, or the first eligible layer has a sliding window"
        if not known[np.argmax(known) :].all():
            return "finds none: layers with sliding windows are not judged"
        return f"finds none: no ratio is below {self.max_ratio}"

    def remark(self, curves: Curves) -> str:
        """Say that a shallow model has its first eligible layer and look-back scaled to its depth."""
        return "scaled to the depth" if curves.n_layers < PUBLISHED_DEPTH else ""


RULES = (RankVariance(),)
