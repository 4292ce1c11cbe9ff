"""What the attention of the decode rows would lose in one layer if the prompt's keys were taken away there.

Without the prompt's keys the other weights grow until they sum to 1 again, so a head's output becomes

    rest / (mass on anchors, decode phase and sinks),    rest = its part from anchors and decode phase;

a learned sink keeps its weight and adds no value. `prompt_contribution` only drops the prompt's part; this also counts
what the remaining tokens gain. A decode row sees itself, so that something always remains.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from torch import Tensor

from diagnostics.diagnosis.attended import Attended
from diagnostics.diagnosis.observers import DecodeRows
from diagnostics.diagnosis.probes.probe import Measured, Probe, PromptContext


class RemovalEffect(Probe):
    """Change of what each layer's attention adds if it did not see the prompt."""

    name = "removal_effect"
    describes: ClassVar[Mapping[str, str]] = {
        "removal_effect": "norm of the change of what the attention adds to the residual if the prompt's keys were "
        "taken away in this layer alone / norm of the residual, mean over decode queries, >= 0",
    }
    of_additions = ("removal_effect",)

    def __init__(self, context: PromptContext) -> None:
        super().__init__(context)
        self.effect: list[float] = []

    def on_decode(self, rows: DecodeRows) -> None:
        """Measure the decode rows of one layer."""
        change = without_prompt(self.context.attended(rows))
        written = rows.attention.adds(change.flatten(1)).norm(dim=-1)
        relative = written / rows.residual_in.float().norm(dim=-1)
        self.effect.append(float(relative.cpu().double().mean()))

    def measured(self) -> Measured:
        """Return the column of the layers table."""
        return Measured(layers={"removal_effect": np.array(self.effect)})


def without_prompt(attended: Attended) -> Tensor:
    """Return how head outputs change without the prompt's keys: float32 [n_decode, heads, head_dim].

    That is rest / mass_rest - (rest + from_prompt) with mass_rest = 1 - mass_prompt, in a form that cancels neither
    where the prompt holds nearly all weight nor where it holds nearly none.
    """
    gain = (attended.mass_prompt / attended.mass_rest).float()
    return attended.from_rest * gain[..., None] - attended.from_prompt
