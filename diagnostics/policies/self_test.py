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
    """Raise UserError if a policy would run ``model`` otherwise than as a masked pass of the stock model does."""
    refuse(prove_runnable(model, anatomy), ("causality", "policies"), name, "run under a policy")


def prove_runnable(model: Any, anatomy: Anatomy) -> Proof:
    """Return what is proven of a transformers model that is to run under a policy."""
    subject = Subject(model, anatomy)
    return prove(subject, "policies", {"policies": lambda: policies_differ(subject)})


def policies_differ(subject: Subject) -> str | None:
    """Full depth and SPEED at full depth equal the stock model, SPEED at two cutoffs its masked passes.

    With padding and without, where models and policies make masks of their own kind or none.
    """
    n_layers, both, first = subject.anatomy.n_layers, slice(0, 2), slice(0, 1)
    wanted: list[tuple[Policy, Tensor, slice]] = [(FullPolicy(), subject.stock, both)]
    wanted += [(SpeedPolicy(k), subject.masked[k], both) for k in subject.cutoffs]
    wanted += [(SpeedPolicy(k), subject.masked[k], first) for k in subject.cutoffs[-1:]]
    wanted += [(SpeedPolicy(n_layers), subject.stock, first)]
    for policy, expected, rows in wanted:
        ours = torch.cat(list(_decoded(subject, policy, rows)), dim=1)
        if share := subject.difference(ours, expected[rows, subject.batch.decode]):
            what = "the stock model" if expected is subject.stock else "a masked pass of the stock model"
            return f"under {policy} its logits differ from those of {what} by {share:.2g} of their spread"
    return None


def _decoded(subject: Subject, policy: Policy, rows: slice) -> Iterator[Tensor]:
    """Logits of the decode phase: of the prompt's last token, of a further one, and of the rest in one call."""
    batch, cache, start = subject.batch, None, 0
    padded = not bool(batch.mask[rows].all())
    # Every call reads all weights, which is most of what the test costs: without padding all further tokens are one.
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
