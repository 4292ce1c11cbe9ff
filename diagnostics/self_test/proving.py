"""Runs the checks for one use of a model, or looks up their findings; refuses a model that failed."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from diagnostics.self_test.masked import Unprovable
from diagnostics.self_test.proof import Proof, digest_of, keep_proof, key_of, read_proof
from diagnostics.self_test.subject import Subject, causality, unsteady
from diagnostics.self_test.switching import self_test, skipped
from diagnostics.support.errors import UserError

# A check returns None, or one line that says what differs.
Check = Callable[[], str | None]

SKIPPED = "the self-test was skipped"
_HINT = "`self_test=False` skips the test, for those who know why it fails"

_proofs: dict[str, Proof] = {}
# Inside `looked_up_once`: proofs by model, use, backend, device, type and attention implementation.
_recalled: ContextVar[dict[tuple[Any, ...], Proof] | None] = ContextVar("recalled", default=None)


@contextmanager
def looked_up_once() -> Iterator[None]:
    """Look up the proof of a model once inside the block, however often a policy's block is entered there.

    The conditions of a proof are read from every module of the model, which takes as long as a decode step of a small
    model. Use it only for work that does not change a model's settings between its first use and its last; type,
    device and attention implementation may change.
    """
    if _recalled.get() is not None:
        yield
        return
    token = _recalled.set({})
    try:
        yield
    finally:
        _recalled.reset(token)


def prove(subject: Subject, use: str, checks: Mapping[str, Check], *, backend: str | None = None) -> Proof:
    """Test a model for a ``use``, or return the finding of an earlier test.

    Every use needs `causality` and its own ``checks``, by name. ``backend`` is the capture that they run, if any. A
    model with remote or offloaded weights is not tested, and the proof says so.
    """
    if skipped():
        return Proof(unproved=SKIPPED)
    model, recalled = subject.model, _recalled.get()
    stamp = model, use, backend, subject.device.type, model.dtype, model.config._attn_implementation
    if recalled is not None and stamp in recalled:
        return replace(recalled[stamp])
    if any(parameter.is_meta for parameter in model.parameters()):
        return Proof(unproved="the self-test did not run: not all weights of the model are in this process's memory")
    key = key_of(model, use=use, backend=backend, device=subject.device.type)
    digest = digest_of(key)
    proof = _proofs.get(digest) or read_proof(digest)
    if proof is None:
        with self_test(False), _in_evaluation(model), torch.no_grad():
            proof = _tested(subject, checks)
        keep_proof(digest, key, proof)
    _proofs[digest] = proof
    if recalled is not None:
        recalled[stamp] = proof
    return replace(proof)


def refuse(proof: Proof, needed: tuple[str, ...], name: str, use: str) -> None:
    """Raise UserError if one of the ``needed`` checks failed: model ``name`` cannot be used this way."""
    for check in needed:
        if line := proof.failed.get(check):
            raise UserError(f"model {name!r} cannot be {use}: in its self-test {line} ({_HINT})")


def _tested(subject: Subject, checks: Mapping[str, Check]) -> Proof:
    failed = findings({"causality": lambda: causality(subject), **checks})
    # Checked only after a failure: it costs one more pass, and means that the test cannot tell anything.
    if failed and (reason := unsteady(subject)):
        return Proof(unproved=f"the self-test could not tell: {reason}")
    return Proof(failed)


def findings(checks: Mapping[str, Check]) -> dict[str, str]:
    """Run all checks; return the failed ones with what differs."""
    return {name: line for name, check in checks.items() if (line := _finding(name, check))}


def _finding(name: str, check: Check) -> str | None:
    """Run a check; an error in the model's own code counts as a finding."""
    try:
        return check()
    except torch.OutOfMemoryError:
        raise
    except (UserError, Unprovable) as error:
        return str(error)
    except Exception as error:  # a model, or a library that wraps it, may raise anything
        text = " ".join(str(error).split())[:200]
        return f"the check of {name} ended in {type(error).__name__}: {text}"


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Put all modules into evaluation mode inside the block, and restore each one's mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
