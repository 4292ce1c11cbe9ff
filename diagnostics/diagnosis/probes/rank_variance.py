"""How much the ranking of the prompt's tokens still changes between layers: what ASL waits for.

ASL (arXiv 2601.07667) scores tokens in every layer by the attention of the last 32 prompt queries, average-pooled over
7 neighbours and summed over heads, and ranks them. With O the last layers up to l and U the tokens that one of them
would keep, V_l is the mean over O and U of the squared distance of a rank from its mean over O. Tokens are selected in
the first layer where V_l is below 0.3 of V_ref, its value in the first layer that may be chosen.
"""

from collections import deque
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from diagnostics.diagnosis.observers import DecodeRows
from diagnostics.diagnosis.probes.probe import Measured, Probe, PromptContext
from diagnostics.diagnosis.prompt_window import LONG, pooled

BUDGET = 2048  # tokens that ASL keeps, those of the window among them
# First layer that may be chosen and number of layers in O, as published for 32 layers.
FIRST, OBSERVED, PUBLISHED_DEPTH = 10, 8, 32
SHALLOW = 18  # models of fewer layers get both scaled to their depth


class RankVariance(Probe):
    """Variance of token ranks over the last layers, relative to that at the first layer that may be chosen."""

    name = "rank_variance"
    optional = True
    describes: ClassVar[Mapping[str, str]] = {
        "rank_variance_ratio": f"variance of prompt tokens' ranks over the last {OBSERVED} layers / the same at layer "
        f"{FIRST}, >= 0; NaN before that layer, from where a sliding window hides a part of the prompt, and for "
        f"prompts of up to {LONG} tokens; in models of fewer than {SHALLOW} layers both numbers are scaled: "
        "max(3, L / 4) layers, from layer 10 L / 32 on",
    }

    def __init__(self, context: PromptContext) -> None:
        super().__init__(context)
        self.first, n_observed = observed_layers(context.n_layers)
        self.ranks: deque[Tensor | None] = deque(maxlen=n_observed)  # None of a layer that does not see all
        self.variance = np.full(context.n_layers, np.nan)

    def on_decode(self, rows: DecodeRows) -> None:
        """Rank the tokens in one layer, and compare their ranks with those of the layers before."""
        n_prompt = self.context.layout.n_prompt
        n_tokens = n_prompt - LONG
        sees_all = n_tokens > 0 and self.context.sees_all(rows, n_prompt)
        self.ranks.append(self._ranks(rows, n_tokens) if sees_all else None)
        observed = [ranks for ranks in self.ranks if ranks is not None]
        if rows.layer >= self.first and len(observed) == self.ranks.maxlen:
            self.variance[rows.layer] = rank_variance(torch.stack(observed), BUDGET - LONG)

    def _ranks(self, rows: DecodeRows, n_tokens: int) -> Tensor:
        """Return the rank of each token before the window, 1 for the highest score: float64 [tokens]."""
        received = self.context.window(rows, LONG).sum(0)[:n_tokens]
        scores = pooled(received[None])[0].cpu()
        order = scores.sort(descending=True, stable=True).indices
        ranks = torch.empty(n_tokens, dtype=torch.float64)
        ranks[order] = torch.arange(1, n_tokens + 1, dtype=torch.float64)
        return ranks

    def measured(self) -> Measured:
        """Return the column of the layers table."""
        reference = self.variance[self.first] if self.first < len(self.variance) else np.nan
        ratio = self.variance / reference if reference > 0 else np.full_like(self.variance, np.nan)
        return Measured(layers={"rank_variance_ratio": ratio})


def observed_layers(n_layers: int) -> tuple[int, int]:
    """Return the first layer that may be chosen, and how many layers up to it are observed."""
    if n_layers >= SHALLOW:
        return FIRST, OBSERVED
    n_observed = max(3, round(n_layers / 4))
    return max(round(FIRST / PUBLISHED_DEPTH * n_layers), n_observed - 1), n_observed


def rank_variance(ranks: Tensor, n_kept: int) -> float:
    """Return V of ranks [layers, tokens] over the tokens that are among the first ``n_kept`` in one of the layers."""
    kept = ranks[:, (ranks <= n_kept).any(0)]
    return float(kept.var(dim=0, correction=0).mean())
