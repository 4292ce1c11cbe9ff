"""Tests a model before it is measured or run: once per model, on a few dozen tokens.

Each check is in the package that it checks and runs through `prove`: `diagnostics.diagnosis.self_test` proves the
cutoff sweep and the contribution, `diagnostics.policies.self_test` every policy, `diagnostics.finetune.self_test`
training. Each compares with masked passes of the stock model (`masked`). A model that fails is refused by name.
"""

from diagnostics.self_test.proof import Proof
from diagnostics.self_test.proving import Check, looked_up_once, prove
from diagnostics.self_test.subject import Subject
from diagnostics.self_test.switching import self_test, skipped, switch

__all__ = ["Check", "Proof", "Subject", "looked_up_once", "prove", "self_test", "skipped", "switch"]
