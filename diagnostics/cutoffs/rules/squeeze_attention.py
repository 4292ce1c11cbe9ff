"""SqueezeAttention: layers fall into three groups by how little attention turns the residual."""

from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import numpy as np

from diagnostics.cutoffs.rules.rule import Curves, Rule, first_from


@dataclass(frozen=True)
class LeastImportantGroup(Rule):
    """Start of the last run of layers in the group with the largest cosine between before and after the attention."""

    groups: int = 3
    other_at_end: int = 2
    name = "squeeze-attention"
    title = "SqueezeAttention: least important group"
    source = "SqueezeAttention, arXiv 2404.04793"
    thresholds = "3 groups by k-means"
    mapping = "k = start of the group's last run of layers that reaches the end, less up to 2 layers"
    blind = "which tokens the attention is on: it sees what prompt rows take from each other, not what decode rows take"
    reads: ClassVar[tuple[str, ...]] = ("attention_cosine",)

    def cutoff(self, curves: Curves) -> int | None:
        """Return the start of the run, 1 at least; None if there is none, or fewer values than groups."""
        if not curves.complete("attention_cosine"):
            return None
        cosine = curves.layers["attention_cosine"]
        bounds = nearest_groups(cosine, self.groups)
        if bounds is None:
            return None
        least_important = cosine >= bounds[-1]
        for skipped in range(min(self.other_at_end + 1, curves.n_layers)):
            found = first_from(least_important, curves.n_layers - skipped)
            if found is not None:
                return max(1, found)
        return None


def nearest_groups(values: np.ndarray, n_groups: int) -> list[float] | None:
    """Return the smallest value of each of the ``n_groups`` groups, ascending, that are k-means of ``values`` [n].

    Of all ways to part the sorted values the one with the least squared distance to the groups' means, the first of
    equal ones; equal values stay together. None with fewer values than groups.
    """
    ordered = np.sort(values)
    starts = np.flatnonzero(np.diff(ordered) > 0) + 1
    if len(starts) + 1 < n_groups:
        return None
    splits = np.array(list(combinations(starts, n_groups - 1)), dtype=int).reshape(-1, n_groups - 1)
    edges = np.column_stack([np.zeros(len(splits), dtype=int), splits, np.full(len(splits), len(ordered))])
    # Squared distance of a group to its mean: sum of squares - sum^2 / n; centred first, so that little cancels.
    centred = ordered - ordered.mean()
    sums, squares = (np.concatenate([[0.0], np.cumsum(x)]) for x in (centred, centred**2))
    sizes = np.diff(edges, axis=1)
    spread = np.diff(squares[edges], axis=1) - np.diff(sums[edges], axis=1) ** 2 / sizes
    best = edges[np.argmin(spread.sum(axis=1))]
    return [float(ordered[start]) for start in best[:-1]]


RULES = (LeastImportantGroup(),)
