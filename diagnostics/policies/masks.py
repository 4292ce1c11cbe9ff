"""Attention masks from columns, for layers that hold different tokens.

transformers builds one mask per forward pass for all layers of a kind, with the size of one of them. Under a policy
every layer gets its own, in the form that its attention implementation takes: none where causal order suffices, so that
fused kernels stay in use; boolean for ``sdpa``; added to the scores for ``eager``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from diagnostics.policies.columns import Piece, as_tensor, count

SERVED = ("sdpa", "eager")


def attention_mask(
    queries: Sequence[Piece],
    keys: Sequence[Piece],
    *,
    padding: Tensor | None,
    window: int | None,
    implementation: str,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """Return the mask of one layer, [1 or batch, 1, queries, keys], or None where none is needed.

    Parameters
    ----------
    queries, keys
        Columns of the query rows and of all keys, those of the query rows last.
    padding
        Padding columns at the left of each row, int64 [batch]; None without padding.
    window
        Positions a query of a sliding layer sees, itself included; None where it sees all before it.
    implementation
        ``sdpa`` or ``eager``.
    dtype, device
        Type and device of the residual.
    """
    n_queries = count(queries)
    plain = padding is None and all(piece.full for piece in keys)
    first, last = min(piece.start for piece in keys), max(piece.stop for piece in keys)
    plain &= window is None or last - first <= window
    if plain and n_queries == 1 and last == queries[-1].stop:
        return None
    if plain and implementation == "sdpa" and count(keys) == n_queries:
        return None  # the layer held no keys before: plain causal order
    query, key = as_tensor(queries, device)[:, :, None], as_tensor(keys, device)[:, None]
    visible = (key <= query) & (key >= 0)
    if padding is not None:
        visible = visible & (key >= padding.to(device)[:, None, None])
    if window is not None:
        visible = visible & (key > query - window)
    # A padding row sees itself: a softmax over nothing is NaN, and NaN keys reach others even through weights of 0.
    visible = (visible | (key == query))[:, None]
    if implementation == "sdpa":
        return visible
    # masked_fill_ in ``dtype`` itself: the lowest float64 would overflow torch's default type.
    return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, torch.finfo(dtype).min)
