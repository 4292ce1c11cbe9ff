"""How much the loss depends on a layer, by the gradient of a gate: POP's layer importance.

POP (arXiv 2602.03295) multiplies both residual branches of a layer by a gate of 1 and takes its Fisher information, the
mean over samples of (dL/dg)^2, with the targets sampled from the model's own distribution. Here a prompt is a sample: L
is the mean over its positions of the negative log-likelihood of one token sampled there, and the mean over samples that
over the prompts of a run: with few prompts mostly noise, since POP takes 200 samples. It takes three to five forward
passes, and holds the inputs of all layers at once.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from diagnostics.diagnosis.gate_gradients import gate_gradients, require_derivatives
from diagnostics.diagnosis.probes.probe import Measured, Probe, PromptContext
from diagnostics.diagnosis.readout import Readout
from diagnostics.models.loading import LoadedModel
from diagnostics.support.divergence import log_likelihoods
from diagnostics.support.errors import UserError
from diagnostics.support.sums import wide

# Positions whose logits are held at once, with several copies in float64.
BLOCK = 32


class FisherGate(Probe):
    """Squared gradient of the model's own loss by a gate on what a layer adds."""

    name = "fisher_gate"
    optional = True
    costly = True
    of_additions = ("fisher_gate",)
    describes: ClassVar[Mapping[str, str]] = {
        "fisher_gate": "(dL/dg)^2 of a gate g = 1 on what attention and MLP of the layer add; L: negative "
        "log-likelihood of tokens that the model samples, mean over prompt positions, nats, >= 0",
    }

    def __init__(self, context: PromptContext) -> None:
        super().__init__(context)
        self.column = np.full(context.n_layers, np.nan)

    def on_model(self, lm: LoadedModel, prompt_ids: Sequence[int]) -> None:
        """Run the prompt forwards and backwards."""
        # By the prompt, so that a run that is continued samples the same.
        draws = torch.from_numpy(np.random.default_rng(list(prompt_ids)).random(len(prompt_ids)))
        readout = Readout(lm.anatomy)  # of its own: the other one may have been made in inference mode

        def loss_gradient(final: Tensor) -> Tensor:
            return sampled_loss_gradient(readout, final, draws, lm.name)

        # Of the sum over positions: gradients of the mean would vanish in float16.
        self.column = (gate_gradients(lm, prompt_ids, loss_gradient) / len(prompt_ids)) ** 2

    def measured(self) -> Measured:
        """Return the column."""
        return Measured(layers={"fisher_gate": self.column})


def sampled_loss_gradient(readout: Readout, final: Tensor, draws: Tensor, name: str) -> Tensor:
    """Return the gradient by ``final`` of the summed negative log-likelihood of sampled tokens, float32.

    ``final`` [tokens, width] is the output of the last layer; ``draws`` [tokens], uniform in 0..1, choose the token of
    each position by the cumulative distribution.
    """
    gradients = []
    for rows, draw in zip(final.split(BLOCK), draws.split(BLOCK), strict=True):
        with torch.enable_grad():
            residuals = rows.detach().float().requires_grad_()
            logits = readout.logits(residuals)
            if not logits.requires_grad:
                raise UserError(f"gradients of {name!r} cannot be computed: its head passes on none")
            require_derivatives(logits, name)
            loss = -log_likelihoods(logits, _sampled(logits.detach(), draw)).sum()
            (gradient,) = torch.autograd.grad(loss, residuals)
        gradients.append(gradient)
    return torch.cat(gradients)


def _sampled(logits: Tensor, draws: Tensor) -> Tensor:
    """Sample one token per row of logits [rows, vocabulary]: int64 [rows]."""
    cumulative = logits.softmax(-1, dtype=wide(logits.device)).cumsum(-1)
    draws = draws.to(cumulative.device, cumulative.dtype)[:, None]
    return torch.searchsorted(cumulative, draws * cumulative[:, -1:]).clamp_max(logits.shape[-1] - 1).squeeze(-1)
