"""How many of the tokens that the answer attends to a layer's prompt attention would have picked: CLAA's oracle.

CLAA (arXiv 2602.16054) calls important what the answer itself attends to: for each token the largest attention weight
over layers and heads, mean over the answer's queries, average-pooled over 7 neighbours; the top 10% are the oracle's.
A prefill can only look at the prompt's last 8 queries: their weights summed over queries and the heads of a KV head,
pooled alike, and of these the largest over KV heads and over the last one or four layers. Layers whose sliding window
hides a part of the prompt take no part. Anchors and window are kept anyway, so both look at the tokens between them.
"""

from collections import deque
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from diagnostics.diagnosis.observers import DecodeRows, Outcome
from diagnostics.diagnosis.probes.probe import Measured, Probe, PromptContext
from diagnostics.diagnosis.prompt_window import SHORT, pooled

TOP_SHARE = 0.1
N_LAYERS = 4  # layers whose scores CLAA pools


class OracleAgreement(Probe):
    """Recall of the oracle's tokens by the prompt's own attention in one layer, and in the last four."""

    name = "oracle_agreement"
    optional = True
    describes: ClassVar[Mapping[str, str]] = {
        "oracle_recall": "share of the oracle's tokens (the 10% of prompt tokens that the decode queries attend to "
        "most in some layer) that the attention of the last 8 prompt queries in this layer puts in its own top 10%, "
        "0..1; NaN where a sliding window hides a part of the prompt, or nothing lies between anchors and window",
        "oracle_recall_4": f"oracle_recall of the largest scores over the last {N_LAYERS} layers; NaN where one of "
        "them is missing",
    }

    def __init__(self, context: PromptContext) -> None:
        super().__init__(context)
        layout = context.layout
        self.tokens = slice(layout.n_anchors, layout.n_prompt - SHORT)
        self.n_tokens = max(0, self.tokens.stop - self.tokens.start)
        self.peak: Tensor | None = None  # largest weight over layers and heads, [n_decode, tokens]
        self.scores: dict[int, Tensor] = {}  # of the layers that see the whole prompt, [tokens]
        self.columns = {name: np.full(context.n_layers, np.nan) for name in self.describes}

    def on_decode(self, rows: DecodeRows) -> None:
        """Note what one layer attends to: its decode rows, and the prompt's window."""
        context = self.context
        if not self.n_tokens:
            return
        if context.sees_all(rows):
            peak = context.attended(rows).peak[:, : self.n_tokens]
            self.peak = peak if self.peak is None else torch.maximum(self.peak, peak.to(self.peak.device))
        if context.sees_all(rows, context.layout.n_prompt):
            received = context.window(rows, SHORT)[:, self.tokens]
            by_kv_head = received.unflatten(0, (rows.attention.n_kv_heads, -1)).sum(1)
            self.scores[rows.layer] = pooled(by_kv_head).amax(0).cpu()

    def on_outcome(self, outcome: Outcome) -> None:
        """Compare every layer's tokens with the oracle's, which all layers have a part in."""
        if self.peak is None:
            return
        oracle = top(pooled(self.peak.cpu().double().mean(0)[None])[0])
        last: deque[Tensor | None] = deque(maxlen=N_LAYERS)
        for layer in range(self.context.n_layers):
            scores = self.scores.get(layer)
            last.append(scores)
            if scores is not None:
                self.columns["oracle_recall"][layer] = recall(scores, oracle)
            seen = [scores for scores in last if scores is not None]
            if len(seen) == N_LAYERS:
                self.columns["oracle_recall_4"][layer] = recall(torch.stack(seen).amax(0), oracle)

    def measured(self) -> Measured:
        """Return one column per line of ``describes``."""
        return Measured(layers=self.columns)


def top(scores: Tensor) -> Tensor:
    """Return which tokens have the highest scores [tokens], the earlier of equal ones first: bool [tokens]."""
    order = scores.sort(descending=True, stable=True).indices
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[order[: max(1, int(TOP_SHARE * len(scores)))]] = True
    return chosen


def recall(scores: Tensor, oracle: Tensor) -> float:
    """Share of the oracle's tokens that are among the top ones by ``scores``."""
    return float((top(scores) & oracle).sum() / oracle.sum())
