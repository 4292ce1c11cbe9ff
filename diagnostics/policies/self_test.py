"""The self-test of policies: full depth and SPEED give the logits of the stock model and of its masked passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diagnostics.models.anatomy import Anatomy
from diagnostics.policies.base import Policy
from diagnostics.policies.full import FullPolicy
from diagnostics.policies.speed import SpeedPolicy
from diagnostics.self_test.proof import Proof
from diagnostics.self_test.proving import prove, refuse
from diagnostics.self_test.subject import Subject


def require_runnable(model: Any, anatomy: Anatomy, name: str) -> None:
    """Raise UserError if logits of ``model`` under a policy differ from those of a masked pass of the stock model."""
    refuse(prove_runnable(model, anatomy), ("causality", "policies"), name, "run under a policy")


def prove_runnable(model: Any, anatomy: Anatomy) -> Proof:
    """Return the proof for a transformers model that will run under a policy."""
    subject = Subject(model, anatomy)
    return prove(subject, "policies", {"policies": lambda: policies_differ(subject)})


def policies_differ(subject: Subject) -> str | None:
    """Check that full depth and SPEED at full depth equal the stock model, and SPEED at two cutoffs its masked passes.

    Checks with and without padding, where models and policies build different masks or none. Returns the first
    difference, or None.
    """
    n_layers, both, first = subject.anatomy.n_layers, slice(0, 2), slice(0, 1)
    cases: list[tuple[Policy, Tensor, slice]] = [(FullPolicy(), subject.stock, both)]
    cases += [(SpeedPolicy(k), subject.masked[k], both) for k in subject.cutoffs]
    cases += [(SpeedPolicy(k), subject.masked[k], first) for k in subject.cutoffs[-1:]]
    cases += [(SpeedPolicy(n_layers), subject.stock, first)]
    for policy, expected, rows in cases:
        logits = torch.cat(list(_decoded(subject, policy, rows)), dim=1)
        if share := subject.difference(logits, expected[rows, subject.batch.decode]):
            baseline = "the stock model" if expected is subject.stock else "a masked pass of the stock model"
            return f"under {policy} its logits differ from those of {baseline} by {share:.2g} of their spread"
    return None


def _decoded(subject: Subject, policy: Policy, rows: slice) -> Iterator[Tensor]:
    """Yield decode-phase logits: of the prompt's last token, of the next token, and of the rest in one call."""
    batch, cache, start = subject.batch, None, 0
    padded = not bool(batch.mask[rows].all())
    # Every call reads all weights, the largest cost of the test: without padding, one call runs all further tokens.
    stops = [(batch.n_prompt, 1), (batch.n_prompt + 1, 1), (batch.ids.shape[1], 0)]
    with policy(subject.model):
        for stop, keep in stops if padded else (stops[0], stops[2]):
            output = subject.model(
                input_ids=batch.ids[rows, start:stop],
                attention_mask=batch.mask[rows, :stop] if padded else None,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=keep,
            )
            cache, start = output.past_key_values, stop
            yield output.logits[:, -keep:]
