"""The self-test of training: its forward pass under SPEED gives the logits of the stock model's masked passes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from diagnostics.models.anatomy import Anatomy
from diagnostics.policies.speed import SpeedPolicy
from diagnostics.self_test.proof import Proof
from diagnostics.self_test.proving import prove, refuse
from diagnostics.self_test.subject import Subject

# `diagnostics.finetune.visibility.train_under`, which calls this test and passes itself.
TrainUnder = Callable[[SpeedPolicy, Any], AbstractContextManager[Any]]


def require_trainable(model: Any, anatomy: Anatomy, name: str, train_under: TrainUnder) -> None:
    """Raise UserError if training ``model`` would not equal masked passes of the stock model."""
    refuse(prove_trainable(model, anatomy, train_under), ("causality", "training"), name, "trained under a policy")


def prove_trainable(model: Any, anatomy: Anatomy, train_under: TrainUnder) -> Proof:
    """Return the proof that a transformers model can be trained under SPEED, or of what it fails."""
    subject = Subject(model, anatomy)
    return prove(subject, "training", {"training": lambda: training_differs(subject, train_under)})


def training_differs(subject: Subject, train_under: TrainUnder) -> str | None:
    """The forward pass of training under SPEED equals the masked pass, also for padded rows."""
    batch = subject.batch
    decode = torch.zeros_like(batch.mask, dtype=torch.bool)
    decode[:, batch.decode] = True
    for cutoff, expected in subject.masked.items():
        with train_under(SpeedPolicy(cutoff), subject.model):
            ours = subject.model(input_ids=batch.ids, attention_mask=batch.mask, decode_mask=decode).logits
        if share := subject.difference(ours[:, batch.decode], expected[:, batch.decode]):
            return (
                f"in training at cutoff {cutoff} its logits differ from those of a masked pass of the stock model by "
                f"{share:.2g} of their spread"
            )
    return None
