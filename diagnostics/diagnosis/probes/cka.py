"""How much the prompt's states resemble the final ones: linear CKA.

Kornblith et al. (arXiv 1905.00414): with centred states X and Y [rows, width], CKA = |Y'X|^2 / (|X'X| |Y'Y|), Frobenius
norms. It is the cosine of the two Gram matrices XX' and YY', [rows, rows], which is what is kept of a layer: at most 1
MiB, until the last layer has run. The anchors are left out: their massive activations would decide.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from torch import Tensor

from diagnostics.diagnosis.observers import ContextRows
from diagnostics.diagnosis.probes.logit_lens import spaced
from diagnostics.diagnosis.probes.probe import Measured, Probe, PromptContext
from diagnostics.support.sums import total

# Prompt positions whose states are compared.
N_ROWS = 512
ROUNDING = 1e-6  # of float32, relative to the states


class Cka(Probe):
    """Linear CKA of the prompt's states before a layer and after the last one."""

    name = "cka"
    optional = True
    describes: ClassVar[Mapping[str, str]] = {
        "cka_to_final": f"linear CKA of h_l and h_L over up to {N_ROWS} evenly spaced prompt positions, 0..1; NaN for "
        "fewer than two, and where the states of all are equal",
    }

    def __init__(self, context: PromptContext) -> None:
        super().__init__(context)
        self.picked = spaced(context.layout.n_segment, N_ROWS) + context.layout.prompt.start
        self.grams: list[Tensor] = []
        self.column = np.full(context.n_layers, np.nan)

    def on_context(self, rows: ContextRows) -> None:
        """Keep the Gram matrix of one layer's input; after the last layer compare all with its output's."""
        if len(self.picked) < 2:
            return
        picked = self.picked.to(rows.residual_in.device)
        self.grams.append(_gram(rows.residual_in[picked]))
        if rows.layer == self.context.n_layers - 1:
            final = _gram(rows.residual_out[picked.to(rows.residual_out.device)])
            self.column = np.array([_cosine(gram, final.to(gram.device)) for gram in self.grams])
            self.grams.clear()

    def measured(self) -> Measured:
        """Return the column."""
        return Measured(layers={"cka_to_final": self.column})


def _gram(rows: Tensor) -> Tensor:
    """Gram matrix of centred rows [rows, width], float32 [rows, rows]; 0 where they differ by rounding alone."""
    rows = rows.float()
    centred = rows - rows.mean(0)
    gram = centred @ centred.T
    return gram if gram.trace() > ROUNDING**2 * rows.square().sum() else gram.zero_()


def _cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two matrices, as vectors."""
    inner, *squares = (float(total((x * y).flatten())) for x, y in ((a, b), (a, a), (b, b)))
    size = float(np.sqrt(squares[0] * squares[1]))
    return inner / size if size else float("nan")
