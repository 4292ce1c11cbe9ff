"""CLAA: how well the prompt's own window finds the tokens that the answer will attend to."""

from dataclasses import dataclass

import numpy as np

from diagnostics.cutoffs.rules.rule import Curves, Rule, first_where


@dataclass(frozen=True)
class OracleAgreement(Rule):
    """First layer whose important tokens are nearly as much those of the answer as any layer's."""

    name: str
    title: str
    n_layers: int
    reads: tuple[str, ...]  # type: ignore[misc]  # each of the two reads its own column
    share_of_best: float = 0.95
    source = "CLAA, arXiv 2602.16054"
    thresholds = "top 10% of the tokens; the published cross-layer window is 4 layers"
    mapping = "k = 1 + the first layer whose recall reaches 95% of the best"
    blind = "layers with sliding windows; prompts whose last tokens do not say what will be asked of them"

    def cutoff(self, curves: Curves) -> int | None:
        """Return the layers up to the first that recalls nearly most; None where none recalls any."""
        recall = curves.layers.get(self.reads[0])
        start = self.n_layers - 1  # the first layer that ends a group of so many
        if recall is None or not len(recall[start:]) or not np.isfinite(recall[start:]).all():
            return None
        best = float(np.max(recall[start:]))
        found = first_where(recall[start:] >= self.share_of_best * best) if best > 0 else None
        return None if found is None else start + found + 1

    def why_none(self, curves: Curves) -> str:
        """Say that numbers are missing, or that nothing is recalled."""
        if curves.n_layers < self.n_layers:
            return f"finds none: the model has fewer than {self.n_layers} layers"
        missing = int(np.isnan(curves.layers[self.reads[0]][self.n_layers - 1 :]).sum())
        if missing:
            return f"finds none: {missing} of {curves.n_layers} layers have no recall"
        return "finds none: no layer recalls any of the tokens"


RULES = (
    OracleAgreement("claa", "CLAA: oracle recall of 4 layers", 4, ("oracle_recall_4",)),
    OracleAgreement("oracle", "Oracle recall of one layer", 1, ("oracle_recall",)),
)
