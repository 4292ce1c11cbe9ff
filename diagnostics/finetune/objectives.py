"""Losses of fine-tuning: the targets' likelihood, the full-depth teacher's distribution, or both.

Logits are the largest tensors of a training step. Here the positions that count are selected first, in the logits' own
type; the loss then runs over chunks that the backward pass recomputes, so that no full copy in a wider type is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diagnostics.finetune.examples import IGNORED
from diagnostics.support.divergence import kl_divergence, log_likelihoods, log_probabilities
from diagnostics.support.errors import UserError
from diagnostics.support.sums import wide

CHUNK = 128


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, *, n_items: Tensor | int | None = None
) -> Tensor:
    """Mean KL(teacher || student) in nats over the positions in ``mask``; a scalar, float32 or better.

    Parameters
    ----------
    student_logits, teacher_logits
        [batch, tokens, vocabulary]; no gradient reaches the teacher.
    mask
        bool [batch, tokens]: positions that count, such as ``predicting(labels)``.
    n_items
        Divide the sum by this instead of the number of positions, as with gradient accumulation.
    """
    if student_logits.shape != teacher_logits.shape:
        raise UserError(
            f"student and teacher differ in their logits: {list(student_logits.shape)}, {list(teacher_logits.shape)}"
        )
    return _mean(_divergence, student_logits[mask], teacher_logits.detach()[mask], n_items)


def supervised_loss(
    logits: Tensor, labels: Tensor, *, n_items: Tensor | int | None = None, smoothing: float = 0.0
) -> Tensor:
    """Mean cross-entropy in nats of the targets in ``labels`` [batch, tokens], -100 where there is none.

    ``logits`` [batch, tokens, vocabulary] of a position are for the label after it, as in transformers; ``n_items`` as
    in `distillation_loss`. ``smoothing`` is the share of a target that the whole vocabulary gets, as in transformers'
    ``label_smoothing_factor``. Without any target the loss is 0.
    """
    mask = predicting(labels)
    return _mean(partial(_cross_entropy, smoothing=smoothing), logits[mask], labels.roll(-1, dims=1)[mask], n_items)


def mixed_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    supervised: float,
    n_items: Tensor | int | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """``supervised`` times the cross-entropy of the targets plus the rest times the distillation at their positions.

    Raises UserError if ``supervised`` is not from 0 to 1.
    """
    require_share(supervised)
    distilled = distillation_loss(student_logits, teacher_logits, predicting(labels), n_items=n_items)
    cross_entropy = supervised_loss(student_logits, labels, n_items=n_items, smoothing=smoothing)
    return supervised * cross_entropy + (1 - supervised) * distilled


def require_share(supervised: float) -> None:
    """Raise UserError unless the share of the supervised loss is from 0 to 1."""
    if not 0 <= supervised <= 1:
        raise UserError(f"the share of the supervised loss is {supervised}: give 0 to 1")


def predicting(labels: Tensor) -> Tensor:
    """Positions whose logits are for a target, the label after them; bool [batch, tokens]."""
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != IGNORED
    return mask


def _mean(
    loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor, n_items: Tensor | int | None
) -> Tensor:
    """Sum a loss over positions, chunk by chunk, and divide."""
    total = logits[:0].sum(dtype=wide(logits.device))  # without positions, a zero that has a gradient
    for chunk in zip(logits.split(CHUNK), targets.split(CHUNK), strict=True):
        total = total + checkpoint(loss, *chunk, use_reentrant=False)
    mean = total / _at_least_one(len(logits) if n_items is None else n_items)
    return mean.to(torch.promote_types(logits.dtype, torch.float32))


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    return kl_divergence(log_probabilities(teacher), log_probabilities(student)).sum()


def _cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    likelihood_loss = -log_likelihoods(logits, targets).sum()
    if smoothing == 0:
        return likelihood_loss
    return (1 - smoothing) * likelihood_loss - smoothing * log_probabilities(logits).mean(-1).sum()


def _at_least_one(n_items: Tensor | int) -> Tensor | int:
    """A step without any target has a loss of 0, not of 0/0."""
    return n_items.clamp(min=1) if isinstance(n_items, Tensor) else max(n_items, 1)
