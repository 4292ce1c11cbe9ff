"""Policies, tiny models and prompts that several test files share, and the second implementation's word on each."""

import functools

import pytest
import torch

from diagnostics import (
    FastKVPolicy,
    FullPolicy,
    ProjectedPolicy,
    SpeedPolicy,
)
from tests.support import policy_reference
from tests.support.tiny import random_ids, tiny_model

RATES = {"tsp_rate": 0.5, "retention_rate": 0.3, "window": 4, "kernel": 3}
FASTKV = FastKVPolicy(2, **RATES)
POLICIES = [FullPolicy(), SpeedPolicy(2), SpeedPolicy(3, 3, 4), ProjectedPolicy(2), FASTKV]
SLIDING = ("mistral", "gemma2", "gemma3", "gpt_oss")
ROWS = [random_ids(n, seed=n) for n in (40, 33, 9, 23)]


@functools.cache
def load(family):
    return tiny_model(family)


@functools.cache
def slow(family):
    return policy_reference.SlowModel(load(family))


def served(families, policies=POLICIES):
    """All pairs but those that FastKV refuses."""
    return [(f, p) for f in families for p in policies if not (f in SLIDING and p.name == "fastkv")]


def each(cases):
    """Parametrize a test by pairs of family and policy."""
    return pytest.mark.parametrize(("family", "policy"), cases, ids=str)


def tokens(n, seed=0):
    return torch.tensor([random_ids(n, seed)])


def left_padded(rows):
    """Token ids and attention mask of prompts of different lengths."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def letters_of(policy, *turns):
    """One letter per token of a conversation; a turn is its number of prompt and of decode-phase tokens."""
    letters = []
    for n_prompt, n_decode in turns:  # anchors are the first tokens of all
        letters += policy_reference.labels(n_prompt, n_decode, 0 if letters else policy.anchors, policy.boundary)
    return letters


def masked_pass(family, policy, ids, letters):
    """Float64 logits of every token, [tokens, vocabulary], by the policy's definition."""
    match policy:
        case SpeedPolicy():
            return policy_reference.speed(slow(family), ids, letters, policy.cutoff)
        case ProjectedPolicy():
            return policy_reference.projected(slow(family), ids, letters, policy.cutoff)
        case FullPolicy():
            return slow(family).run(ids, lambda _, hidden, mask: (hidden, mask))
    raise NotImplementedError(policy)


def assert_close(actual, expected, relative=5e-5):
    """Nothing differs by more than a share of the largest number: rounding grows with what a layer adds up."""
    scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected.double(), atol=relative * scale, rtol=0)


def reference_logits(slow, policy, ids, letters=None, *, n_prompt):
    """Float64 logits of the policy's second implementation, from the last prompt token on: [len(ids) - n + 1, V]."""
    n = n_prompt
    letters = letters or policy_reference.labels(n, len(ids) - n, policy.anchors, policy.boundary)
    match policy:
        case SpeedPolicy():
            logits = policy_reference.speed(slow, ids, letters, policy.cutoff)
        case ProjectedPolicy():
            logits = policy_reference.projected(slow, ids, letters, policy.cutoff)
        case FastKVPolicy():
            layer = policy.depth(len(slow.layers)) - 1
            rates = policy.tsp_rate, policy.retention_rate
            logits = policy_reference.fastkv(slow, ids, n, layer, *rates, policy.window, policy.kernel)[0]
        case _:
            logits = slow.run(ids, lambda _, hidden, mask: (hidden, mask))
    return logits[n - 1 :]
