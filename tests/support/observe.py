"""Run one prompt through a capture with every observer, as `diagnose` does."""

from diagnostics.diagnosis.capture.hooks import HooksCapture
from diagnostics.diagnosis.probes import all_probes
from diagnostics.diagnosis.probes.probe import PromptContext
from diagnostics.diagnosis.readout import Readout
from diagnostics.policies.segments import Layout


def observe(
    lm,
    prompt_ids,
    reference_ids=None,
    *,
    n_anchors=1,
    n_decode=12,
    evidence=(),
    lens_positions=8,
    capture=HooksCapture,
    probes=None,
):
    """Return the outcome and the columns of layers, heads and cutoffs: of ``probes``, or of all but the costly ones."""
    n_anchors = min(n_anchors, len(prompt_ids) - 1)
    context = PromptContext(
        layout=Layout(n_anchors, len(prompt_ids)),
        n_layers=lm.anatomy.n_layers,
        readout=Readout(lm.anatomy),
        model_name=lm.name,
        evidence=evidence,
        lens_positions=lens_positions,
        windows=tuple(map(lm.anatomy.window, range(lm.anatomy.n_layers))),
    )
    observers = [probe(context) for probe in probes or all_probes().values() if probes or not probe.costly]
    outcome = capture(lm).run(prompt_ids, reference_ids, observers, n_decode=n_decode, n_anchors=n_anchors)
    layers, heads, cutoffs = {}, {}, {}
    for measured in outcome.measured:
        layers |= measured.layers
        heads |= measured.heads
        cutoffs |= measured.cutoffs
    return outcome, layers, heads, cutoffs
