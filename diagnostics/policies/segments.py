"""Which tokens are anchors, which are prompt, and which belong to the decode phase.

A row's first ``anchors`` tokens are its *anchors*. The last ``boundary`` prompt tokens and everything generated after
them are *decode phase*; where a short prompt makes the two overlap, the decode phase wins, since the last prompt token
gives the first logits. The rest is *prompt*; padding is in none of the three. Anchors and decode-phase tokens are the
*deep* tokens, which run through all layers.

The rule has three forms. `Segments` marks the tokens of a whole batch, padded on either side: training. `Phases`, with
`deep_columns`, divides the new tokens of one call into a KV cache, padded on the left: inference. `Layout` divides one
row without padding: diagnosis.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from diagnostics.policies.columns import EMPTY, Piece, Pieces, join, span
from diagnostics.support.errors import UserError

if TYPE_CHECKING:
    from diagnostics.policies.cache import PolicyCache


# --- A batch ---


@dataclass(frozen=True, eq=False)
class Segments:
    """The segments of a batch, as masks.

    Attributes
    ----------
    real
        True at tokens, False at padding, bool [batch, tokens].
    decode_phase
        Which columns are decode phase, bool [batch, tokens]; its values at padding are ignored.
    anchors
        Leading tokens of each row that run through all layers, 0 or more.
    """

    real: Tensor
    decode_phase: Tensor
    anchors: int

    @cached_property
    def _seen(self) -> Tensor:
        """Number of the row's tokens up to and including this column."""
        return self.real.cumsum(1)

    @property
    def decode(self) -> Tensor:
        """Decode-phase tokens: bool [batch, tokens]."""
        return self.real & self.decode_phase

    @property
    def anchor(self) -> Tensor:
        """Anchors: bool [batch, tokens]."""
        return self.real & ~self.decode_phase & (self._seen <= self.anchors)

    @property
    def prompt(self) -> Tensor:
        """Prompt tokens, without the anchors and without those of the decode phase: bool [batch, tokens]."""
        return self.real & ~self.deep

    @cached_property
    def deep(self) -> Tensor:
        """Tokens that run through all layers: bool [batch, tokens]."""
        return self.real & (self.decode_phase | (self._seen <= self.anchors))

    @property
    def padding(self) -> Tensor:
        """Columns before the first token of each row: int64 [batch]."""
        return (self._seen == 0).sum(1)

    @property
    def has_gap(self) -> Tensor:
        """Whether a row has padding between its tokens: bool, zero-dimensional."""
        return (~self.real & (self._seen > 0) & (self._seen < self._seen[:, -1:])).any()


# --- One call into a KV cache ---


class Phases(NamedTuple):
    """How many of a call's new tokens are decode phase: the first ``head`` and the last ``tail``."""

    head: int
    tail: int

    def within(self, start: int, stop: int, n_tokens: int) -> Phases:
        """Return the phases of tokens ``start`` to ``stop`` of these ``n_tokens`` tokens."""
        head = min(max(self.head - start, 0), stop - start)
        return Phases(head, max(0, stop - max(start, n_tokens - self.tail)))

    def columns(self, start: int, stop: int) -> tuple[Pieces, Pieces]:
        """Return the decode-phase columns, head and tail, of a call on columns ``start`` to ``stop``."""
        return span(start, start + self.head), span(stop - self.tail, stop)


def phases_of(cache: PolicyCache, n_new: int, n_logits: int) -> Phases:
    """Divide ``n_new`` prompt tokens that follow the contents of the cache.

    ``n_logits`` is the number of last tokens whose logits are requested: 1 at the end of a prompt, 0 if more of it
    follows. The model generated the token right after logits, so that token is decode phase.

    Raises
    ------
    UserError
        If some of the prompt's last ``boundary`` tokens are already in the cache as prompt.
    """
    policy = cache.policy
    if cache.n_columns and not policy.later_prompts:
        return Phases(0, n_new)
    tail = n_logits + policy.boundary - 1 if n_logits else 0
    if n_new < tail and cache.n_columns and not cache.awaits_token:
        raise UserError(
            f"{policy.spec}: the last {tail} prompt tokens are decode phase, and of these only {n_new} are new: "
            "give them in one call"
        )
    tail = min(tail, n_new)
    return Phases(min(int(cache.n_columns > 0 and cache.awaits_token), n_new - tail), tail)


def require_anchors(cache: PolicyCache, n_new: int) -> None:
    """Raise UserError if the first prompt of a cache, ``n_new`` columns, has a row with fewer tokens than anchors."""
    n_prompt = n_new if cache.padding is None else n_new - int(cache.padding.max())
    if cache.policy.anchors > n_prompt:
        raise UserError(f"{cache.policy.spec}: the prompt has {n_prompt} tokens, fewer than the anchors")


def deep_columns(start: int, stop: int, phases: Phases, padding: Tensor | None, anchors: int) -> Pieces:
    """Return the deep columns of a call on columns ``start`` to ``stop``.

    ``padding`` is int64 [batch], the columns before each row's first token; None without padding.
    """
    lead, shallow_stop = start + phases.head, stop - phases.tail
    tail = span(max(shallow_stop, lead), stop)
    if padding is None:
        lead = max(lead, min(anchors, shallow_stop))
        return join(span(start, lead), tail)
    first = padding[:, None] + torch.arange(anchors, device=padding.device)
    fits = (first >= lead) & (first < shallow_stop)
    pieces = span(start, lead)
    if anchors and bool(fits.any()):
        columns = first.masked_fill(~fits, EMPTY).sort(dim=1).values
        pieces = (*pieces, Piece(start, stop, columns, full=False))
    return (*pieces, *tail)


# --- One row without padding ---


@dataclass(frozen=True)
class Layout:
    """How the positions of one prompt divide: anchors ``[0, A)``, prompt ``[A, P-1)``, decode phase from ``P-1`` on."""

    n_anchors: int
    n_prompt: int

    @classmethod
    def of(cls, n_prompt: int, anchors: int) -> Layout:
        """Return the layout of a prompt of ``n_prompt`` tokens, 1 or more: the last one is no anchor."""
        return cls(min(anchors, n_prompt - 1), n_prompt)

    @property
    def prompt(self) -> slice:
        """Positions of the prompt segment, anchors and the last prompt token excluded; may be empty."""
        return slice(self.n_anchors, self.n_prompt - 1)

    @property
    def n_segment(self) -> int:
        """Number of tokens in the prompt segment."""
        return max(0, self.n_prompt - 1 - self.n_anchors)

    @property
    def n_context(self) -> int:
        """Number of tokens before the decode phase, anchors and prompt together."""
        return self.n_prompt - 1
