"""The loss of SPEED at every cutoff, exactly, from the forward pass that diagnoses the model.

The prompt's states below the cutoff do not depend on it, and the anchors, being the first tokens, never see anything
but anchors: their upper keys and values are those of the full model. So the decode rows of cutoff k are the full-depth
rows up to layer k, where they branch off; at layer l all branches with k <= l run together as one batch that
sees the anchors' and its own keys. The extra work is about L * n_decode / (2 T) of the forward pass, not L of them.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from diagnostics.diagnosis.observers import DecodeRows, Outcome
from diagnostics.diagnosis.probes.probe import Measured, Probe, PromptContext
from diagnostics.support.divergence import log_likelihoods


class CutoffSweep(Probe):
    """KL, agreement and likelihood under SPEED at every cutoff 1..L, [L] each.

    They are measured against full depth, that of the model itself or, where the context has one, of a teacher.
    """

    name = "cutoff_sweep"
    describes: ClassVar[Mapping[str, str]] = {
        "kl": "KL(full depth || SPEED at this cutoff), mean over decode positions, nats per token",
        "top1_agreement": "share of decode positions where both put the same token on top, 0..1",
        "nll": "negative log-likelihood of the reference under SPEED at this cutoff, nats per token",
        "nll_full": "negative log-likelihood of the reference at full depth, nats per token",
    }

    def __init__(self, context: PromptContext) -> None:
        super().__init__(context)
        self.branches: Tensor | None = None  # [L - 1, n_decode, width]; row k-1 holds cutoff k once layer k-1 has run
        self.final: Tensor | None = None
        self.columns: dict[str, np.ndarray] = {}

    def on_decode(self, rows: DecodeRows) -> None:
        """Take every branch through one layer, then branch off the cutoff that ends below the next."""
        n_layers, layer = self.context.n_layers, rows.layer
        if self.branches is None:
            self.branches = rows.residual_out.new_empty((n_layers - 1, *rows.residual_out.shape))
        self.branches = self.branches.to(rows.residual_out.device)
        if layer > 0:
            self.branches[:layer] = rows.branch(self.branches[:layer])
        if layer < n_layers - 1:
            self.branches[layer] = rows.residual_out
        else:
            self.final = rows.residual_out

    def on_outcome(self, outcome: Outcome) -> None:
        """Compare the distributions of every branch with the full model's, or the teacher's."""
        assert self.branches is not None
        assert self.final is not None
        candidates = torch.cat([self.branches, self.final[None]]).transpose(0, 1)  # cutoff L is the full model
        readout, targets = self.context.readout, outcome.reference_ids.to(self.final.device)
        teacher = self.context.teacher
        full = readout.logits(self.final) if teacher is None else teacher.to(self.final.device)
        compared = readout.compare(full, candidates, targets)
        nll = compared.nll.cpu().double().mean(0).numpy()
        if teacher is None:
            compared, own = compared.last_is_final(), nll[-1]
        else:
            own = -float(log_likelihoods(full, targets).mean())
        self.columns = {
            "kl": compared.kl.cpu().double().mean(0).numpy(),
            "top1_agreement": (compared.rank == 0).cpu().double().mean(0).numpy(),
            "nll": nll,
            "nll_full": np.full_like(nll, own),
        }

    def measured(self) -> Measured:
        """Return the columns of the cutoffs table, entry k-1 for cutoff k."""
        return Measured(cutoffs=self.columns)
