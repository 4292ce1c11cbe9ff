"""Which tokens of a batch are anchors, which are prompt, and which belong to the decode phase."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.support.errors import UserError

PADDING = -1
ANCHOR = 0
PROMPT = 1
DECODE = 2


@dataclass(frozen=True, eq=False)
class Segments:
    """The segment of every token of a batch; padding is in none.

    ``label`` is an int8 tensor [batch, position] of ``PADDING``, ``ANCHOR``, ``PROMPT`` and ``DECODE``.
    """

    label: Tensor

    @classmethod
    def of(cls, attention_mask: Tensor, n_prompt: int | Tensor, anchors: int = 1, boundary: int = 1) -> Segments:
        """Label the rows of a batch, padded left, right or not at all.

        The first ``anchors`` tokens of a row are its anchors; its last ``boundary`` prompt tokens and what
        follow them are the decode phase. Where a short prompt makes the two overlap, the decode phase wins,
        since the last prompt token gives the first logits: a one-token prompt has neither of the other two.

        Parameters
        ----------
        attention_mask
            [batch, position], nonzero at real tokens; those of a row are adjacent.
        n_prompt
            Prompt tokens per row, padding not counted: one number or [batch]; 1 to the row's real tokens.
        anchors
            Leading tokens that run through all layers, 0 or more.
        boundary
            Trailing prompt tokens that do so too, 1 or more.

        Raises
        ------
        UserError
            If a number is out of its range, or if a row has padding between its tokens.
        """
        if anchors < 0:
            raise UserError(f"anchors is {anchors}: give 0 or more")
        if boundary < 1:
            raise UserError(f"boundary is {boundary}: give 1 or more, the last prompt token is decode phase")
        if attention_mask.dim() != 2:
            raise UserError(f"attention_mask must be [batch, position], not {list(attention_mask.shape)}")
        real = attention_mask != 0
        # A row's tokens are adjacent if it goes from padding to token once.
        starts = real.long().diff(dim=1, prepend=torch.zeros_like(real[:, :1], dtype=torch.long)) == 1
        if (starts.sum(dim=1) > 1).any():
            raise UserError("attention_mask has padding between the tokens of a row: pad one side only")
        prompt_tokens = torch.as_tensor(n_prompt, device=real.device)
        if prompt_tokens.shape not in ((), real.shape[:1]):
            raise UserError(f"n_prompt must be one number or one per row, not {list(prompt_tokens.shape)}")
        prompt_tokens = prompt_tokens.expand(real.shape[0])
        if ((prompt_tokens < 1) | (prompt_tokens > real.sum(dim=1))).any():
            raise UserError("n_prompt must be at least 1 and at most the real tokens of the row")

        index = real.long().cumsum(dim=1) - 1
        label = torch.full_like(index, PROMPT, dtype=torch.int8)
        label[index < anchors] = ANCHOR
        label[index >= prompt_tokens[:, None] - boundary] = DECODE
        label[~real] = PADDING
        return cls(label)

    @property
    def real(self) -> Tensor:
        """Tokens that are not padding: bool [batch, position]."""
        return self.label != PADDING

    @property
    def anchor(self) -> Tensor:
        """Anchors: bool [batch, position]."""
        return self.label == ANCHOR

    @property
    def prompt(self) -> Tensor:
        """Prompt tokens, without anchors and without the decode-phase tail: bool [batch, position]."""
        return self.label == PROMPT

    @property
    def decode(self) -> Tensor:
        """Decode-phase tokens, from the last ``boundary`` prompt tokens on: bool [batch, position]."""
        return self.label == DECODE

    @property
    def n_anchor(self) -> Tensor:
        """Anchors per row: int64 [batch]."""
        return self.anchor.sum(dim=1)

    @property
    def n_prompt(self) -> Tensor:
        """Tokens of the prompt segment per row: int64 [batch]. Not the length of the prompt."""
        return self.prompt.sum(dim=1)

    @property
    def n_decode(self) -> Tensor:
        """Decode-phase tokens per row: int64 [batch]."""
        return self.decode.sum(dim=1)

    @property
    def position_ids(self) -> Tensor:
        """Position of every token among the row's real ones, 0 for padding: int64 [batch, position]."""
        real = self.real
        return (real.long().cumsum(dim=1) - 1).masked_fill(~real, 0)
