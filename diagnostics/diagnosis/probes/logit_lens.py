"""What each layer would predict: the logit lens at decode positions, raw and translated.

The raw lens (nostalgebraist, 2020) reads every residual with the model's own final norm and unembedding. Much of its
divergence in lower layers is a shift of basis; the *translated* lens removes the part that is the same at every
position, by adding the mean over prompt positions of h_L - h_l+1. Nothing is trained.

Early exit (CALM, arXiv 2207.07061) stops at the first layer whose two largest probabilities are far enough apart.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from diagnostics.diagnosis.observers import ContextRows, DecodeRows, Outcome
from diagnostics.diagnosis.probes.probe import Measured, Probe, PromptContext
from diagnostics.support.sums import mean_row

# Decode positions, from the first on, whose top token in every layer is kept of a prompt to be looked at closely.
DETAIL_POSITIONS = 24
# CALM's confidence: largest probability less the second largest.
EXIT_GAP = 0.9


class LogitLens(Probe):
    """Distance of every layer's prediction from the last layer's."""

    name = "logit_lens"
    describes: ClassVar[Mapping[str, str]] = {
        "lens_kl": "KL(final || lens after layer l), mean over lens positions, nats, >= 0",
        "lens_top1": "share of lens positions where the lens's top token is the final one, 0..1",
        "lens_rank": "rank of the final top token under the lens, median over lens positions, 0 is top",
        "lens_js": "Jensen-Shannon distance from the lens after layer l-1, sqrt(nats), 0..0.833; NaN in layer 0",
        "lens_kl_translated": "lens_kl after adding the mean over prompt positions of h_L - h_l+1, nats",
        "lens_top1_translated": "lens_top1 of the lens of lens_kl_translated, 0..1",
        "lens_settled": "share of lens positions whose top token is final from this layer on, 0..1",
        "lens_exited": f"share of lens positions where the lens's two largest probabilities were {EXIT_GAP} or more "
        "apart in this layer or a lower one, 0..1",
        "lens_token": "most likely token after layer l at the first decode positions; in lens, for prompts kept in "
        "detail",
        "lens_probability": "probability of lens_token after layer l, 0..1; in lens, for prompts kept in detail",
    }

    def __init__(self, context: PromptContext) -> None:
        super().__init__(context)
        self.rows: list[Tensor] = []
        self.first_rows: list[Tensor] = []
        self.means: list[Tensor] = []
        self.columns: dict[str, np.ndarray] = {}
        self.shown: dict[str, np.ndarray] = {}
        self.n_positions = 0

    def on_context(self, rows: ContextRows) -> None:
        """Keep the mean residual over prompt positions."""
        segment = rows.residual_out[self.context.layout.prompt]
        if len(segment):
            self.means.append(mean_row(segment))

    def on_decode(self, rows: DecodeRows) -> None:
        """Keep the residuals at the lens positions."""
        picked = spaced(len(rows.residual_out), self.context.lens_positions).to(rows.residual_out.device)
        self.rows.append(rows.residual_out[picked].float())
        if self.context.detail:
            self.first_rows.append(rows.residual_out[:DETAIL_POSITIONS].to(torch.float32, copy=True))

    def on_outcome(self, outcome: Outcome) -> None:
        """Read all layers, after checking that the last one gives the model's own logits."""
        readout, device = self.context.readout, self.rows[-1].device
        picked = spaced(len(outcome.logits), self.context.lens_positions)
        final = readout.logits(self.rows[-1])
        readout.require_identity(final, outcome.logits[picked.to(outcome.logits.device)], self.context.model_name)
        self.n_positions = len(picked)
        layers = torch.stack([rows.to(device) for rows in self.rows], dim=1)  # [positions, layers, width]
        raw = readout.compare(final, layers, consecutive=True).last_is_final()
        top = raw.rank == 0
        settled = top.flip(1).cumprod(1).flip(1)
        exited = (raw.gap >= EXIT_GAP).cummax(1).values
        self.columns = {
            "lens_kl": _mean(raw.kl),
            "lens_top1": _mean(top),
            "lens_rank": raw.rank.median(0).values.cpu().numpy(),
            "lens_js": _mean(raw.js),
            "lens_settled": _mean(settled),
            "lens_exited": _mean(exited),
        }
        missing = np.full(self.context.n_layers, np.nan)
        self.columns |= {"lens_kl_translated": missing, "lens_top1_translated": missing}
        if self.means:
            means = torch.stack([mean.to(device) for mean in self.means])
            translated = readout.compare(final, layers + (means[-1] - means)).last_is_final()
            self.columns["lens_kl_translated"] = _mean(translated.kl)
            self.columns["lens_top1_translated"] = _mean(translated.rank == 0)
        if self.first_rows:
            first = torch.stack([rows.to(device) for rows in self.first_rows], dim=1)
            token, probability = readout.top(first)
            self.shown = {"lens_token": token.cpu().numpy(), "lens_probability": probability.cpu().numpy()}

    def measured(self) -> Measured:
        """Return one column per line of ``describes``, and the number of positions they are means over."""
        return Measured(layers=self.columns, prompt={"n_lens_positions": self.n_positions}, lens=self.shown)


def spaced(n: int, most: int) -> Tensor:
    """Return at most ``most`` evenly spaced indices of ``range(n)``, both ends included."""
    if n <= most:
        return torch.arange(n)
    return torch.linspace(0, n - 1, most).round().long()


def _mean(values: Tensor) -> np.ndarray:
    return values.cpu().double().mean(0).numpy()
