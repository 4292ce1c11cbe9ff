"""CLAA: how well the prompt's own window finds the tokens that the answer will attend to."""

from dataclasses import dataclass

import numpy as np

from diagnostics.cutoffs.rules.rule import Curves, Rule, first_where


@dataclass(frozen=True)
class OracleAgreement(Rule):
    """First layer whose important tokens are nearly as much those of the answer as any layer's."""

    name: str
    title: str
    reads: tuple[str, ...]  # type: ignore[misc]  # each of the two reads its own column
    share_of_best: float = 0.95
    source = "CLAA, arXiv 2602.16054"
    thresholds = "top 10% of the tokens; the published cross-layer window is 4 layers"
    mapping = "k = 1 + the first layer whose recall reaches 95% of the best"
    blind = "layers with sliding windows; prompts whose last tokens do not say what will be asked of them"

    def cutoff(self, curves: Curves) -> int | None:
        """Return the layers up to the first that recalls nearly most; None where none recalls any."""
        (column,) = self.reads
        if not curves.complete(column):
            return None
        recall = curves.layers[column]
        best = float(np.max(recall))
        found = first_where(recall >= self.share_of_best * best) if best > 0 else None
        return None if found is None else found + 1


RULES = (
    OracleAgreement("claa", "CLAA: oracle recall of 4 layers", ("oracle_recall_4",)),
    OracleAgreement("oracle", "Oracle recall of one layer", ("oracle_recall",)),
)
