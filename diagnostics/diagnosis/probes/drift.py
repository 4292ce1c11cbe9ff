"""How much each layer still changes the representation.

Raw cosines hide the change: on many models a few outlier dimensions hold half of the squared norm. The *centred*
cosine subtracts the mean over prompt positions first and shows the structure.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from diagnostics.diagnosis.observers import ContextRows, DecodeRows, Outcome
from diagnostics.diagnosis.probes.probe import Measured, Probe, PromptContext
from diagnostics.diagnosis.row_norms import BLOCK, mean_of, one_minus_cosine, scratch_for
from diagnostics.support.sums import mean_row, total, wide

# Prompt positions whose residuals are kept in every layer, for the cosine to the final residual.
N_SAMPLED = 128


class Drift(Probe):
    """Change of the residual from layer to layer, for prompt and decode positions."""

    name = "drift"
    describes: ClassVar[Mapping[str, str]] = {
        "drift_prompt": "mean over prompt positions of 1 - cos(h_l, h_l+1), 0..2",
        "drift_prompt_centred": "drift_prompt of residuals less their mean over prompt positions, 0..2",
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
        self.prompt_size: Size | None = None  # of the last layer's output: this layer's input
        self.prompt_rows: list[Tensor] = []
        self.decode_rows: list[Tensor] = []

    def on_context(self, rows: ContextRows) -> None:
        """Compare the residuals before and after one layer at every prompt position."""
        segment = self.context.layout.prompt
        before, after = rows.residual_in[segment], rows.residual_out[segment]
        if not len(before):
            return
        self.prompt_size = self.prompt_size or Size.of(before)
        size = Size.of(after)
        drift, centred, update = _change(before, after, self.prompt_size, size)
        self.prompt_size = size
        self.columns["drift_prompt"][rows.layer] = drift
        self.columns["drift_prompt_centred"][rows.layer] = centred
        self.columns["update_prompt"][rows.layer] = update
        # float(): a copy, since a view of the sampled rows would keep the whole layer alive.
        self.prompt_rows.append(rows.residual_out[self.sampled].to(torch.float32, copy=True))

    def on_decode(self, rows: DecodeRows) -> None:
        """Compare the residuals before and after one layer at every decode position."""
        before, after = Size.of(rows.residual_in), Size.of(rows.residual_out)
        drift, _, update = _change(rows.residual_in, rows.residual_out, before, after)
        self.columns["drift_decode"][rows.layer] = drift
        self.columns["update_decode"][rows.layer] = update
        self.decode_rows.append(rows.residual_out.to(torch.float32, copy=True))

    def on_outcome(self, outcome: Outcome) -> None:
        """Compare every layer with the last one."""
        for name, kept in (("to_final_prompt", self.prompt_rows), ("to_final_decode", self.decode_rows)):
            for layer, rows in enumerate(kept):
                final = kept[-1].to(rows.device)
                self.columns[name][layer] = _mean_cosine(rows, final)

    def measured(self) -> Measured:
        """Return one column per line of ``describes``."""
        return Measured(layers=self.columns)


@dataclass(frozen=True)
class Size:
    """Mean over positions [width], and each position's norm with and without that mean subtracted [positions]."""

    mean: Tensor
    norm: Tensor
    centred_norm: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> "Size":
        """Measure residuals [positions, width] of any type, in float32."""
        mean = mean_row(rows)
        scratch = scratch_for(rows)
        norm, centred_norm = [], []
        for block in rows.split(BLOCK):
            norm.append(block.float().norm(dim=-1))
            centred_norm.append(torch.sub(block, mean, out=scratch[: len(block)]).norm(dim=-1))
        return cls(mean, torch.cat(norm), torch.cat(centred_norm))


def _change(before: Tensor, after: Tensor, size: Size, new_size: Size) -> tuple[float, float, float]:
    """Mean over positions of 1 - cos, centred 1 - cos and relative update norm, of [positions, width] residuals.

    One subtraction of the residuals serves all three.
    """
    device = before.device
    shift = new_size.mean.to(device) - size.mean
    scratch = scratch_for(before)
    update, centred_update = [], []
    for x, y in zip(before.split(BLOCK), after.to(device).split(BLOCK), strict=True):
        step = torch.sub(y.float(), x.float(), out=scratch[: len(x)])
        update.append(step.norm(dim=-1))
        centred_update.append(step.sub_(shift).norm(dim=-1))
    c, centred_c = torch.cat(update), torch.cat(centred_update)
    return (
        mean_of(one_minus_cosine(size.norm, new_size.norm.to(device), c)),
        mean_of(one_minus_cosine(size.centred_norm, new_size.centred_norm.to(device), centred_c)),
        mean_of(c / size.norm),
    )


def _mean_cosine(rows: Tensor, final: Tensor) -> float:
    """Mean over positions of the cosine of residuals [positions, width], at most 1."""
    x, y = (t.to(wide(t.device)) for t in (rows, final))
    cosine = total(x * y) / (x.norm(dim=-1) * y.norm(dim=-1))
    return float(cosine.clamp(-1, 1).mean())
