"""What a probe is: an observer of one prompt that ends in columns of the run's tables.

To add a probe, add one file to this package with a subclass of `Probe`, or name the class in an entry point of another
distribution: `diagnostics.diagnosis.probes` finds both. Every prompt gets a probe of its own, so a probe can keep state
without leaking any.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diagnostics.diagnosis.attended import Attended, attend
from diagnostics.diagnosis.observers import Columns, ContextRows, DecodeRows, Measured, Outcome
from diagnostics.diagnosis.prompt_window import window_sums
from diagnostics.diagnosis.readout import Readout
from diagnostics.models.loading import LoadedModel
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
    cutoff with instead of the model's own at full depth. ``windows`` are the widths of the layers' sliding windows,
    None for full attention; empty where no layer has one.
    """

    layout: Layout
    n_layers: int
    readout: Readout
    model_name: str
    evidence: tuple[tuple[int, int], ...] = ()
    lens_positions: int = LENS_POSITIONS
    detail: bool = False
    teacher: Tensor | None = None
    windows: tuple[int | None, ...] = ()

    def attended(self, rows: DecodeRows) -> Attended:
        """Return the attention of a layer's decode rows by segments; computed once, whichever probes ask for it."""
        if "attended" not in rows.shared:
            rows.shared["attended"] = attend(rows.attention, self.layout, self.evidence, per_token=self.detail)
        return rows.shared["attended"]

    def window(self, rows: DecodeRows, n_queries: int) -> Tensor:
        """Return what each prompt token receives from the last ``n_queries`` prompt positions: float32 [heads, P].

        Sums over the queries, whose softmax runs over the whole prompt; see `window_sums` for the numbers of queries.
        Computed once, whichever probes ask for it.
        """
        if "window" not in rows.shared:
            rows.shared["window"] = window_sums(rows.attention, self.layout.n_prompt)
        return rows.shared["window"][n_queries]

    def sees_all(self, rows: DecodeRows, stop: int | None = None) -> bool:
        """Whether all rows of a layer see the whole prompt: no sliding window hides a part of it from any.

        With ``stop`` only rows before this position count, such as those of the prompt.
        """
        window = self.windows[rows.layer] if self.windows else None
        return window is None or window >= (rows.attention.value.shape[1] if stop is None else stop)


class Probe:
    """Base class of probes; `diagnostics.diagnosis.observers.Observer` has the order of calls.

    ``name`` is unique among probes; a class without one is not found. ``describes`` has an entry for every column of
    the tables ``layers``, ``heads``, ``cutoffs`` and ``prompts`` that the probe writes: its meaning, unit and range.

    An ``optional`` probe serves rules alone and can be left out; a ``costly`` one, which takes more than a few percent
    of a diagnosis, is left out unless a rule that reads its columns is asked for by name. ``backends`` are those that
    can run it; empty for all.

    ``of_additions`` are columns of ``layers`` that hold only if what the attention adds to the residual is known; they
    are NaN for a model whose self-test shows that it is not.
    """

    name: ClassVar[str] = ""
    describes: ClassVar[Mapping[str, str]] = {}
    optional: ClassVar[bool] = False
    costly: ClassVar[bool] = False
    backends: ClassVar[tuple[str, ...]] = ()
    of_additions: ClassVar[tuple[str, ...]] = ()

    def __init__(self, context: PromptContext) -> None:
        self.context = context

    def on_model(self, lm: LoadedModel, prompt_ids: Sequence[int]) -> None:
        """Run the model on the prompt in a way of its own, before any layer is shown; most probes do not."""

    def on_context(self, rows: ContextRows) -> None:
        """Look at the context rows of one layer."""

    def on_decode(self, rows: DecodeRows) -> None:
        """Look at the decode-phase rows of one layer."""

    def on_outcome(self, outcome: Outcome) -> None:
        """Look at the logits, after the last layer."""

    def measured(self) -> Measured:
        """Return the columns, after `on_outcome`."""
        raise NotImplementedError
