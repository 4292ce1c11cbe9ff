"""The model under test and the tokens it is tested on: what every check of the self-test compares with.

A few dozen random tokens, some rows padded, run through the stock model and through masked passes of it
(`diagnostics.self_test.masked`). In float32 every logit must agree; in half precision, where routing and rounding move
single positions, the median position must.
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
# Share of the logits' spread by which they may differ.
LOGITS = {torch.float32: 1e-3, torch.float64: 1e-3}
LOGITS_IN_HALF = 0.1


@dataclass(frozen=True)
class Subject:
    """A transformers model under test, with the sequences to test it on."""

    model: Any
    anatomy: Anatomy

    @property
    def device(self) -> torch.device:
        """Device of the input embeddings, where token ids go."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return self.model.dtype

    @cached_property
    def rows(self) -> Batch:
        """Three rows: some tokens, a shorter row padded on the left, and the first again with another last token."""
        generator = torch.Generator().manual_seed(0)
        length = N_PROMPT + N_DECODE - 1
        # Away from both ends of the vocabulary, where control tokens and those of other media are.
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
        """The first two rows, which every check but that of causality compares."""
        return Batch(self.rows.ids[:2], self.rows.mask[:2], N_PROMPT)

    @property
    def cutoffs(self) -> tuple[int, ...]:
        """Two cutoffs below full depth, as far as there are two: the lowest, and one in the middle."""
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
        """Share of the logits' spread by which two [..., positions, vocabulary] differ; None if it is tolerated."""
        error = (ours.float() - expected.float()).abs().amax(-1).flatten()
        spread = float(expected.float().std(-1).mean())
        if self.dtype in LOGITS:
            largest, tolerance = float(error.max()), LOGITS[self.dtype]
        else:
            largest, tolerance = float(error.median()), LOGITS_IN_HALF
        return None if largest <= tolerance * spread else largest / max(spread, 1e-30)


def causality(subject: Subject) -> str | None:
    """Earlier logits do not change when the last token does."""
    share = subject.difference(subject.stock[2, :-1], subject.stock[0, :-1])
    return None if share is None else f"a changed last token changes earlier logits by {share:.2g} of their spread"


def unsteady(subject: Subject) -> str | None:
    """Say that the stock model's own logits depend on what runs beside a row, so that nothing can be compared.

    As where activations are quantized with a scale for the whole batch.
    """
    alone = Batch(subject.batch.ids[:1], subject.batch.mask[:1], N_PROMPT)
    try:
        share = subject.difference(stock_logits(subject.model, alone)[0], subject.stock[0])
    except Exception:  # a model that does not run has failed for that
        return None
    return None if share is None else f"its own logits change by {share:.2g} of their spread with what runs beside them"
