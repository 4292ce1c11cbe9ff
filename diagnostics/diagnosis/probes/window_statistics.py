"""How concentrated the prompt's own attention is in each layer: what StructKV looks for its pivot in.

StructKV (arXiv 2604.06746) reads the entropy, the mass on the top tokens and the variance of the attention of the last
8 prompt queries, mean over heads. Ours are three choices that the paper leaves open: the window's own tokens are left
out, as in the scores of SnapKV and its followers; the rest is scaled to sum to 1; and the top tokens are 20%.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch

from diagnostics.diagnosis.observers import DecodeRows
from diagnostics.diagnosis.probes.probe import Measured, Probe, PromptContext
from diagnostics.diagnosis.prompt_window import SHORT
from diagnostics.support.sums import total

TOP_SHARE = 0.2


class WindowStatistics(Probe):
    """Entropy, top mass and variance of p: the window's mean attention over the tokens before it, scaled to sum 1."""

    name = "window_statistics"
    optional = True
    describes: ClassVar[Mapping[str, str]] = {
        "window_entropy": "entropy of p, the attention of the last 8 prompt queries over the tokens before them, mean "
        "over queries and heads, scaled to sum 1; nats, 0..log(tokens)",
        "window_top20": "share of p on the 20% of tokens that get most of it, 0..1",
        "window_variance": "variance of p over tokens, >= 0; all three NaN where a sliding window hides a part of the "
        "prompt, or the prompt is no longer than 8 tokens",
    }

    def __init__(self, context: PromptContext) -> None:
        super().__init__(context)
        self.columns = {name: np.full(context.n_layers, np.nan) for name in self.describes}

    def on_decode(self, rows: DecodeRows) -> None:
        """Measure the window of one layer."""
        n_prompt = self.context.layout.n_prompt
        n_tokens = n_prompt - SHORT
        if n_tokens < 1 or not self.context.sees_all(rows, n_prompt):
            return
        p = self.context.window(rows, SHORT).sum(0)[:n_tokens].cpu().double()
        p /= total(p)
        top = p.topk(max(1, int(TOP_SHARE * n_tokens))).values
        self.columns["window_entropy"][rows.layer] = float(torch.special.entr(p).sum())
        self.columns["window_top20"][rows.layer] = float(total(top))
        self.columns["window_variance"][rows.layer] = float(p.var(correction=0))

    def measured(self) -> Measured:
        """Return one column per line of ``describes``."""
        return Measured(layers=self.columns)
