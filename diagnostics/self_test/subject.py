"""The model under test and its test tokens, with the logits that every check of the self-test compares with.

A few dozen random tokens, some rows padded, run through the stock model and through masked passes of it
(`diagnostics.self_test.masked`). In float32 every logit must agree. In half precision, where routing and rounding
change single positions, the median position must agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diagnostics.models.anatomy import Anatomy
from diagnostics.self_test.masked import Batch, masked_logits, masks, stock_logits

N_PROMPT, N_DECODE, N_PADDING = 20, 4, 5
# Tolerated difference of logits, as a share of their spread.
LOGITS = {torch.float32: 1e-3, torch.float64: 1e-3}
LOGITS_IN_HALF = 0.1


@dataclass(frozen=True)
class Subject:
    """A transformers model under test, with its test sequences."""

    model: Any
    anatomy: Anatomy

    @property
    def device(self) -> torch.device:
        """Device for token ids: that of the input embeddings."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return self.model.dtype

    @cached_property
    def rows(self) -> Batch:
        """Three rows: random tokens, a shorter row padded on the left, and the first row with another last token."""
        generator = torch.Generator().manual_seed(0)
        length = N_PROMPT + N_DECODE - 1
        # Avoid both ends of the vocabulary: control tokens and tokens of other media are there.
        size = self.model.get_input_embeddings().weight.shape[0]
        low, high = size // 8, max(size // 2, size // 8 + 1)
        ids = torch.randint(low, high, (3, length), generator=generator)
        ids[2] = ids[0]
        ids[2, -1] = low + (ids[0, -1] - low + 1) % (high - low)
        mask = torch.ones_like(ids)
        mask[1, :N_PADDING] = 0
        return Batch(ids.to(self.device), mask.to(self.device), N_PROMPT)

    @property
    def batch(self) -> Batch:
        """The first two rows; every check except causality compares these."""
        return Batch(self.rows.ids[:2], self.rows.mask[:2], N_PROMPT)

    @property
    def cutoffs(self) -> tuple[int, ...]:
        """Cutoffs below full depth, at most two: the lowest, and one in the middle."""
        n = self.anatomy.n_layers
        return tuple(sorted({1, max(1, n // 2)} - {n}))

    @cached_property
    def stock(self) -> Tensor:
        """Logits of the stock model, [rows, columns, vocabulary]."""
        return stock_logits(self.model, self.rows)

    @cached_property
    def masked(self) -> dict[int, Tensor]:
        """Logits of masked passes over the first two rows, by cutoff."""
        with masks(self.model):
            return {k: masked_logits(self.model, self.anatomy, self.batch, k) for k in self.cutoffs}

    def difference(self, ours: Tensor, expected: Tensor) -> float | None:
        """Difference of two [..., positions, vocabulary] logits as a share of their spread; None if tolerated."""
        error = (ours.float() - expected.float()).abs().amax(-1).flatten()
        spread = float(expected.float().std(-1).mean())
        if self.dtype in LOGITS:
            largest, tolerance = float(error.max()), LOGITS[self.dtype]
        else:
            largest, tolerance = float(error.median()), LOGITS_IN_HALF
        return None if largest <= tolerance * spread else largest / max(spread, 1e-30)


def causality(subject: Subject) -> str | None:
    """Check that a changed last token does not change earlier logits; return the difference, or None."""
    share = subject.difference(subject.stock[2, :-1], subject.stock[0, :-1])
    return None if share is None else f"a changed last token changes earlier logits by {share:.2g} of their spread"


def unsteady(subject: Subject) -> str | None:
    """Say that the stock model's own logits of a row depend on the rest of the batch, so that no comparison is valid.

    This happens where activations are quantized with one scale for all rows. None if the logits do not depend on it.
    """
    alone = Batch(subject.batch.ids[:1], subject.batch.mask[:1], N_PROMPT)
    try:
        share = subject.difference(stock_logits(subject.model, alone)[0], subject.stock[0])
    except Exception:  # a model that does not run has already failed its checks
        return None
    return None if share is None else f"its own logits change by {share:.2g} of their spread with what runs beside them"
