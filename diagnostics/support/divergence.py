"""How far two next-token distributions are apart, in nats: the one definition of KL, for measuring and training.

A vocabulary is 50,000 numbers or more. Added one after the other in float32, as some processors do, the last of them
are lost, and a distribution differs from itself by 1e-3 nats. So this module sums in float64, where there is one. What
remains is the rounding of the logits themselves: see ``RESOLUTION``.
"""

import torch
from torch import Tensor

from diagnostics.support.sums import wide

# Divergences below this, in nats, are reported as 0: float32 logits of one residual, computed in batches of two sizes,
# differ in their last bits, which makes divergences of up to about 1e-10.
RESOLUTION = 1e-9
# The same where nothing is wider than float32.
COARSE_RESOLUTION = 1e-6


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-softmax of logits [..., vocabulary] of any type, in the type to sum in; gradients pass."""
    return logits.log_softmax(-1, dtype=wide(logits.device))


def log_likelihoods(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities of targets [...] by logits [..., vocabulary], in the type to sum in; gradients pass."""
    chosen = targets.to(logits.device)[..., None]
    return log_probabilities(logits).gather(-1, chosen).squeeze(-1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities [..., vocabulary] -> [...], >= 0; exactly 0 for equal inputs; gradients pass."""
    terms = log_p.exp() * (log_p - log_q)
    # What p excludes adds nothing, whatever its probability under q.
    return terms.masked_fill(log_p == -torch.inf, 0).sum(-1).clamp_min(0)


def reported(divergence: Tensor) -> Tensor:
    """Return a divergence as results report it: 0 where it is negative or mere rounding; NaN stays."""
    floor = RESOLUTION if divergence.dtype == torch.float64 else COARSE_RESOLUTION
    return divergence.masked_fill(divergence < floor, 0)


class StreamedComparison:
    """Distances of many distributions q from p at the same positions, from slices of the logits of q.

    Neither all logits of all q nor their softmax are ever in memory. ``log_p`` is [positions, vocabulary], as
    `log_probabilities` gives it; the results are [positions, candidates], in its type.
    """

    def __init__(self, log_p: Tensor, n_candidates: int) -> None:
        self.log_p = log_p
        shape = (len(log_p), n_candidates)
        self._peak = log_p.new_full(shape, -torch.inf)  # running maximum of the scores, and
        self._total = log_p.new_zeros(shape)  # running sum of exp(score - peak)
        self._expected = log_p.new_zeros(shape)  # E_p[score]
        self._scratch = log_p.new_empty(0)

    def add(self, columns: slice, logits: Tensor) -> None:
        """Take the logits [positions, candidates, columns] of one slice of the vocabulary."""
        # One buffer for all slices: fresh memory of this size costs more than the arithmetic.
        if self._scratch.shape != logits.shape:
            self._scratch = torch.empty_like(logits, dtype=self.log_p.dtype)
        scores = self._scratch.copy_(logits)
        self._expected += torch.bmm(scores, self.log_p[:, columns, None].exp()).squeeze(-1)
        higher = torch.maximum(self._peak, scores.amax(-1))
        self._total *= (self._peak - higher).exp()
        self._total += scores.sub_(higher[..., None]).exp_().sum(-1)
        self._peak = higher

    @property
    def log_norm(self) -> Tensor:
        """Logarithm of the sum of exp(score) of each q."""
        return self._peak + self._total.log()

    @property
    def kl(self) -> Tensor:
        """KL(p || q) = E_p[log p] - E_p[log q], as reported."""
        negative_entropy = (self.log_p.exp() * self.log_p).sum(-1, keepdim=True)
        return reported(negative_entropy - self._expected + self.log_norm)


def js_distances(slices: list[Tensor], log_norm: Tensor) -> Tensor:
    """Jensen-Shannon distance of each candidate from the one before it: [positions, candidates], NaN first.

    The square root of H((p + q) / 2) - (H(p) + H(q)) / 2, from ``slices`` of logits [positions, candidates, columns]
    and the logarithm of each candidate's norm.
    """
    entropy = torch.zeros_like(log_norm)
    mixed = torch.zeros_like(entropy[:, 1:])
    tiny = torch.finfo(log_norm.dtype).tiny
    for logits in slices:
        log_q = logits - log_norm[..., None]
        q = log_q.exp()
        entropy -= log_q.mul_(q).sum(-1)
        mixture = (q[:, 1:] + q[:, :-1]).mul_(0.5)
        mixed -= mixture.clamp_min(tiny).log_().mul_(mixture).sum(-1)  # several times as fast as xlogy
    js = torch.full_like(log_norm, torch.nan)
    js[:, 1:] = reported(mixed - (entropy[:, 1:] + entropy[:, :-1]) / 2).sqrt()
    return js


def probability_gaps(slices: list[Tensor], log_norm: Tensor) -> Tensor:
    """Largest probability of each candidate less its second largest, 0..1: [positions, candidates].

    ``slices`` and ``log_norm`` are as for `js_distances`.
    """
    highest = torch.cat([logits.topk(min(2, logits.shape[-1])).values for logits in slices], dim=-1)
    first, second = (highest.topk(2).values - log_norm[..., None]).exp().unbind(-1)
    return first - second
