"""Linear CKA: from which layer on the prompt's states are those of the end, up to rotation and scale."""

from dataclasses import dataclass
from typing import ClassVar

from diagnostics.cutoffs.rules.rule import Curves, Rule, first_where


@dataclass(frozen=True)
class CentredKernelAlignment(Rule):
    """Smallest k at which the prompt's states are similar to the final ones."""

    min_similarity: float = 0.9
    name = "cka"
    title = "CKA to the final states"
    source = "Similarity of Neural Network Representations Revisited, arXiv 1905.00414"
    thresholds = "none for a depth; 0.9 is ours"
    mapping = "smallest k with linear CKA(h_k, h_L) above 0.9"
    blind = "what decode rows take from the prompt; directions of little variance"
    reads: ClassVar[tuple[str, ...]] = ("cka_to_final",)

    def cutoff(self, curves: Curves) -> int | None:
        """Return the first depth with similar states, 1 at least: at full depth they are the same."""
        if not curves.complete("cka_to_final"):
            return None
        found = first_where(curves.layers["cka_to_final"][1:] > self.min_similarity)
        return curves.n_layers if found is None else found + 1


RULES = (CentredKernelAlignment(),)
