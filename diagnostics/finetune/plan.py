"""Which tokens of a training batch run above the cutoff, read from its labels, and how to gather and spread them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diagnostics.finetune.examples import IGNORED
from diagnostics.policies.arguments import spread_rows
from diagnostics.policies.columns import Piece, span
from diagnostics.policies.masks import attention_mask
from diagnostics.policies.segments import Segments
from diagnostics.support.errors import UserError

PACKED = (
    "this batch holds several texts in one row (packing, padding_free): tokens would see other texts; "
    "pad instead, one text per row"
)


def decode_phase(labels: Tensor, attention_mask: Tensor | None = None, boundary: int = 1) -> Tensor:
    """Return the decode-phase tokens of conversations, read from their labels: bool [batch, tokens].

    A token is decode phase if it is a target (``labels`` [batch, tokens] is not -100 there) or predicts one: the last
    token before each answer does. ``boundary`` is the number of such tokens before each answer, 1 or more. Padding, 0
    in ``attention_mask``, is never decode phase.
    """
    target = labels != IGNORED
    phase = target.clone()
    for distance in range(1, boundary + 1):
        phase[:, :-distance] |= target[:, distance:]
    return phase if attention_mask is None else phase & (attention_mask != 0)


class Plan:
    """The deep tokens of one forward pass.

    ``columns``: int64 [batch, slots], ascending columns of the row. Unused slots hold columns past the end: causal
    order hides them from tokens, but they see something themselves, since a softmax over nothing would be NaN.
    ``padding``: columns before the first token of each row, int64 [batch], None where there are none.
    """

    # Not a dataclass: FSDP copies dataclasses among a layer's arguments.

    def __init__(
        self, columns: Tensor, n_columns: int, padding: Tensor | None, *, cutoff: int, implementation: str
    ) -> None:
        self.columns, self.n_columns, self.padding = columns, n_columns, padding
        self.cutoff, self.implementation = cutoff, implementation
        self.entered = False
        self._masks: dict[Any, Tensor | None] = {}

    def mask(self, deep: bool, window: int | None, like: Tensor) -> Tensor | None:
        """Return the mask of a layer for a residual ``like``, or None where causal order of its slots is enough."""
        key = deep, window, like.dtype, like.device
        if key not in self._masks:
            slots = (Piece(0, self.n_columns, self.columns),) if deep else span(0, self.n_columns)
            self._masks[key] = attention_mask(
                slots,
                slots,
                padding=None if deep else self.padding,
                window=window,
                implementation=self.implementation,
                dtype=like.dtype,
                device=like.device,
            )
        return self._masks[key]

    @property
    def rows(self) -> Tensor:
        """Columns of the deep tokens, for `take_rows`; unused slots get the last column, and nothing sees them."""
        return self.columns.clamp(max=self.n_columns - 1)

    def spread(self, values: Tensor) -> Tensor:
        """Put values [batch, slots, width] back to columns of deep tokens, [batch, tokens, width], zeros elsewhere."""
        # Not NaN: a loss weighs these columns with 0, and 0 times NaN would reach every gradient.
        return spread_rows(values, self.columns, self.n_columns, 0.0)


def make_plan(
    real: Tensor,
    phase: Tensor,
    *,
    cutoff: int,
    anchors: int,
    labels: Tensor | None,
    position_ids: Tensor | None,
    implementation: str,
) -> tuple[Plan, bool]:
    """Plan a forward pass from the deep tokens of its batch: the decode phase and the first ``anchors`` of each row.

    Parameters
    ----------
    real, phase
        Which columns hold tokens and which of these are decode phase, bool [batch, tokens].
    cutoff
        Layers that all tokens run through.
    anchors
        Leading tokens of each row that run through all layers.
    labels, position_ids
        Those of the batch, [batch, tokens], or None.
    implementation
        The attention implementation, ``sdpa`` or ``eager``.

    Returns
    -------
    plan, shallow
        The plan, and whether any token stays below the cutoff.

    Raises
    ------
    UserError
        If a row holds several texts, or padding between tokens, or if a label asks for logits of a shallow token.
    """
    n_columns, columns = real.shape[1], torch.arange(real.shape[1], device=real.device)
    segments = Segments(real, phase, anchors)
    deep, gap, padding = segments.deep, segments.has_gap, segments.padding
    restart = outside = gap.new_zeros(())
    if position_ids is not None:
        restart = (real[:, 1:] & real[:, :-1] & (position_ids.diff() != 1)).any()
    if labels is not None:
        outside = ((labels[:, 1:] != IGNORED) & real[:, :-1] & ~deep[:, :-1]).any()
    # One copy from the device for all checks.
    checks = [deep.sum(1).max(), restart, gap, outside, padding.any(), segments.prompt.any()]
    most, has_restart, has_gap, has_outside, is_padded, shallow = torch.stack([*map(Tensor.long, checks)]).tolist()
    if has_restart:
        raise UserError(PACKED)
    if has_gap:
        raise UserError("attention_mask has padding between tokens of a row: pad on one side, one text per row")
    if has_outside:
        raise UserError("labels ask for logits of tokens that decode_mask leaves out: set them to -100")
    slots = torch.where(deep, columns, columns + n_columns).sort(dim=1).values[:, : max(1, most)]
    left = padding if is_padded else None
    return Plan(slots, n_columns, left, cutoff=cutoff, implementation=implementation), bool(shallow)
