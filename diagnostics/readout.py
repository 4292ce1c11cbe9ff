"""Residuals -> distributions over the vocabulary, compared with the final one a block of positions at a time.

The logit lens and the cutoff sweep ask the same question, *how far is this residual's next-token distribution from the
model's own?*, of many residuals at the same positions. Only a bounded block of logits exists at any time.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diagnostics.anatomy import Anatomy
from diagnostics.errors import UserError

BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class Comparison:
    """Distances of candidate distributions q from the final one p; every field is float32 [positions, candidates].

    ``kl``: KL(p || q) in nats, >= 0. ``rank``: rank of p's most likely token under q, 0 is top. ``nll``: negative
    log-likelihood of the target under q in nats (NaN without targets). ``js``: Jensen-Shannon distance (square root of
    the divergence in nats, 0..0.833) of candidate i from candidate i-1, NaN for the first, and None unless asked for.
    """

    kl: Tensor
    rank: Tensor
    nll: Tensor
    js: Tensor | None


class Readout:
    """Final norm and unembedding of one model, in float32 whatever the model's own type."""

    def __init__(self, anatomy: Anatomy, block_bytes: int = BLOCK_BYTES) -> None:
        self.anatomy = anatomy
        self.block_bytes = block_bytes
        norm = anatomy.final_norm
        exact = all(p.dtype == torch.float32 for p in norm.parameters())
        self.norm = norm if exact else copy.deepcopy(norm).float()

    def logits(self, residuals: Tensor) -> Tensor:
        """Map residuals [..., width] (before the final norm) to logits [..., vocab], float32."""
        hidden = self.norm(residuals.float())
        head = self.anatomy.unembedding
        plain = type(head) is nn.Linear and head.weight.is_floating_point() and head.weight.device.type != "meta"
        if plain:
            logits = _linear(hidden.to(head.weight.device), head, self.block_bytes)
        else:  # quantised, adapted or offloaded: only the module itself knows its weights
            logits = head(hidden.to(self.anatomy.layers[-1].parameters().__next__().dtype)).float()
        if self.anatomy.logit_scale != 1.0:
            logits = logits * self.anatomy.logit_scale
        if (cap := self.anatomy.logit_softcap) is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits

    def require_identity(self, residuals: Tensor, logits: Tensor, name: str) -> None:
        """Refuse the model unless the lens after the last layer reproduces its logits.

        ``residuals`` [rows, width] is the output of the last layer, ``logits`` [rows, vocab] the model's own. Tolerance:
        1e-3 of the logits' standard deviation in float32, 0.1 of it in half precision, whose rounding alone
        reaches a few hundredths. Raises UserError.
        """
        ours = self.logits(residuals)
        half = next(self.anatomy.layers[-1].parameters()).dtype != torch.float32
        tolerance = (0.1 if half else 1e-3) * float(logits.std())
        error = float((ours - logits.to(ours.device)).abs().max())
        if not error <= tolerance:
            raise UserError(
                f"model {name!r} cannot be diagnosed: final norm and head on the last residual miss its own logits by "
                f"{error:.3g} (tolerance {tolerance:.3g}); something between them is not understood"
            )

    def compare(
        self, final: Tensor, candidates: Tensor, targets: Tensor | None = None, *, consecutive: bool = False
    ) -> Comparison:
        """Compare candidates with the final residual at the same positions.

        ``final`` [positions, width], ``candidates`` [positions, candidates, width], ``targets`` [positions] token ids;
        ``consecutive`` asks for the distance of each candidate from the one before it.
        """
        n, m = candidates.shape[:2]
        vocab = self.anatomy.unembedding.weight.shape[0]
        block = max(1, self.block_bytes // (4 * vocab * (m + 1)))
        parts = [
            self._compare_block(
                final[i : i + block],
                candidates[i : i + block],
                None if targets is None else targets[i : i + block],
                consecutive,
            )
            for i in range(0, n, block)
        ]
        kl, rank, nll, js = (torch.cat(column) for column in zip(*parts, strict=True))
        return Comparison(kl, rank, nll, js if consecutive else None)

    def _compare_block(
        self, final: Tensor, candidates: Tensor, targets: Tensor | None, consecutive: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits = self.logits(torch.cat([final[:, None], candidates], dim=1))  # [n, 1 + m, vocab]
        top = logits[:, 0].argmax(-1)
        best = logits[:, 1:].gather(-1, top[:, None, None].expand(-1, candidates.shape[1], 1))
        rank = (logits[:, 1:] > best).sum(-1, dtype=torch.float32)

        log_norm = logits.logsumexp(-1)  # [n, 1 + m]
        p = (logits[:, 0] - log_norm[:, :1]).exp()
        # KL(p || q) = E_p[log p] - E_p[log q], one matrix-vector product for all candidates.
        expected = torch.einsum("nv,nmv->nm", p, logits) - log_norm
        kl = (expected[:, :1] - expected[:, 1:]).clamp_min(0)

        nll = torch.full_like(kl, torch.nan)
        if targets is not None:
            chosen = logits[:, 1:].gather(-1, targets[:, None, None].expand(-1, candidates.shape[1], 1))
            nll = log_norm[:, 1:] - chosen.squeeze(-1)
        js = torch.full_like(kl, torch.nan)
        if consecutive and candidates.shape[1] > 1:
            js[:, 1:] = _js_distance((logits[:, 1:] - log_norm[:, 1:, None]))
        return kl, rank, nll, js


def _js_distance(log_q: Tensor) -> Tensor:
    """Jensen-Shannon distance of neighbours along dim 1: [n, m, vocab] log-probabilities -> [n, m - 1]."""
    q = log_q.exp()
    entropy = -(q * log_q).sum(-1)
    distances = []
    for i in range(1, q.shape[1]):  # one pair at a time: a mixture of all would double the block
        mixture = (q[:, i] + q[:, i - 1]) / 2
        mixed = -torch.xlogy(mixture, mixture).sum(-1)
        distances.append((mixed - (entropy[:, i] + entropy[:, i - 1]) / 2).clamp_min(0).sqrt())
    return torch.stack(distances, dim=1)


def _linear(hidden: Tensor, head: nn.Linear, block_bytes: int) -> Tensor:
    """Apply a linear head in float32, upcasting its weights a slice at a time."""
    if head.weight.dtype == torch.float32:
        return nn.functional.linear(hidden, head.weight, head.bias)
    step = max(1, block_bytes // (4 * head.weight.shape[1]))
    parts = [
        nn.functional.linear(hidden, head.weight[i : i + step].float())
        for i in range(0, head.weight.shape[0], step)
    ]
    logits = torch.cat(parts, dim=-1)
    return logits if head.bias is None else logits + head.bias.float()
