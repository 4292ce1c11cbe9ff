"""The self-test of a diagnosis: the sweep equals masked passes, and contributions equal the gain of the residual.

A capture of a few dozen tokens is compared with the stock model. A model whose sweep differs is refused; if only the
contribution differs, the contribution is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diagnostics.diagnosis.capture.residual_path import watched_layers
from diagnostics.diagnosis.observers import DecodeRows, Measured
from diagnostics.diagnosis.probes.attention_mass import AttentionMass
from diagnostics.diagnosis.probes.cutoff_sweep import CutoffSweep
from diagnostics.diagnosis.probes.probe import Probe, PromptContext
from diagnostics.diagnosis.readout import Readout
from diagnostics.diagnosis.residual_check import Gains, split_problem
from diagnostics.policies.segments import Layout
from diagnostics.self_test.masked import Batch, stock_logits
from diagnostics.self_test.proof import Proof
from diagnostics.self_test.proving import prove, refuse
from diagnostics.self_test.subject import N_DECODE, N_PROMPT, Subject

N_GREEDY = 2
# Tolerated relative error of an addition to the residual.
ADDITIONS = {torch.float32: 1e-3, torch.float64: 1e-3}
ADDITIONS_IN_HALF = 0.05


def require_measurable(lm: Any, capture: Any) -> Proof:
    """Return the proof for a model that ``capture`` will measure; raise UserError if it would be mismeasured."""
    if getattr(capture, "remote", False):  # the sweep's tensors stay on the remote machine
        return Proof(unproved="the self-test did not run: the model runs elsewhere")
    proof = prove_measurable(lm, capture)
    refuse(proof, ("causality", "sweep"), lm.name, "measured")
    return proof


def prove_measurable(lm: Any, capture: Any) -> Proof:
    """Return the proof for a loaded model that ``capture`` reads."""
    subject = WatchedSubject(lm.model, lm.anatomy)
    captured = _Captured(subject, capture)
    checks = {
        "sweep": lambda: sweep_differs(subject, captured.given, captured.greedy),
        "contribution": lambda: contribution_differs(subject, captured.given),
    }
    return prove(subject, "diagnosis", checks, backend=capture.name)


class WatchedSubject(Subject):
    """A model under test whose stock pass also records the gain of the residual from each attention."""

    @cached_property
    def _watched(self) -> tuple[Tensor, Gains]:
        gains = Gains(self.anatomy, self.tolerance)
        with watched_layers(self.anatomy, gains.note):
            return stock_logits(self.model, self.rows), gains

    @cached_property
    def stock(self) -> Tensor:
        """Logits of the stock model, [rows, columns, vocabulary]."""
        return self._watched[0]

    @property
    def gains(self) -> Gains:
        """The gain of the residual from each attention in that pass."""
        return self._watched[1]

    @property
    def tolerance(self) -> float:
        """Tolerated relative error of an addition to the residual."""
        return ADDITIONS.get(self.dtype, ADDITIONS_IN_HALF)


@dataclass(frozen=True)
class CapturedRow:
    """What a capture observed of the first row.

    ``branches``: logits of the sweep by cutoff, [n_decode, vocabulary]; ``added``: the addition of each attention to
    the residual, including biases, [layers][n_decode, width].
    """

    branches: dict[int, Tensor]
    added: list[Tensor]


class _Captured:
    """The first row through a capture, run when a check first needs it."""

    def __init__(self, subject: Subject, capture: Any) -> None:
        self.subject, self.capture = subject, capture

    @cached_property
    def given(self) -> CapturedRow:
        reference = [*self.subject.batch.ids[0, N_PROMPT:].tolist(), 0]
        return capture_first_row(self.subject, self.capture, N_DECODE, reference)

    @cached_property
    def greedy(self) -> CapturedRow:
        return capture_first_row(self.subject, self.capture, N_GREEDY, None)


def capture_first_row(subject: Subject, capture: Any, n_decode: int, reference: Sequence[int] | None) -> CapturedRow:
    """Run the first row's prompt through a capture, with this reference or, if None, a greedy one."""
    prompt, readout = subject.batch.ids[0, :N_PROMPT].tolist(), Readout(capture.lm.anatomy)
    context = PromptContext(
        layout=Layout(1, N_PROMPT), n_layers=subject.anatomy.n_layers, readout=readout, model_name=capture.lm.name
    )
    sweep, additions = CutoffSweep(context), _Additions(context)
    # With the attention probe a model that it refuses fails here, not after the first prompt.
    observers = [AttentionMass(context), sweep, additions]
    capture.run(prompt, reference, observers, n_decode=n_decode, n_anchors=1)
    assert sweep.branches is not None
    return CapturedRow({k: readout.logits(sweep.branches[k - 1]) for k in subject.cutoffs}, additions.added)


class _Additions(Probe):
    """Keeps the addition of every layer's attention, as the capture computes it, [n_decode, width]."""

    def __init__(self, context: PromptContext) -> None:
        super().__init__(context)
        self.added: list[Tensor] = []

    def on_decode(self, rows: DecodeRows) -> None:
        heads, adds = rows.attention.output.flatten(1), rows.attention.adds
        self.added.append(adds(heads.float()) + adds.constant(heads))

    def measured(self) -> Measured:
        return Measured()


def sweep_differs(subject: Subject, given: CapturedRow, greedy: CapturedRow) -> str | None:
    """Check that each branch of the cutoff sweep equals the masked pass, with a given and with a greedy reference.

    Returns the first difference, or None.
    """
    # With another reference only the first decode row follows the same tokens.
    for how, row, positions in (("", given, slice(None)), ("with a greedy reference ", greedy, slice(1))):
        for cutoff, logits in subject.masked.items():
            expected = logits[0, subject.batch.decode][positions]
            if share := subject.difference(row.branches[cutoff][positions], expected):
                return (
                    f"{how}the sweep's logits at cutoff {cutoff} differ from those of a masked pass of the stock model "
                    f"by {share:.2g} of their spread"
                )
    return None


def contribution_differs(subject: WatchedSubject, given: CapturedRow) -> str | None:
    """Check that the capture's additions of the attention equal the stock model's, and that they can be split.

    Returns the first difference, or None.
    """
    first = Batch(subject.batch.ids[:1], subject.batch.mask[:1], N_PROMPT)
    gains = subject.gains
    problem = gains.problem or split_problem(subject.model, subject.anatomy, gains.paths, first, subject.tolerance)
    if problem is not None:
        return problem
    for layer, ours in enumerate(given.added):
        expected = gains.added[layer][0, first.decode]
        error = float((ours.to(expected.device) - expected).norm()) / max(float(expected.norm()), 1e-30)
        if not error <= subject.tolerance:
            return f"what the attention of layer {layer} adds to the residual is missed by {error:.2g} of its size"
    return None
