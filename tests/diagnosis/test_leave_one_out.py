"""Leave-one-out and leave-one-in against masked float64 passes of the stock model, one per layer."""

import numpy as np
import pytest
import torch

from diagnostics import UserError, diagnose
from diagnostics.diagnosis.capture.nnsight import NNsightCapture
from diagnostics.diagnosis.capture.transformer_lens import TransformerLensCapture
from diagnostics.diagnosis.probes import leave_one_out, require_backend
from diagnostics.diagnosis.probes.cutoff_sweep import CutoffSweep
from diagnostics.diagnosis.probes.leave_one_out import LeaveOneOut
from tests.support.observe import observe
from tests.support.reference import Reference, kl
from tests.support.tiny import FAMILIES, N_LAYERS, random_ids, tiny_model

N_PROMPT, N_DECODE = 45, 12
TOLERANCE = 1e-4


def measure(lm, prompt, reference_ids, **options):
    outcome, layers, _, cutoffs = observe(lm, prompt, reference_ids, probes=[LeaveOneOut, CutoffSweep], **options)
    return outcome, layers, cutoffs


def expected_columns(lm, ids, n_prompt, n_anchors=1):
    reference = Reference(lm.model, lm.anatomy.layers, lm.anatomy.attentions, ids[:-1], n_prompt, n_anchors)
    targets = torch.tensor(ids[n_prompt:])

    def loss(hidden):
        log_q = reference.logits_without(hidden).log_softmax(-1)
        return kl(full, log_q), -float(log_q[torch.arange(len(targets)), targets].mean())

    full = reference.logits[reference.decode].log_softmax(-1)
    everywhere = range(N_LAYERS)
    at_full, blind = loss([]), loss(everywhere)
    out = [loss([layer]) for layer in everywhere]
    only = [loss([other for other in everywhere if other != layer]) for layer in everywhere]
    return {
        "leave_one_out_kl": [k for k, _ in out],
        "leave_one_out_nll": [nll - at_full[1] for _, nll in out],
        "leave_one_in_kl": [blind[0] - k for k, _ in only],
        "leave_one_in_nll": [blind[1] - nll for _, nll in only],
    }


def assert_equal(layers, expected):
    for name, column in expected.items():
        np.testing.assert_allclose(layers[name], column, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_branch_equals_a_masked_pass(family):
    lm, ids = tiny_model(family), random_ids(N_PROMPT + N_DECODE)
    _, layers, _ = measure(lm, ids[:N_PROMPT], ids[N_PROMPT:])
    expected = expected_columns(lm, ids, N_PROMPT)
    assert_equal(layers, expected)
    assert max(expected["leave_one_out_kl"]) > 0.01, "hiding the prompt must hurt, or this test cannot fail"


@pytest.mark.parametrize("n_anchors", [0, 3, 60])
def test_other_anchors(n_anchors):
    lm, ids = tiny_model("llama"), random_ids(N_PROMPT + N_DECODE, seed=3)
    _, layers, _ = measure(lm, ids[:N_PROMPT], ids[N_PROMPT:], n_anchors=n_anchors)
    assert_equal(layers, expected_columns(lm, ids, N_PROMPT, min(n_anchors, N_PROMPT - 1)))


@pytest.mark.parametrize("n_prompt", [1, 2, 3])
def test_short_prompts(n_prompt):
    lm, ids = tiny_model("llama"), random_ids(n_prompt + 4, seed=1)
    _, layers, _ = measure(lm, ids[:n_prompt], ids[n_prompt:])
    assert_equal(layers, expected_columns(lm, ids, n_prompt, min(1, n_prompt - 1)))
    if n_prompt <= 2:  # nothing to hide
        np.testing.assert_allclose(layers["leave_one_out_kl"], 0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_without_the_last_layer_is_the_last_cutoff_and_a_greedy_reference_gives_the_same(family):
    lm, prompt = tiny_model(family), random_ids(40, seed=2)
    outcome, layers, cutoffs = measure(lm, prompt, None)
    assert layers["leave_one_out_kl"][-1] == pytest.approx(cutoffs["kl"][-2], rel=TOLERANCE, abs=1e-6)
    rise = cutoffs["nll"][-2] - cutoffs["nll_full"][-2]
    assert layers["leave_one_out_nll"][-1] == pytest.approx(rise, rel=TOLERANCE, abs=1e-5)
    _, given, _ = measure(lm, prompt, outcome.reference_ids.tolist())
    assert_equal(given, layers)


def test_few_branches_at_once_give_the_same(monkeypatch):
    lm, ids = tiny_model("llama"), random_ids(N_PROMPT + N_DECODE)
    _, together, _ = measure(lm, ids[:N_PROMPT], ids[N_PROMPT:])
    monkeypatch.setattr(leave_one_out, "KEYS_AT_ONCE", 120)  # two branches of 56 keys
    _, layers, _ = measure(lm, ids[:N_PROMPT], ids[N_PROMPT:])
    assert_equal(layers, together)


@pytest.mark.parametrize("capture", [NNsightCapture, TransformerLensCapture], ids=lambda capture: capture.name)
def test_other_backends_are_refused(capture):
    with pytest.raises(UserError, match=f"the {capture.name} backend cannot measure leave_one_out: use the hooks"):
        require_backend({"leave_one_out": LeaveOneOut}, capture.name)
    with pytest.raises(UserError, match="only the hooks backend"):
        measure(tiny_model("llama"), random_ids(20), None, capture=capture)


def test_a_refused_diagnosis_writes_nothing(tmp_path):
    lm = tiny_model("llama")
    with pytest.raises(UserError, match="cannot measure leave_one_out"):
        diagnose(lm, "w5 w6 w7", backend="nnsight", rules="leave-one-out", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
