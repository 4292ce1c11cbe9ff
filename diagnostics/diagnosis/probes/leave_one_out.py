"""The loss of hiding the prompt from the decode phase in one layer alone, and of showing it in one layer alone.

Leave-one-in is the layer choice of ReCache-like methods; leave-one-out its counterpart (arXiv 2606.27791 with a sliding
window in place of no prompt). Prompt states depend on no decode row, so one prefill serves all. Leave-one-out of layer
l is the full-depth decode rows up to l, blind in l, and seeing in the layers above. A second state of the decode rows
is blind from layer 0 on; leave-one-in of layer l is that state up to l, seeing in l, and blind above. Every layer runs
its branches as batches: the extra work is about L * n_decode / T of the forward pass, twice that of the cutoff sweep.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from diagnostics.diagnosis.capture import HOOKS
from diagnostics.diagnosis.observers import DecodeRows, Outcome
from diagnostics.diagnosis.probes.probe import Measured, Probe, PromptContext

# Keys of all branches together that run at once: each branch that sees the prompt gets its own copy of them.
KEYS_AT_ONCE = 1 << 16


class LeaveOneOut(Probe):
    """KL from full depth and likelihood of the reference where one layer alone does not see the prompt, or does.

    Full depth is that of the model itself, also where the cutoff sweep compares with a teacher.
    """

    name = "leave_one_out"
    optional = True
    costly = True
    backends = (HOOKS,)
    describes: ClassVar[Mapping[str, str]] = {
        "leave_one_out_kl": "KL(full depth || decode rows do not see the prompt in this layer alone), mean over decode "
        "positions, nats per token, >= 0",
        "leave_one_out_nll": "rise of the reference's negative log-likelihood over full depth where decode rows do not "
        "see the prompt in this layer alone, nats per token",
        "leave_one_in_kl": "fall of KL(full depth || decode rows see the prompt in no layer) where they see it in this "
        "layer alone, nats per token",
        "leave_one_in_nll": "fall of the reference's negative log-likelihood below that of decode rows that see the "
        "prompt in no layer where they see it in this layer alone, nats per token",
    }

    def __init__(self, context: PromptContext) -> None:
        super().__init__(context)
        self.seeing: Tensor | None = None  # branches that see the prompt in every layer but one, [L, n_decode, width]
        self.blind: Tensor | None = None  # branches that see it in one layer, then that of no layer, [L + 1, ...]
        self.final: Tensor | None = None
        self.columns: dict[str, np.ndarray] = {}

    def on_decode(self, rows: DecodeRows) -> None:
        """Take every branch through one layer, and start the two of this layer."""
        layer, n_layers, entered = rows.layer, self.context.n_layers, rows.residual_in
        if self.seeing is None or self.blind is None:
            self.seeing = entered.new_empty((n_layers, *entered.shape))
            self.blind = entered.new_empty((n_layers + 1, *entered.shape))
            self.blind[-1] = entered
        seeing, blind = self.seeing.to(entered.device), self.blind.to(entered.device)
        block = max(1, KEYS_AT_ONCE // rows.attention.value.shape[1])
        for start in range(0, layer, block):
            some = slice(start, min(start + block, layer))
            seeing[some] = rows.branch(seeing[some], sees_prompt=True)
        seeing[layer] = rows.branch(entered[None])[0]
        blind[layer] = rows.branch(blind[-1:], sees_prompt=True)[0]
        without = [*range(layer), n_layers]
        blind[without] = rows.branch(blind[without])
        self.seeing, self.blind, self.final = seeing, blind, rows.residual_out

    def on_outcome(self, outcome: Outcome) -> None:
        """Compare the distributions of all branches with the model's own at full depth."""
        assert self.seeing is not None
        assert self.blind is not None
        assert self.final is not None
        readout, n_layers = self.context.readout, self.context.n_layers
        candidates = torch.cat([self.seeing, self.blind, self.final[None]]).transpose(0, 1)
        targets = outcome.reference_ids.to(self.final.device)
        compared = readout.compare(readout.logits(self.final), candidates, targets)
        kl, nll = (column.cpu().double().mean(0).numpy() for column in (compared.kl, compared.nll))
        one_out, one_in, nowhere, full = slice(n_layers), slice(n_layers, 2 * n_layers), 2 * n_layers, -1
        self.columns = {
            "leave_one_out_kl": kl[one_out],
            "leave_one_out_nll": nll[one_out] - nll[full],
            "leave_one_in_kl": kl[nowhere] - kl[one_in],
            "leave_one_in_nll": nll[nowhere] - nll[one_in],
        }

    def measured(self) -> Measured:
        """Return one column per line of ``describes``."""
        return Measured(layers=self.columns)
