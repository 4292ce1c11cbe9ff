"""Angular distance of blocks: from which layer on all the rest turn the last prompt token little."""

from dataclasses import dataclass
from typing import ClassVar

from diagnostics.cutoffs.rules.rule import Curves, Rule, first_where


@dataclass(frozen=True)
class AngularDistance(Rule):
    """Smallest k with a small angle between the states that enter layer k and the last layer."""

    max_distance: float = 0.2
    name = "angular-distance"
    title = "Angular distance to the last layer"
    source = "The Unreasonable Ineffectiveness of the Deeper Layers, arXiv 2403.17887"
    thresholds = "none for a depth: the published rule removes the block with the least distance; 0.2 is ours"
    mapping = "smallest k with arccos(cos(h_k, h_L-1)) / pi below 0.2"
    blind = "all tokens but the last one of the prompt"
    reads: ClassVar[tuple[str, ...]] = ("angular_to_last",)

    def cutoff(self, curves: Curves) -> int | None:
        """Return the first layer within the distance, 1 at least."""
        if not curves.complete("angular_to_last"):
            return None
        found = first_where(curves.layers["angular_to_last"][1:] < self.max_distance)
        return None if found is None else found + 1


RULES = (AngularDistance(),)
