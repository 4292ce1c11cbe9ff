"""How much each layer still changes the representation.

Raw cosines hide the change: on many models a few outlier dimensions hold half of the squared norm. The *centred*
cosine subtracts the mean over prompt positions first and shows the structure.
"""

import numpy as np
import torch
from torch import Tensor

from diagnostics.capture.base import ContextRows, DecodeRows, Outcome
from diagnostics.probes.base import Measured, Probe, PromptContext

# Positions per block: float32 copies of a long prompt's residuals would cost more than the model's own activations.
BLOCK = 1024
# Prompt positions whose residuals are kept in every layer, for the cosine to the final residual.
N_SAMPLED = 128


class Drift(Probe):
    """Change of the residual from layer to layer, for prompt and decode positions."""

    name = "drift"
    describes = {
        "drift_prompt": "mean over prompt positions of 1 - cos(h_l, h_l+1), 0..2",
        "drift_prompt_centred": "the same after subtracting the mean over prompt positions from each, 0..2",
        "update_prompt": "mean over prompt positions of |h_l+1 - h_l| / |h_l|, >= 0",
        "to_final_prompt": f"mean of cos(h_l+1, h_L) over up to {N_SAMPLED} evenly spaced prompt positions, -1..1",
        "drift_decode": "mean over decode positions of 1 - cos(h_l, h_l+1), 0..2",
        "update_decode": "mean over decode positions of |h_l+1 - h_l| / |h_l|, >= 0",
        "to_final_decode": "mean over decode positions of cos(h_l+1, h_L), -1..1",
    }

    def __init__(self, context: PromptContext) -> None:
        super().__init__(context)
        n_layers = context.n_layers
        self.columns = {name: np.full(n_layers, np.nan) for name in self.describes}
        step = max(1, -(-context.layout.n_segment // N_SAMPLED))
        self.sampled = slice(context.layout.prompt.start, max(context.layout.prompt.stop, 0), step)
        self.prompt_rows: list[Tensor] = []
        self.decode_rows: list[Tensor] = []

    def on_context(self, rows: ContextRows) -> None:
        """Compare the residuals before and after one layer at every prompt position."""
        segment = self.context.layout.prompt
        before, after = rows.residual_in[segment], rows.residual_out[segment]
        if not len(before):
            return
        drift, centred, update = _change(before, after)
        self.columns["drift_prompt"][rows.layer] = drift
        self.columns["drift_prompt_centred"][rows.layer] = centred
        self.columns["update_prompt"][rows.layer] = update
        # float(): a copy, since a view of the sampled rows would keep the whole layer alive.
        self.prompt_rows.append(rows.residual_out[self.sampled].to(torch.float32, copy=True))

    def on_decode(self, rows: DecodeRows) -> None:
        """Compare the residuals before and after one layer at every decode position."""
        drift, _, update = _change(rows.residual_in, rows.residual_out)
        self.columns["drift_decode"][rows.layer] = drift
        self.columns["update_decode"][rows.layer] = update
        self.decode_rows.append(rows.residual_out.to(torch.float32, copy=True))

    def on_outcome(self, outcome: Outcome) -> None:
        """Compare every layer with the last one."""
        for name, kept in (("to_final_prompt", self.prompt_rows), ("to_final_decode", self.decode_rows)):
            for layer, rows in enumerate(kept):
                final = kept[-1].to(rows.device)
                self.columns[name][layer] = float(torch.cosine_similarity(rows, final, dim=-1).mean())

    def measured(self) -> Measured:
        """Return one column per line of ``describes``."""
        return Measured(layers=self.columns)


def _change(before: Tensor, after: Tensor) -> tuple[float, float, float]:
    """Mean over positions of 1 - cos, centred 1 - cos, and relative update norm, of [positions, width] residuals."""
    after = after.to(before.device)
    mean_before, mean_after = _mean(before), _mean(after)
    totals = torch.zeros(3, dtype=torch.float64, device=before.device)
    for i in range(0, len(before), BLOCK):
        x, y = before[i : i + BLOCK].float(), after[i : i + BLOCK].float()
        cosine = torch.cosine_similarity(x, y, dim=-1)
        update = (y - x).norm(dim=-1) / x.norm(dim=-1)
        centred = torch.cosine_similarity(x - mean_before, y - mean_after, dim=-1)
        totals += torch.stack([(1 - cosine).sum(), (1 - centred).sum(), update.sum()])
    drift, centred_drift, update_norm = (totals / len(before)).tolist()
    return drift, centred_drift, update_norm


def _mean(rows: Tensor) -> Tensor:
    """Mean over positions in float32 of a tensor in any type."""
    return rows.mean(dim=0, dtype=torch.float32)
