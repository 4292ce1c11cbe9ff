"""What a probe is: an observer of one prompt that ends in columns of the run's tables.

To add a probe, add one file to this package with a subclass of `Probe`: `diagnostics.diagnosis.probes` finds it. A
probe is made anew for every prompt, so it can keep state without leaking any.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from torch import Tensor

from diagnostics.diagnosis.observers import ContextRows, DecodeRows, Layout, Outcome
from diagnostics.diagnosis.readout import Readout

# The lens of 64 positions costs a fifth of a 2000-token forward pass of a small model, whose vocabulary is much of its
# weights. A few positions of each of many prompts say as much about the layers for a tenth of that.
LENS_POSITIONS = 4

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class PromptContext:
    """What every observer may know of the model and the prompt before the first layer runs.

    ``evidence`` are half-open token spans inside the prompt segment; ``lens_positions`` bounds the decode positions,
    evenly spaced, that the logit lens reads; ``model_name`` is for messages. With ``detail`` probes also keep what a
    close look at this one prompt needs, token by token. ``teacher`` [n_decode, vocabulary] are logits to compare every
    cutoff with instead of the model's own at full depth.
    """

    layout: Layout
    n_layers: int
    readout: Readout
    model_name: str
    evidence: tuple[tuple[int, int], ...] = ()
    lens_positions: int = LENS_POSITIONS
    detail: bool = False
    teacher: Tensor | None = None


@dataclass(frozen=True)
class Measured:
    """Columns of one prompt: per layer [L], per layer and head [L, heads], per cutoff 1..L [L], and single numbers.

    Of prompts to be looked at closely also ``tokens``, per token of the prompt segment and layer [tokens, L], and
    ``lens``, per decode position from the first on and layer [positions, L].
    """

    layers: Columns = field(default_factory=dict)
    heads: Columns = field(default_factory=dict)
    cutoffs: Columns = field(default_factory=dict)
    prompt: dict[str, float] = field(default_factory=dict)
    tokens: Columns = field(default_factory=dict)
    lens: Columns = field(default_factory=dict)


class Probe:
    """Base class of all that watches a prompt; `diagnostics.diagnosis.observers.Observer` has the order of calls.

    ``describes`` names every column the probe writes, with its meaning, unit and range.
    """

    name: ClassVar[str] = ""
    describes: ClassVar[Mapping[str, str]] = {}

    def __init__(self, context: PromptContext) -> None:
        self.context = context

    def on_context(self, rows: ContextRows) -> None:
        """Look at the context rows of one layer."""

    def on_decode(self, rows: DecodeRows) -> None:
        """Look at the decode-phase rows of one layer."""

    def on_outcome(self, outcome: Outcome) -> None:
        """Look at the logits, after the last layer."""

    def measured(self) -> Measured:
        """Return the columns, after `on_outcome`."""
        raise NotImplementedError
