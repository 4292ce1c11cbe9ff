"""The attention of the last prompt positions over the prompt in one layer: what several rules score tokens by."""

import torch
from torch import Tensor, nn

from diagnostics.diagnosis.observers import AttentionRows

# Numbers of last prompt queries: SimLayerKV's, that of StructKV and CLAA, and ASL's.
LAZY, SHORT, LONG = 1, 8, 32
# Neighbours over which ASL and CLAA average scores.
KERNEL = 7


def window_sums(attention: AttentionRows, n_prompt: int) -> dict[int, Tensor]:
    """Return what each prompt token receives from the last 1, 8 and 32 prompt queries, float32 [heads, n_prompt] each.

    Sums over the queries; the softmax of each runs over the whole prompt (and the model's sinks). A prompt of fewer
    tokens has fewer queries.
    """
    longest = slice(max(0, attention.n_window - LONG), attention.n_window)
    sums: dict[int, list[Tensor]] = {LAZY: [], SHORT: [], LONG: []}
    for kv_head in range(attention.n_kv_heads):
        weights = attention.weights(kv_head, longest, n_prompt)
        for n_queries, found in sums.items():
            found.append(weights[:, -n_queries:].sum(1))
    return {n_queries: torch.cat(found) for n_queries, found in sums.items()}


def pooled(scores: Tensor) -> Tensor:
    """Average scores [rows, tokens] over neighbours; the zeros that pad both ends count, as in the published codes."""
    return nn.functional.avg_pool1d(scores, KERNEL, stride=1, padding=KERNEL // 2)
