"""How much of the last prompt token's attention stays on the prompt's beginning and end: SimLayerKV's laziness.

SimLayerKV (arXiv 2410.13846) calls a layer lazy where the first 4 and the last 1024 tokens hold most of the attention:
such a layer does not read the middle of the prompt. A prompt that is no longer than those has no middle, and there the
last 1024 tokens become the last eighth of the prompt; this scaled form is ours.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from diagnostics.diagnosis.observers import DecodeRows
from diagnostics.diagnosis.probes.probe import Measured, Probe, PromptContext
from diagnostics.diagnosis.prompt_window import LAZY
from diagnostics.support.sums import total

N_FIRST, N_RECENT = 4, 1024
SCALED_SHARE = 8  # of a short prompt the last 1 / 8 is recent


class LazyShare(Probe):
    """Attention of the last prompt token on the first and the most recent tokens."""

    name = "lazy_share"
    optional = True
    describes: ClassVar[Mapping[str, str]] = {
        "lazy_share": f"attention of the last prompt token on the first {N_FIRST} and the last {N_RECENT} tokens (of "
        f"prompts up to {N_FIRST + N_RECENT + LAZY} tokens the last 1/{SCALED_SHARE}, rounded down), mean over heads, "
        "0..1; NaN where a sliding window hides a part of the prompt, or the prompt is shorter than 8 tokens",
    }

    def __init__(self, context: PromptContext) -> None:
        super().__init__(context)
        self.share = np.full(context.n_layers, np.nan)
        self.n_recent = n_recent(context.layout.n_prompt)

    def on_decode(self, rows: DecodeRows) -> None:
        """Measure the last prompt token's row of one layer."""
        n_prompt = self.context.layout.n_prompt
        if self.n_recent and self.context.sees_all(rows, n_prompt):
            row = self.context.window(rows, LAZY)
            lazy = total(row[:, :N_FIRST]) + total(row[:, n_prompt - self.n_recent :])
            self.share[rows.layer] = float(lazy.mean())

    def measured(self) -> Measured:
        """Return the column of the layers table."""
        return Measured(layers={"lazy_share": self.share})


def n_recent(n_prompt: int) -> int:
    """Return how many of the last tokens of a prompt count as recent; 0 for a prompt that is too short."""
    return N_RECENT if n_prompt > N_FIRST + N_RECENT + LAZY else n_prompt // SCALED_SHARE
