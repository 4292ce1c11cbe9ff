"""What a probe is: an observer of one prompt that ends in columns of the run's tables.

To add a probe, add one file to this package with a subclass of `Probe`, or name the class in an entry point of another
distribution: `diagnostics.diagnosis.probes` finds both. Every prompt gets a probe of its own, so a probe can keep state
without leaking any.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diagnostics.diagnosis.observers import Columns, ContextRows, DecodeRows, Measured, Outcome
from diagnostics.diagnosis.readout import Readout
from diagnostics.policies.segments import Layout
from diagnostics.support.defaults import LENS_POSITIONS

__all__ = ["LENS_POSITIONS", "Columns", "Measured", "Probe", "PromptContext"]

# The lens of 64 positions costs a fifth of a 2000-token forward pass of a small model, whose vocabulary is much of its
# weights. A few positions of each of many prompts say as much about the layers for a tenth of that.


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


class Probe:
    """Base class of probes; `diagnostics.diagnosis.observers.Observer` has the order of calls.

    ``name`` is unique among probes; a class without one is not found. ``describes`` has an entry for every column of
    the tables ``layers``, ``heads``, ``cutoffs`` and ``prompts`` that the probe writes: its meaning, unit and range.
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
