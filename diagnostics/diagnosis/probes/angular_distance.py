"""How far the last prompt token's residual still is from the last layer's input, as an angle.

"The unreasonable ineffectiveness of the deeper layers" (arXiv 2403.17887) prunes the block of n layers whose ends have
the smallest angular distance d(l, n) = arccos(cos(h_l, h_l+n)) / pi, at the last token. A prefix cutoff asks for the
blocks that end at the last layer: n = L - 1 - l.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from diagnostics.diagnosis.observers import DecodeRows
from diagnostics.diagnosis.probes.probe import Measured, Probe, PromptContext


class AngularDistance(Probe):
    """Angle between the inputs of a layer and of the last layer, at the last prompt token."""

    name = "angular_distance"
    optional = True
    describes: ClassVar[Mapping[str, str]] = {
        "angular_to_last": "angle between h_l and h_L-1 at the last prompt token / pi, 0..1; 0 in the last layer",
    }

    def __init__(self, context: PromptContext) -> None:
        super().__init__(context)
        self.states: list[np.ndarray] = []

    def on_decode(self, rows: DecodeRows) -> None:
        """Keep the first decode row, which is the last prompt token."""
        self.states.append(rows.residual_in[0].float().cpu().double().numpy())

    def measured(self) -> Measured:
        """Return the angle of every layer."""
        states = np.stack(self.states)
        units = states / np.linalg.norm(states, axis=1, keepdims=True)
        # By half the angle: the arccos of a cosine near 1 keeps half of the digits.
        apart, sum_ = (np.linalg.norm(units + sign * units[-1], axis=1) for sign in (-1, 1))
        return Measured(layers={"angular_to_last": 2 * np.arctan2(apart, sum_) / np.pi})
