"""Prove a model before it is measured or run: once per model, on a few dozen tokens.

A diagnosis asks `require_measurable`, every policy `require_runnable`, training `require_trainable`. What is proven:
the cutoff sweep, `SpeedPolicy` and training equal masked passes of the stock model, full depth equals the stock model,
no token sees later ones, and what the attention is said to add to the residual is what the residual gains. What fails
is refused by name; where only the contribution fails it is left out.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from diagnostics.models.anatomy import Anatomy
from diagnostics.self_test.proof import Proof, digest_of, keep_proof, key_of, read_proof
from diagnostics.support.errors import UserError

__all__ = ["Proof", "prove", "require_measurable", "require_runnable", "require_trainable", "self_test", "switch"]

VARIABLE = "SPEED_DIAGNOSTICS_SELF_TEST"
SKIPPED = "the self-test was skipped"
_HINT = "self_test=False or --skip-self-test skips the test, for those who know why it fails"

_on: ContextVar[bool] = ContextVar("self_test", default=True)
_proofs: dict[str, Proof] = {}


@contextmanager
def self_test(on: bool) -> Iterator[None]:
    """Switch the self-test off, or on again, inside the block."""
    token = _on.set(on)
    try:
        yield
    finally:
        _on.reset(token)


def switch(on: bool) -> None:
    """Switch the self-test on or off from here on, as a command does by its option."""
    _on.set(on)


def skipped() -> bool:
    """Whether models are taken without a test, by `self_test`, or by ``SPEED_DIAGNOSTICS_SELF_TEST=off``."""
    return not _on.get() or os.environ.get(VARIABLE, "").lower() in ("off", "0", "no")


def require_measurable(lm: Any, capture: Any) -> Proof:
    """Return what was proven of a model that ``capture`` is to measure; raise UserError if it would be mismeasured."""
    if getattr(capture, "remote", False):  # what the sweep holds stays where the model runs
        return Proof(unproved="the self-test did not run: the model runs elsewhere")
    proof = prove(lm.model, lm.anatomy, lm.name, "diagnosis", capture)
    _refuse(proof, ("causality", "sweep"), lm.name, "measured")
    return proof


def require_runnable(model: Any, anatomy: Anatomy, name: str) -> None:
    """Raise UserError if a policy would run ``model`` otherwise than as a masked pass of the stock model does."""
    _refuse(prove(model, anatomy, name, "policies"), ("causality", "policies"), name, "run under a policy")


def require_trainable(model: Any, anatomy: Anatomy, name: str) -> None:
    """Raise UserError if training would run ``model`` otherwise than as a masked pass of the stock model does."""
    _refuse(prove(model, anatomy, name, "training"), ("causality", "training"), name, "trained under a policy")


def prove(model: Any, anatomy: Anatomy, name: str, use: str, capture: Any = None) -> Proof:
    """Test a transformers model for a ``use``, or recall what an earlier test of the same found.

    Uses are ``policies``, ``training`` and, with a ``capture``, ``diagnosis``. Weights that are elsewhere (remote, or
    offloaded) are not tested, and the proof says so.
    """
    if skipped():
        return Proof(unproved=SKIPPED)
    if any(parameter.is_meta for parameter in model.parameters()):
        return Proof(unproved="the self-test did not run: not all weights of the model are in this process's memory")
    device = model.get_input_embeddings().weight.device
    backend = None if capture is None else capture.name
    key = key_of(model, use=use, backend=backend, device=device.type)
    digest = digest_of(key)
    proof = _proofs.get(digest) or read_proof(digest)
    if proof is None:
        with self_test(False), _in_evaluation(model), torch.no_grad():
            proof = _tested(model, anatomy, device, use, capture)
        keep_proof(digest, key, proof)
    _proofs[digest] = proof
    return replace(proof)


def _tested(model: Any, anatomy: Anatomy, device: torch.device, use: str, capture: Any) -> Proof:
    from diagnostics.self_test.checks import Subject, findings, unsteady  # which need what asks for the test

    subject = Subject(model, anatomy, device, model.dtype)
    failed = findings(subject, use, capture)
    # Asked only then: it is one more pass, and says that the test had nothing to go by.
    if failed and (reason := unsteady(subject)):
        return Proof(unproved=f"the self-test could not tell: {reason}")
    return Proof(failed)


def _refuse(proof: Proof, parts: tuple[str, ...], name: str, what: str) -> None:
    for part in parts:
        if line := proof.failed.get(part):
            raise UserError(f"model {name!r} cannot be {what}: in its self-test {line} ({_HINT})")


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Have all modules in evaluation mode inside the block, each as it was afterwards."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
