"""DuoAttention without training: where the heads are whose mean query looks far back."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from diagnostics.cutoffs.rules.rule import Curves, Rule, first_tail_share

SOURCE = "DuoAttention, arXiv 2410.10819; score without training as in kvpress"
BLIND = "layers with sliding windows; what a head finds in this text, since it looks at mean queries and keys alone"


def _scores(curves: Curves) -> np.ndarray | None:
    """Scores [L, heads], or None where one is missing."""
    scores = curves.heads.get("head_gate")
    return None if scores is None or not np.isfinite(scores).all() else scores


@dataclass(frozen=True)
class RetrievalHeads(Rule):
    """All layers up to the last one with a retrieval head: a head with one of the largest scores."""

    quantile: float = 0.9
    name = "duo-heads"
    title = "DuoAttention: last retrieval head"
    source = SOURCE
    thresholds = "the published rule keeps half of the heads; the largest tenth is ours"
    mapping = "k = 1 + the last layer that has a head above the 90th percentile"
    blind = BLIND
    reads_heads: ClassVar[tuple[str, ...]] = ("head_gate",)

    def cutoff(self, curves: Curves) -> int | None:
        """Return the layers up to the last retrieval head; None if all heads are equal."""
        scores = _scores(curves)
        if scores is None:
            return None
        found = np.flatnonzero((scores > np.quantile(scores, self.quantile)).any(axis=1))
        return int(found[-1]) + 1 if len(found) else None

    def curve(self, curves: Curves) -> np.ndarray | None:
        """Return the largest score of each layer's heads [L]."""
        scores = _scores(curves)
        return None if scores is None else scores.max(axis=1)


@dataclass(frozen=True)
class RetrievalMass(Rule):
    """Smallest k with little of the total score in the layers from k on."""

    share_above: float = 0.05
    name = "duo-mass"
    title = "DuoAttention: score above"
    source = SOURCE
    thresholds = "none for layers; 5% is ours"
    mapping = "smallest k with at most 5% of the total score in the layers from k on"
    blind = BLIND
    reads_heads: ClassVar[tuple[str, ...]] = ("head_gate",)

    def cutoff(self, curves: Curves) -> int | None:
        """Return the smallest cutoff above which at most the share is left."""
        score = self.curve(curves)
        return None if score is None else first_tail_share(score, self.share_above)

    def curve(self, curves: Curves) -> np.ndarray | None:
        """Return the mean score of each layer's heads [L]."""
        scores = _scores(curves)
        return None if scores is None else scores.mean(axis=1)


RULES = (RetrievalHeads(), RetrievalMass())
