"""What a thread requests of its next call before the call reaches the decoder stack."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from diagnostics.policies.cache import PolicyCache
from diagnostics.policies.segments import Phases


class Request(threading.local):
    """What one thread requests of its next call: threads may take turns on a model.

    Attributes
    ----------
    logits_to_keep, labels
        Arguments of the model that do not reach its decoder stack.
    expected
        The phases that `Runtime.expect` announced.
    dropped
        The cache that ``generate()`` dropped to begin anew with all tokens.
    """

    def __init__(self) -> None:
        self.logits_to_keep: int | Tensor | None = None
        self.labels: Tensor | None = None
        self.expected: Phases | None = None
        self.dropped: PolicyCache | None = None


def count_logits(keep: int | Tensor | None, n_new: int) -> int:
    """Return how many of a call's last tokens span all requested logits; 0 for all tokens of the call."""
    if isinstance(keep, Tensor):
        indices = keep.reshape(-1)
        return n_new - int(torch.where(indices < 0, indices + n_new, indices).min()) if len(indices) else 0
    return keep or 0
