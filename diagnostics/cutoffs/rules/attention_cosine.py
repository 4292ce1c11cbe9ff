"""LLM-Drop: attention sublayers that hardly turn the residual can be dropped."""

from dataclasses import dataclass
from typing import ClassVar

from diagnostics.cutoffs.rules.rule import Curves, Rule, first_from, largest


@dataclass(frozen=True)
class DroppableAttention(Rule):
    """Start of the droppable layers that reach the last one: the share with the largest cosine across attention."""

    share: float = 0.25
    name = "llm-drop"
    title = "LLM-Drop: attention cosine"
    source = "LLM-Drop, arXiv 2406.15786"
    thresholds = "8 of 32 attention sublayers, those with the largest cosine"
    mapping = "k = start of the droppable layers that reach the last one"
    blind = "which tokens the attention is on; the drop is meant for all tokens, not for the prompt alone"
    reads: ClassVar[tuple[str, ...]] = ("attention_cosine",)

    def cutoff(self, curves: Curves) -> int | None:
        """Return the start of the droppable layers at the end, 1 at least; None if the last one is not droppable."""
        if not curves.complete("attention_cosine"):
            return None
        droppable = largest(curves.layers["attention_cosine"], round(self.share * curves.n_layers))
        found = first_from(droppable)
        return None if found is None else max(1, found)


RULES = (DroppableAttention(),)
