"""Where the importance of prompt tokens has stabilised, by FastKV's score.

FastKV (arXiv 2502.01068) keeps the prompt tokens that the last few prompt queries attend to. If the top tokens of
layer l are those of the layers above it, a choice made at layer l holds: token importance has stabilised.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from diagnostics.diagnosis.observers import AttentionRows, DecodeRows
from diagnostics.diagnosis.probes.probe import Measured, Probe, PromptContext
from diagnostics.policies.fastkv import FastKVPolicy
from diagnostics.policies.salience import pooled_attention

TOP_SHARE = 0.2


class Saliency(Probe):
    """Overlap of the most salient prompt tokens between layers."""

    name = "saliency"
    describes: ClassVar[Mapping[str, str]] = {
        "saliency_overlap": "overlap of the top 20% of prompt tokens with those of each later layer, mean over later "
        "layers, 0..1 (0.2 by chance); NaN in the last layer",
        "saliency_overlap_next": "overlap of the top 20% of prompt tokens with those of the next layer, 0..1; NaN in "
        "the last layer",
    }

    def __init__(self, context: PromptContext) -> None:
        super().__init__(context)
        self.scores: list[Tensor] = []

    def on_decode(self, rows: DecodeRows) -> None:
        """Score the prompt tokens of one layer."""
        self.scores.append(saliency_scores(rows.attention, self.context.layout.n_prompt).cpu())

    def measured(self) -> Measured:
        """Return the overlap of each layer with the later ones."""
        overlap = top_overlap(torch.stack(self.scores))
        n_layers = len(overlap)
        mean, following = np.full(n_layers, np.nan), np.full(n_layers, np.nan)
        for layer in range(n_layers - 1):
            mean[layer] = overlap[layer, layer + 1 :].mean()
            following[layer] = overlap[layer, layer + 1]
        return Measured(layers={"saliency_overlap": mean, "saliency_overlap_next": following})


def saliency_scores(attention: AttentionRows, n_prompt: int) -> Tensor:
    """Score prompt tokens as FastKV does: [n_prompt - window], empty for prompts not longer than the window.

    Attention of the last ``window`` prompt queries, softmax over the whole prompt, summed over queries; max-pooled
    along the tokens with kernel 7; summed over heads.
    """
    window = min(FastKVPolicy.window, attention.n_window)
    kept = n_prompt - window
    total = attention.value.new_zeros(max(kept, 0), dtype=torch.float32)
    if kept <= 0:
        return total
    for kv_head in range(attention.n_kv_heads):
        weights = attention.weights(kv_head, slice(attention.n_window - window, attention.n_window), n_prompt)
        total += pooled_attention(weights[:, :, :kept], FastKVPolicy.kernel).sum(0)
    return total


def top_overlap(scores: Tensor) -> np.ndarray:
    """Return the share of top tokens each pair of layers has in common: [L, tokens] -> [L, L]; NaN without tokens."""
    n_layers, n_tokens = scores.shape
    if n_tokens == 0:
        return np.full((n_layers, n_layers), np.nan)
    count = max(1, int(TOP_SHARE * n_tokens))
    chosen = torch.zeros_like(scores).scatter_(1, scores.topk(count, dim=1).indices, 1.0)
    return (chosen @ chosen.T / count).numpy()
