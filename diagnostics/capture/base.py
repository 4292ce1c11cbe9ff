"""What a capture hands to its observers, whichever backend reads the activations.

A capture takes one prompt through the model and streams it layer by layer. It holds nothing of a layer that its
observers do not keep, so memory grows with the number of tokens and not with layers x tokens x tokens.

Positions: ``P`` prompt tokens, ``T = P + n_decode - 1`` tokens in all. Rows 0..P-2 are the *context* (anchors, then
prompt); rows P-1..T-1 are the ``n_decode`` decode-phase rows. Row P-1, the last prompt token, is the first of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How the positions of one prompt divide: anchors ``[0, A)``, prompt ``[A, P-1)``, decode ``[P-1, T)``."""

    n_anchors: int
    n_prompt: int

    @property
    def prompt(self) -> slice:
        """Positions of the prompt segment, anchors and the last prompt token excluded; may be empty."""
        return slice(self.n_anchors, self.n_prompt - 1)

    @property
    def n_segment(self) -> int:
        """Number of tokens in the prompt segment."""
        return max(0, self.n_prompt - 1 - self.n_anchors)


@dataclass(frozen=True)
class ContextRows:
    """Layer ``layer`` as the context runs through it: residuals before and after, each [P-1, width]."""

    layer: int
    residual_in: Tensor
    residual_out: Tensor


@dataclass(frozen=True)
class AttentionRows:
    """All it takes to recompute the attention of a few query rows exactly.

    ``query`` [heads, rows, head_dim] and ``key`` [kv_heads, T, head_dim] are after rotary embedding and query-key norm;
    ``value`` [kv_heads, T, head_dim]; ``visible`` [rows, T] is the model's own mask (causal, sliding, ...). The rows
    are the last ``n_window`` - 1 context positions and then the decode-phase rows. ``output`` [n_decode, heads,
    head_dim] is what the model's own attention gave for the decode rows; ``project`` applies the output projection
    without its bias, [..., heads * head_dim] -> [..., width].
    """

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor
    scaling: float
    softcap: float | None
    sinks: Tensor | None
    output: Tensor
    project: Callable[[Tensor], Tensor]

    @property
    def n_decode(self) -> int:
        """Number of decode-phase rows."""
        return self.output.shape[0]

    @property
    def n_window(self) -> int:
        """Number of last prompt positions among the rows; the first decode row is one of them."""
        return self.query.shape[1] - self.n_decode + 1

    @cached_property
    def _hidden(self) -> Tensor:
        return ~self.visible

    @cached_property
    def _first_hidden(self) -> int:
        """First key that some row may not see."""
        return int(self.visible.all(0).long().cumprod(0).sum())

    def weights(self, kv_head: int, rows: slice, n_keys: int | None = None) -> Tensor:
        """Return attention weights of the query heads of one KV head, float32 [group, rows, keys].

        The softmax runs over the first ``n_keys`` keys (default all) and the model's sinks, whose column is left out:
        rows sum to 1 without sinks, to less with them.
        """
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
        total = scores.sub_(peak).exp_().sum(-1, keepdim=True)
        if self.sinks is not None:
            total += (self.sinks[heads, None, None].float() - peak).exp()
        return scores.div_(total)


@dataclass(frozen=True)
class DecodeRows:
    """Layer ``layer`` as the decode-phase rows run through it: residuals before and after, each [n_decode, width].

    ``branch`` runs the same layer on other residuals of the same positions, [branches, n_decode, width], that see
    the anchors' keys and their own branch and nothing of the prompt: an upper layer of SPEED.
    """

    layer: int
    residual_in: Tensor
    residual_out: Tensor
    attention: AttentionRows
    branch: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Outcome:
    """The end of one prompt: the model's logits of the decode rows, float32 [n_decode, vocab], and reference ids."""

    logits: Tensor
    reference_ids: Tensor


class Observer(Protocol):
    """What a probe or the sweep implements. For each layer ``on_context`` comes before ``on_decode``; layers ascend."""

    def on_context(self, rows: ContextRows) -> None:
        """Look at the context rows of one layer; not called when the prompt is a single token."""

    def on_decode(self, rows: DecodeRows) -> None:
        """Look at the decode-phase rows of one layer."""

    def on_outcome(self, outcome: Outcome) -> None:
        """Look at the logits, after the last layer."""


class Capture(Protocol):
    """A backend: runs one prompt and feeds the observers."""

    name: str

    def run(
        self,
        prompt_ids: Sequence[int],
        reference_ids: Sequence[int] | None,
        observers: Sequence[Observer],
        *,
        n_decode: int,
        n_anchors: int,
    ) -> Outcome:
        """Take one prompt through the model.

        Without ``reference_ids`` the reference is the model's greedy continuation, at most ``n_decode`` tokens, ended
        by the end-of-sequence token (which counts). The prompt runs through the model once either way.
        """
