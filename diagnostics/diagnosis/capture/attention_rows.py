"""Attention of a few query rows: recomputed from queries and keys, or as a backend's own pattern gives it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from diagnostics.diagnosis.capture.residual_path import Addition
from diagnostics.diagnosis.observers import AttentionRows
from diagnostics.support.sums import total


@dataclass(frozen=True)
class RecomputedAttention(AttentionRows):
    """All it takes to recompute the rows exactly.

    ``query`` [heads, rows, head_dim] and ``key`` [kv_heads, T, head_dim] are after rotary embedding and query-key norm;
    ``visible`` [rows, T] is the model's own mask (causal, sliding, ...). ``scaling``, ``softcap`` and ``sinks`` are
    what the model's attention does to the scores. ``projected`` [1, n_decode, ...] is what the projection of the
    queries gives for the decode rows, before norm and rotary embedding, if that projection is known.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor
    scaling: float
    softcap: float | None
    sinks: Tensor | None
    output: Tensor
    adds: Addition
    projected: Tensor | None = None

    _hidden: Tensor = field(init=False, repr=False)
    _first_hidden: int = field(init=False, repr=False)

    @property
    def n_rows(self) -> int:
        """Number of query rows."""
        return self.query.shape[1]

    @property
    def has_sinks(self) -> bool:
        """Whether the model has learned sinks."""
        return self.sinks is not None

    def __post_init__(self) -> None:
        # (No cached_property: this class travels.)
        object.__setattr__(self, "_hidden", ~self.visible)
        # First key that some row may not see.
        object.__setattr__(self, "_first_hidden", int(self.visible.all(0).long().cumprod(0).sum()))

    def weights(self, kv_head: int, rows: slice, n_keys: int | None = None) -> Tensor:
        """Return attention weights of the query heads of one KV head; see `AttentionRows.weights`."""
        return self.weights_and_sinks(kv_head, rows, n_keys)[0]

    def weights_and_sinks(self, kv_head: int, rows: slice, n_keys: int | None = None) -> tuple[Tensor, Tensor]:
        """Return weights on keys and sinks; see `AttentionRows.weights_and_sinks`."""
        group = self.query.shape[0] // self.key.shape[0]
        heads = slice(kv_head * group, (kv_head + 1) * group)
        query = (self.query[heads, rows].float() * self.scaling).flatten(0, 1)
        scores = (query @ self.key[kv_head, :n_keys].float().T).unflatten(0, (group, -1))
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        # Nearly all keys are visible to all rows, unless a window slides: only the others are touched.
        hidden = self._hidden[rows, self._first_hidden : n_keys]
        scores[..., self._first_hidden :].masked_fill_(hidden, -torch.inf)
        # A softmax in place: fresh memory for a second tile costs more than the arithmetic.
        peak = scores.amax(-1, keepdim=True)
        norm = total(scores.sub_(peak).exp_())[..., None]
        on_sinks = torch.zeros_like(norm)
        if self.sinks is not None:
            on_sinks += (self.sinks[heads, None, None].float() - peak).exp()
            norm += on_sinks
        return scores.div_(norm.float()), (on_sinks / norm)[..., 0]


@dataclass(frozen=True)
class PatternAttention(AttentionRows):
    """Rows of the attention pattern itself, [heads, rows, T], after the softmax."""

    pattern: Tensor
    value: Tensor
    output: Tensor
    adds: Addition
    has_sinks: bool = False

    @property
    def n_rows(self) -> int:
        """Number of query rows."""
        return self.pattern.shape[1]

    def weights(self, kv_head: int, rows: slice, n_keys: int | None = None) -> Tensor:
        """Return attention weights of the query heads of one KV head; see `AttentionRows.weights`.

        Rows that see later keys than the first ``n_keys`` cannot be had: their softmax is made already.
        """
        group = self.n_heads // self.n_kv_heads
        return self.pattern[kv_head * group : (kv_head + 1) * group, rows, :n_keys].to(torch.float32, copy=True)


def visible_keys(mask: object, first_row: int, n_rows: int, n_keys: int, window: int | None, rows: slice) -> Tensor:
    """Return which keys some query rows may see, bool [rows, keys], from whatever mask the model passed.

    ``first_row`` is the position of the first of the pass's ``n_rows``; ``mask`` may be [1, 1, n_rows, keys], boolean
    or additive, or missing: then attention is causal, within ``window`` positions if that is given.
    """
    if isinstance(mask, Tensor) and mask.ndim == 4:
        chosen = mask[0, 0, rows, :n_keys]
        # Additive masks hold 0 or the lowest number; half of it is safely between.
        return chosen if chosen.dtype == torch.bool else chosen > torch.finfo(chosen.dtype).min / 2
    positions = first_row + torch.arange(n_rows)[rows, None]
    keys = torch.arange(n_keys)[None]
    visible = keys <= positions
    if window:
        visible &= keys > positions - window
    return visible


Rows = tuple[Tensor, Tensor]  # queries [heads, rows, head_dim], and the keys that each may see, bool [rows, keys]


def after_window(early: Rows | None, rows: Rows) -> Rows:
    """Put the observation window's rows, of a pass that ended before, in front of the decode rows."""
    if early is None:
        return rows
    (early_query, early_visible), (query, visible) = early, rows
    # Context rows cannot see the keys of a later pass.
    early_visible = nn.functional.pad(early_visible, (0, visible.shape[1] - early_visible.shape[1]))
    return torch.cat([early_query, query], dim=1), torch.cat([early_visible, visible])
