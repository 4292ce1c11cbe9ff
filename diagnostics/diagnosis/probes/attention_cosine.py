"""How far the attention turns the residual of the prompt: cos(x, x + attention).

SqueezeAttention (arXiv 2404.04793) groups layers by this cosine, LLM-Drop (arXiv 2406.15786) drops the attention of
those where it is largest; DASH (arXiv 2604.18103) looks at the norm of what the attention adds. The anchors are left
out: massive activations sit there.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch

from diagnostics.diagnosis.observers import ContextRows
from diagnostics.diagnosis.probes.probe import Measured, Probe, PromptContext
from diagnostics.diagnosis.row_norms import BLOCK, mean_of, one_minus_cosine, scratch_for


class AttentionCosine(Probe):
    """Angle and size of what the attention adds to the residual of the prompt."""

    name = "attention_cosine"
    optional = True
    of_additions = ("attention_cosine", "attention_update_prompt")
    describes: ClassVar[Mapping[str, str]] = {
        "attention_cosine": "mean over prompt positions of cos(h_l, h_l + what the attention adds), -1..1",
        "attention_update_prompt": "mean over prompt positions of |what the attention adds| / |h_l|, >= 0",
    }

    def __init__(self, context: PromptContext) -> None:
        super().__init__(context)
        self.columns = {name: np.full(context.n_layers, np.nan) for name in self.describes}

    def on_context(self, rows: ContextRows) -> None:
        """Measure every prompt position of one layer."""
        segment = self.context.layout.prompt
        residual, added = rows.residual_in[segment], rows.attention[segment].to(rows.residual_in.device)
        if not len(residual):
            return
        scratch = scratch_for(residual)
        before, after, update = [], [], []
        for x, step in zip(residual.split(BLOCK), added.split(BLOCK), strict=True):
            x, step = x.float(), step.float()
            before.append(x.norm(dim=-1))
            update.append(step.norm(dim=-1))
            after.append(torch.add(x, step, out=scratch[: len(x)]).norm(dim=-1))
        a, b, c = map(torch.cat, (before, after, update))
        self.columns["attention_cosine"][rows.layer] = 1 - mean_of(one_minus_cosine(a, b, c))
        self.columns["attention_update_prompt"][rows.layer] = mean_of(c / a)

    def measured(self) -> Measured:
        """Return both columns."""
        return Measured(layers=self.columns)
