"""FastKV's salience: which prompt tokens the last prompt queries attend to, and which tokens are kept for it.

`diagnostics.policies.fastkv` defines the score. The saliency probe also uses `pooled_attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from diagnostics.policies.columns import EMPTY, Piece, Pieces, as_tensor

if TYPE_CHECKING:
    from diagnostics.models.attention_tap import AttentionCall
    from diagnostics.policies.call import Call


def pooled_attention(weights: Tensor, kernel: int) -> Tensor:
    """Sum attention weights [heads, queries, tokens] over the queries; max-pool them over ``kernel`` neighbours.

    Returns [heads, tokens].
    """
    pooled = nn.functional.max_pool1d(weights.sum(1)[None], kernel, stride=1, padding=kernel // 2)
    return pooled[0]


def keep_salient(
    call: Call,
    layer: int,
    attention: AttentionCall,
    *,
    window: int,
    kernel: int,
    retained: Callable[[int], int],
    propagated: Callable[[int], int] | None,
) -> Pieces | None:
    """Reduce a layer's cache to its most salient tokens; return the columns that run on, or None if all do.

    Parameters
    ----------
    call, layer, attention
        The call with the entire prompt, the layer, and its attention over the columns that run through it.
    window, kernel
        Last tokens whose queries score the others, and the width of the max-pooling.
    retained, propagated
        How many of a row's n tokens the layer caches and how many run on; ``propagated`` is None where all run on.
    """
    batch, device = attention.key.shape[0], attention.key.device
    columns = as_tensor(call.rows, device).expand(batch, -1)
    if call.padding is None:
        lengths = [columns.shape[1]] * batch
    else:
        lengths = (columns >= call.padding.to(device)[:, None]).sum(1).tolist()
    cached = [retained(n) for n in lengths]
    running = lengths if propagated is None else [propagated(n) for n in lengths]
    if cached == lengths and running == lengths:
        return None
    slots, chosen = [], []
    for row, n in enumerate(lengths):  # slots of a row: unused ones first, then its n tokens
        scores = _scores(attention, row, n, window, kernel)
        offset = columns.shape[1] - n
        slots.append(offset + _most_salient(scores, cached[row], n))
        chosen.append(offset + _most_salient(scores.sum(0), running[row], n))
    full = call.padding is None
    if cached != lengths:
        index = _pad_left(slots)  # [batch, kv_heads, kept]
        held = torch.take_along_dim(columns[:, None].expand(-1, index.shape[1], -1), index.clamp(min=0), dim=2)
        held = held.masked_fill(index == EMPTY, EMPTY)
        call.cache.layers[layer].keep(index.clamp(min=0), Piece(0, call.stop, held, full))
    if running == lengths:
        return None
    index = _pad_left(chosen).sort(dim=-1).values
    kept = columns.gather(1, index.clamp(min=0)).masked_fill(index == EMPTY, EMPTY)
    return (Piece(0, call.stop, kept, full),)


def _scores(attention: AttentionCall, row: int, n: int, window: int, kernel: int) -> Tensor:
    """Salience of the first n - window of a row's n tokens, per KV head: float32 [kv_heads, n - window]."""
    key = attention.key[row, :, -n:]
    query = attention.query[row, :, -min(window, n) :]
    heads, queries = query.shape[:2]
    scaling = attention.options.get("scaling") or query.shape[-1] ** -0.5
    softcap, sinks = attention.options.get("softcap"), attention.options.get("s_aux")
    query = query.reshape(len(key), -1, query.shape[-1])  # query heads of a KV head are adjacent
    logits = (query @ key.mT).view(heads, queries, n).float() * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    ahead = torch.ones(queries, queries, dtype=torch.bool, device=key.device).triu(1)
    logits[:, :, -queries:].masked_fill_(ahead, -torch.inf)
    if sinks is not None:  # a sink takes weight from the tokens and has none itself
        logits = torch.cat([logits, sinks[:, None, None].float().expand(-1, queries, 1)], dim=-1)
    # Cast as the published code does: the order of the scores depends on it.
    weights = logits.softmax(-1).to(query.dtype)[:, :, : max(0, n - window)]
    if weights.shape[-1] == 0:
        return weights.new_zeros((len(key), 0), dtype=torch.float32)
    pooled = pooled_attention(weights, kernel)
    return pooled.view(len(key), -1, pooled.shape[-1]).sum(1).float()


def _most_salient(scores: Tensor, capacity: int, n: int) -> Tensor:
    """Return which of ``n`` tokens stay: those with the highest scores and the unscored last ones, [..., capacity]."""
    scored = scores.shape[-1]
    # Max-pooling gives neighbours equal scores; a stable sort prefers the earlier one on every device.
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : capacity - (n - scored)]
    tail = torch.arange(scored, n, device=scores.device).expand(*best.shape[:-1], -1)
    return torch.cat([best, tail], dim=-1)


def _pad_left(slots: list[Tensor]) -> Tensor:
    """Stack slots of rows that keep different numbers; unused ones are EMPTY and come first."""
    width = max(part.shape[-1] for part in slots)
    return torch.stack([nn.functional.pad(part, (width - part.shape[-1], 0), value=EMPTY) for part in slots])
